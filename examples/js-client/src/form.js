/** The form: what is chosen in it, its preview, and the problems shown beside its fields. */
import { showFile } from "./image_preview.js";
import { MODELS } from "./models.js";

const form = document.querySelector("#form");
const pictureField = document.querySelector("#picture-field");
const preview = document.querySelector("#preview");
const pictureHint = document.querySelector("#picture-hint");
const generateButton = document.querySelector("#generate");
const cancelButton = document.querySelector("#cancel");
const { picture, prompt } = form.elements;

const NO_FILE_HINT = pictureHint.textContent;

/** Calls `onGenerate(choice)` and `onCancel()` from now on. */
export function startForm({ onGenerate, onCancel }) {
  document.querySelector("#models").append(...MODELS.map(modelChoice));
  form.addEventListener("change", () => {
    showFieldsOfModel();
    showPreview();
  });
  form.addEventListener("input", ({ target }) => showProblem(target, ""));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const choice = readChoice();
    if (choice) {
      onGenerate(choice);
    }
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      form.requestSubmit(generateButton);
    }
  });
  cancelButton.addEventListener("click", onCancel);
  // A reload may bring back what was chosen before it.
  showFieldsOfModel();
  showPreview();
}

/** Busy: cancelling is possible and generating is not. The keyboard focus follows the button. */
export function setBusy(busy) {
  const hadFocus = [generateButton, cancelButton].includes(document.activeElement);
  generateButton.disabled = busy;
  cancelButton.hidden = !busy;
  if (hadFocus) {
    (busy ? cancelButton : generateButton).focus();
  }
}

/** Shows fal's complaints (name of the input to sentence) beside the fields they are about. */
export function showProblems(problems) {
  showProblem(prompt, problems.prompt ?? "");
  showProblem(picture, problems.image_url ?? "");
}

function modelChoice(model, index) {
  const label = document.createElement("label");
  const radio = document.createElement("input");
  Object.assign(radio, {
    type: "radio",
    name: "model",
    value: model.id,
    checked: index === 0,
  });
  label.append(radio, element("strong", model.name), element("span", model.purpose));
  label.append(element("code", model.id));
  return label;
}

function element(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

function chosenModel() {
  return MODELS.find(({ id }) => id === form.elements.model.value);
}

/** `{model, prompt, picture}`, or null after showing what is missing. */
function readChoice() {
  const model = chosenModel();
  const file = model.takesPicture ? picture.files[0] : undefined;
  const text = prompt.value.trim();
  const pictureMissing = model.takesPicture && !file;
  showProblem(picture, pictureMissing ? `${model.name} changes a picture: choose one.` : "");
  showProblem(prompt, text ? "" : "Say in a few words what the picture should show.");
  if (pictureMissing || !text) {
    (pictureMissing ? picture : prompt).focus();
    return null;
  }
  return { model, prompt: text, picture: file };
}

function showProblem(field, text) {
  const problem = document.querySelector(`#${field.name}-problem`);
  if (problem) {
    problem.textContent = text;
    problem.hidden = !text;
    field.setAttribute("aria-invalid", String(Boolean(text)));
  }
}

function showFieldsOfModel() {
  const model = chosenModel();
  pictureField.hidden = !model.takesPicture;
  prompt.placeholder = model.placeholder;
}

function showPreview() {
  const file = picture.files[0];
  showFile(preview, file);
  pictureHint.textContent = file ? `${file.name}, ${size(file)}` : NO_FILE_HINT;
}

function size({ size }) {
  return size < 2 ** 20 ? `${Math.ceil(size / 2 ** 10)} KB` : `${(size / 2 ** 20).toFixed(1)} MB`;
}
