/** The page: what happens between a press on Generate and a picture, an error or a cancel. */
import { setBusy, showProblems, startForm } from "./form.js";
import { generate } from "./generate.js";
import { clearResult, showError, showPicture } from "./result_view.js";
import { endStatus, showProgress, startStatus } from "./status_panel.js";
import { explain } from "./error_messages.js";

let controller = new AbortController();

startForm({
  onGenerate: makePicture,
  onCancel: () => controller.abort(),
});

async function makePicture({ model, prompt, picture }) {
  controller = new AbortController();
  const { signal } = controller;
  setBusy(true);
  clearResult(picture);
  startStatus();
  try {
    const { data } = await generate({ model, prompt, picture, signal, onProgress: showProgress });
    await showPicture({ data, prompt });
    endStatus("done", "Done");
  } catch (error) {
    if (signal.aborted) {
      endStatus("cancelled", "Cancelled");
    } else {
      fail(error);
    }
  } finally {
    setBusy(false);
  }
}

function fail(error) {
  const words = explain(error);
  endStatus("failed", "No picture this time");
  showError(words);
  showProblems(words.fields);
}
