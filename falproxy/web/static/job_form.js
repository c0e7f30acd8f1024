/** The form for a new job: model, input images, prompt and options. */
import { estimateCost } from "./costs.js";
import { byId, el } from "./dom.js";
import { ImageInput } from "./image_inputs.js";
import { loadInputs } from "./models.js";
import { createControl } from "./option_controls.js";

/**
 * @typedef {object} JobRequest
 * @property {object} model entry of the model list
 * @property {string} prompt
 * @property {Record<string, unknown>} options those that differ from the model's defaults
 * @property {{name: string, isMany: boolean, images: import("./image_upload.js").InputImage[]}[]} imageInputs
 */

// ms in which an equal request is part of the same action, before and after its result is shown
const REPEAT_TIME = 1000;
const REPEAT_TIME_DONE = 400;

const toText = (request) =>
  JSON.stringify(request, (key, value) => (value instanceof File ? value.lastModified : value));

const isMac = /Mac|iPhone|iPad/.test(navigator.platform);

export class JobForm {
  #models = [];
  #inputs = null;
  #imageInputs = [];
  #controls = [];
  #previous = {}; // the latest request
  #modelChanges = 0; // the inputs of an earlier model may arrive after those of a later one

  /** @param {(request: JobRequest) => void} onSubmit */
  constructor(onSubmit) {
    this.form = byId("job-form");
    this.prompt = byId("prompt");
    this.onSubmit = onSubmit;
    byId("shortcut").textContent = isMac ? "⌘ + Enter" : "Ctrl + Enter";
    this.form.addEventListener("submit", (event) => this.#handleSubmit(event));
    this.form.addEventListener("keydown", (event) => this.#handleKey(event));
    this.form.addEventListener("input", () => {
      this.#renderCost();
      this.#clearCorrectedProblems();
    });
    byId("model").addEventListener("change", () => this.#renderModel());
    this.#listenForImages();
  }

  /** @param {object[]} models */
  async setModels(models) {
    this.#models = models;
    byId("model").replaceChildren(
      ...models.map(({ name, endpoint }) => el("option", { value: endpoint }, name)),
    );
    byId("model").value = (models.find(({ name }) => name === "kontext") ?? models[0]).endpoint;
    await this.#renderModel();
  }

  /**
   * Fill the form with the settings of a job.
   *
   * @param {{endpoint: string, prompt: string, options: object}} job
   */
  async fill({ endpoint, prompt, options }) {
    if (this.#models.some((model) => model.endpoint === endpoint)) {
      byId("model").value = endpoint;
      await this.#renderModel();
    }
    this.prompt.value = prompt;
    this.#controls.forEach((control) => control.set(options[control.name]));
    byId("options").open = Object.keys(options).length > 0;
    this.#renderCost();
    this.prompt.focus();
  }

  /**
   * Add an input image. Selects a model with an image input if the current one has none.
   *
   * @param {{file: File} | {url: string}} image
   */
  async addImage({ file, url }) {
    if (this.#imageInputs.length === 0) {
      const editModel = this.#models.find(({ required }) => required.includes("image_url"));
      if (editModel === undefined) {
        return;
      }
      byId("model").value = editModel.endpoint;
      await this.#renderModel();
    }
    const target = this.#targetInput();
    await (file ? target.addFiles([file]) : target.addUrl(url));
    this.prompt.focus();
  }

  submit() {
    this.form.requestSubmit();
  }

  get #model() {
    return this.#models.find(({ endpoint }) => endpoint === byId("model").value);
  }

  #targetInput() {
    return (
      this.#imageInputs.find((input) => input.element.contains(document.activeElement)) ??
      this.#imageInputs.find((input) => !input.isFull) ??
      this.#imageInputs[0]
    );
  }

  async #renderModel() {
    const change = (this.#modelChanges += 1);
    const model = this.#model;
    byId("model-description").textContent = model.description;
    this.#renderCost();
    const inputs = await loadInputs(model);
    if (change !== this.#modelChanges) {
      return;
    }
    this.#inputs = inputs;
    byId("form-problem").textContent = "";
    byId("prompt-field").hidden = !inputs.hasPrompt;
    const isEdit = inputs.images.some(({ isRequired }) => isRequired);
    this.prompt.placeholder = isEdit
      ? "What should change? For example: make it winter."
      : "What do you want to see? For example: a lighthouse at dusk.";
    this.#renderImageInputs(inputs);
    this.#renderControls(inputs, model.defaults ?? {});
    this.#renderCost();
  }

  /** Images that were added already are kept as far as the new model has room for them. */
  #renderImageInputs(inputs) {
    const images = this.#imageInputs.flatMap((input) => input.images);
    this.#imageInputs = inputs.images.map((input) => new ImageInput(input));
    for (const { file, url } of images) {
      const target = this.#imageInputs.find((input) => !input.isFull);
      if (file) {
        target?.addFiles([file]);
      } else {
        target?.addUrl(url);
      }
    }
    byId("image-inputs").classList.remove("is-empty");
    byId("image-inputs").hidden = this.#imageInputs.length === 0;
    byId("image-inputs").replaceChildren(...this.#imageInputs.map((input) => input.element));
  }

  #renderControls({ fields }, defaults) {
    const previous = new Map(this.#controls.map((control) => [control.name, control.value()]));
    this.#controls = fields.map(createControl);
    for (const control of this.#controls) {
      const value = previous.get(control.name) ?? defaults[control.name];
      if (value !== undefined) {
        control.set(value);
      }
    }
    byId("option-fields").replaceChildren(...this.#controls.map((control) => control.element));
    byId("options").hidden = fields.length === 0;
  }

  #readOptions() {
    const values = this.#controls.map((control) => [control.name, control.value()]);
    return Object.fromEntries(values.filter(([, value]) => value !== undefined));
  }

  #renderCost() {
    const options = this.#readOptions();
    byId("cost").textContent = estimateCost(this.#model, options.num_images ?? 1);
    const count = Object.keys(options).length;
    byId("options-changed").textContent = count > 0 ? `${count} changed` : "";
  }

  #clearCorrectedProblems() {
    if (this.prompt.value.trim() !== "" && byId("prompt-problem").textContent !== "") {
      byId("prompt-problem").textContent = "";
      this.prompt.setAttribute("aria-invalid", "false");
    }
    const hasProblem = ({ element }) => Boolean(element.querySelector(".problem")?.textContent);
    this.#controls.filter(hasProblem).forEach((control) => control.validate());
  }

