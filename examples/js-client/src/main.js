/** Entry point: connects the form, the generation of an image, and its result or error. */
import { explainError } from "./error_messages.js";
import { setBusy, setUpForm, showProblems } from "./form.js";
import { generate } from "./generate.js";
import { clearResult, showError, showImage } from "./result_view.js";
import { finishStatus, showProgress, startStatus } from "./status_panel.js";

let controller = new AbortController();

setUpForm({
  onGenerate: generateImage,
  onCancel: () => controller.abort(),
});

async function generateImage({ model, prompt, image }) {
  controller = new AbortController();
  const { signal } = controller;
  setBusy(true);
  clearResult(image);
  startStatus();
  try {
    const { data } = await generate({ model, prompt, image, signal, onProgress: showProgress });
    await showImage({ data, prompt });
    finishStatus("done", "Done");
  } catch (error) {
    if (signal.aborted) {
      finishStatus("cancelled", "Cancelled");
    } else {
      showFailure(error);
    }
  } finally {
    setBusy(false);
  }
}

function showFailure(error) {
  const message = explainError(error);
  finishStatus("failed", "No image was generated");
  showError(message);
  showProblems(message.fields);
}
