/** The form: model, input image with preview, prompt, and the problems beside its fields. */
import { previewFile } from "./image_preview.js";
import { MODELS } from "./models.js";

const form = document.querySelector("#form");
const imageField = document.querySelector("#input-image-field");
const preview = document.querySelector("#preview");
const imageHint = document.querySelector("#input-image-hint");
const generateButton = document.querySelector("#generate");
const cancelButton = document.querySelector("#cancel");
const { prompt } = form.elements;
const imageInput = form.elements["input-image"];

const NO_FILE_HINT = imageHint.textContent;

/** Set up the form. onGenerate: receives `{model, prompt, image}`. */
export function setUpForm({ onGenerate, onCancel }) {
  document.querySelector("#models").append(...MODELS.map(createModelOption));
  form.addEventListener("change", () => {
    showModelFields();
    showPreview();
  });
  form.addEventListener("input", ({ target }) => showProblem(target, ""));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    // One job at a time: `requestSubmit` does not care whether the button is disabled.
    const request = generateButton.disabled ? null : readRequest();
    if (request) {
      onGenerate(request);
    }
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) {
      form.requestSubmit(generateButton);
    }
  });
  cancelButton.addEventListener("click", onCancel);
  // Browsers may restore the values of the form after a reload.
  showModelFields();
  showPreview();
}

/**
 * While busy the form has a Cancel button instead of an enabled Generate button. Moves the focus.
 */
export function setBusy(busy) {
  const hadFocus = [generateButton, cancelButton].includes(document.activeElement);
  generateButton.disabled = busy;
  cancelButton.hidden = !busy;
  if (hadFocus) {
    (busy ? cancelButton : generateButton).focus();
  }
}

/** Show fal's validation errors beside their fields. problems: messages by input name. */
export function showProblems(problems) {
  showProblem(prompt, problems.prompt ?? "");
  showProblem(imageInput, problems.image_url ?? "");
}

function createModelOption(model, index) {
  const label = document.createElement("label");
  const radio = document.createElement("input");
  Object.assign(radio, {
    type: "radio",
    name: "model",
    value: model.id,
    checked: index === 0,
  });
  label.append(
    radio,
    textElement("strong", model.name),
    textElement("span", model.purpose),
    textElement("code", model.id),
  );
  return label;
}

function textElement(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

function selectedModel() {
  return MODELS.find(({ id }) => id === form.elements.model.value);
}

/** Return `{model, prompt, image}`, or show the missing fields and return null. */
function readRequest() {
  const model = selectedModel();
  const image = model.hasImageInput ? imageInput.files[0] : undefined;
  const text = prompt.value.trim();
  const isImageMissing = model.hasImageInput && !image;
  showProblem(imageInput, isImageMissing ? `${model.name} edits an image: choose one.` : "");
  showProblem(prompt, text ? "" : "Describe the image in a few words.");
  if (isImageMissing || !text) {
    (isImageMissing ? imageInput : prompt).focus();
    return null;
  }
  return { model, prompt: text, image };
}

function showProblem(field, text) {
  const problem = document.querySelector(`#${field.name}-problem`);
  if (problem) {
    problem.textContent = text;
    problem.hidden = !text;
    field.setAttribute("aria-invalid", String(Boolean(text)));
  }
}

function showModelFields() {
  const model = selectedModel();
  imageField.hidden = !model.hasImageInput;
  prompt.placeholder = model.placeholder;
}

function showPreview() {
  const file = imageInput.files[0];
  previewFile(preview, file);
  imageHint.textContent = file ? `${file.name}, ${formatSize(file.size)}` : NO_FILE_HINT;
}

function formatSize(size) {
  return size < 2 ** 20 ? `${Math.ceil(size / 2 ** 10)} KB` : `${(size / 2 ** 20).toFixed(1)} MB`;
}