  /** A key that is held down submits once. */
  #handleKey(event) {
    if (event.key !== "Enter") {
      return;
    }
    const isShortcut = event.ctrlKey || event.metaKey;
    if (event.repeat && (isShortcut || event.target !== this.prompt)) {
      event.preventDefault();
    } else if (isShortcut) {
      this.#handleSubmit(event);
    }
  }

  #handleSubmit(event) {
    event.preventDefault();
    if (this.#inputs === null || !this.#validate()) {
      return;
    }
    const request = {
      model: this.#model,
      prompt: this.#inputs.hasPrompt ? this.prompt.value.trim() : "",
      options: this.#readOptions(),
      imageInputs: this.#imageInputs.map(({ name, isMany, images }) => ({ name, isMany, images })),
    };
    const text = toText(request);
    const isRepeated = text === this.#previous.text && performance.now() < this.#previous.until;
    this.#previous = { text, until: performance.now() + REPEAT_TIME };
    if (!isRepeated) {
      this.onSubmit(request);
    }
  }

  allowRepeat() {
    this.#previous.until += REPEAT_TIME_DONE - REPEAT_TIME;
  }

  /** Show the problems and focus the first invalid input. Return whether there is none. */
  #validate() {
    const invalid = [];
    for (const input of this.#imageInputs) {
      const isMissing = input.isRequired && input.images.length === 0;
      if (isMissing) {
        input.showProblem("This model needs an image: choose one.");
        invalid.push(input);
      }
    }
    const isPromptMissing = this.#inputs.isPromptRequired && this.prompt.value.trim() === "";
    byId("prompt-problem").textContent = isPromptMissing ? "Describe what you want to see." : "";
    this.prompt.setAttribute("aria-invalid", String(isPromptMissing));
    if (isPromptMissing) {
      invalid.push(this.prompt);
    }
    for (const control of this.#controls) {
      if (control.validate() !== "") {
        byId("options").open = true;
        invalid.push(control.element.querySelector("input, select"));
      }
    }
    invalid[0]?.focus();
    return invalid.length === 0;
  }

  /** Accept pasted and dropped images anywhere on the page. */
  #listenForImages() {
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (files.length > 0 && this.#imageInputs.length > 0) {
        event.preventDefault();
        this.#targetInput().addFiles(files);
      }
    });
    const highlight = (isOn) => this.form.classList.toggle("is-drop-target", isOn);
    document.addEventListener("dragover", (event) => {
      event.preventDefault(); // otherwise the browser opens the dropped file
      highlight(this.#imageInputs.length > 0);
    });
    document.addEventListener("dragleave", (event) => highlight(event.relatedTarget !== null));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      highlight(false);
      const target =
        this.#imageInputs.find((input) => input.element.contains(event.target)) ??
        this.#targetInput();
      const url = event.dataTransfer.getData("text/uri-list").split("\n")[0];
      if (event.dataTransfer.files.length > 0) {
        target?.addFiles(event.dataTransfer.files);
      } else if (url) {
        target?.addUrl(url);
      }
    });
  }
}
