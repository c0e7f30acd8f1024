/** The form for a new job: task, model, input images, prompt and options. */
import { describeEstimate } from "./costs.js";
import { byId } from "./dom.js";
import { PLACEHOLDERS } from "./examples.js";
import { FormImages } from "./form_images.js";
import { renderTasks, TASKS } from "./header.js";
import { icon } from "./icons.js";
import { DEFAULT_ENDPOINTS, loadInputs, loadPrice, modelOfEndpoint } from "./models.js";
import { createControl, isMainField, setIfValid } from "./option_controls.js";
import { proxyInfo } from "./proxy_status.js";
import { createRepeatFilter } from "./repeat_filter.js";

/**
 * @typedef {object} JobRequest
 * @property {import("./models.js").Model} model
 * @property {string} prompt
 * @property {string} promptName
 * @property {Record<string, unknown>} options those that differ from the model's defaults
 * @property {{name: string, isMany: boolean, images: import("./image_upload.js").InputImage[]}[]} imageInputs
 */

const PROMPT_WARNING = 2000; // characters from which the number is shown
const toText = (request) =>
  JSON.stringify(request, (key, value) => (value instanceof File ? value.lastModified : value));

const isMac = /Mac|iPhone|iPad/.test(navigator.platform);

export class JobForm extends EventTarget {
  #models = [];
  #model = null;
  #task = "create";
  #lastModels = new Map(); // task → the model that was selected last
  #inputs = null;
  #controls = [];
  #modelChanges = 0; // the inputs of an earlier model may arrive after those of a later one
  #filter = createRepeatFilter();

  /**
   * Dispatches `change` when any input has changed.
   *
   * @param {(request: JobRequest) => void} onSubmit
   */
  constructor(onSubmit) {
    super();
    this.form = byId("job-form");
    this.prompt = byId("prompt");
    this.onSubmit = onSubmit;
    this.images = new FormImages({
      onChange: () => this.#handleChange(),
      onMissingInput: () => this.setTask("edit"),
    });
    byId("shortcut").textContent = isMac ? "⌘ ↵" : "Ctrl ↵";
    this.form.addEventListener("submit", (event) => this.#handleSubmit(event));
    this.form.addEventListener("keydown", (event) => this.#handleKey(event));
    this.form.addEventListener("input", () => {
      this.#handleChange();
      this.#clearCorrectedProblems();
    });
    byId("model").append(icon("chevron"));
    byId("model").addEventListener("click", () => this.#pickModel());
  }

  /** @param {import("./models.js").Model[]} models those of the proxy's list */
  setModels(models) {
    this.#models = models;
    renderTasks(this.tasks, this.#task);
  }

  /** The tasks that at least one model of the list serves. */
  get tasks() {
    return Object.keys(TASKS).filter((task) => this.#models.some((model) => model.task === task));
  }

  get task() {
    return this.#task;
  }

  /** Select a task, with the model that was used last for it, or a good one. */
  async setTask(task) {
    const models = this.#models.filter((model) => model.task === task);
    const preferred = models.find(({ endpoint }) => endpoint === DEFAULT_ENDPOINTS[task]);
    const model = this.#lastModels.get(task) ?? preferred ?? models[0];
    if (model !== undefined) {
      await this.selectModel(model);
    }
  }

  /** @param {import("./models.js").Model} model */
  async selectModel(model) {
    const change = (this.#modelChanges += 1);
    this.#model = model;
    this.#task = model.task ?? this.#task;
    this.#lastModels.set(this.#task, model);
    renderTasks(this.tasks, this.#task);
    byId("form-title").textContent = TASKS[this.#task];
    byId("model-name").textContent = model.title;
    byId("model").value = model.endpoint;
    byId("model-description").textContent = model.summary;
    this.#clearProblems();
    delete this.form.dataset.endpoint;
    const inputs = await loadInputs(model);
    if (change !== this.#modelChanges) {
      return;
    }
    this.#inputs = inputs;
    byId("prompt-field").hidden = !inputs.hasPrompt;
    this.prompt.placeholder = PLACEHOLDERS[this.#task];
    this.#renderControls(inputs, model.defaults);
    await this.images.setInputs(inputs.images);
    this.form.dataset.endpoint = model.endpoint; // the form is complete
    this.#handleChange();
    loadPrice(model).then(() => this.#handleChange());
  }

  /** Return the model of an endpoint: of the list, or one that is made of what is known. */
  findModel({ endpoint, ...known }) {
    return (
      this.#models.find((model) => model.endpoint === endpoint) ??
      [...this.#lastModels.values()].find((model) => model.endpoint === endpoint) ??
      modelOfEndpoint(endpoint, known)
    );
  }

  /**
   * Fill the form. Input images are replaced if there are any in the argument.
   *
   * @param {{endpoint?: string, model?: string, prompt: string, options: object, imageInputs?: object[]}} settings
   */
  async fill({ endpoint, model, price, unit, prompt, options, imageInputs }) {
    if (endpoint) {
      await this.selectModel(this.findModel({ endpoint, title: model, price, unit }));
    }
    this.prompt.value = prompt;
    this.#controls.forEach((control) => setIfValid(control, options[control.name]));
    byId("options").open = this.#controls.some(
      ({ name, field }) => Object.hasOwn(options, name) && !isMainField(field),
    );
    if (imageInputs !== undefined) {
      await this.images.setValues(imageInputs);
    }
    this.#clearProblems();
    this.#handleChange();
  }

  /** Set one option, such as the seed. */
  setOption(name, value) {
    const control = this.#controls.find((each) => each.name === name);
    control?.set(value);
    this.#handleChange();
    return control !== undefined;
  }

  /** Add an input image. Selects a model with an image input if the current one has none. */
  async addImage(image) {
    await this.images.add(image);
    this.prompt.focus();
  }

  submit() {
    this.form.requestSubmit();
  }

  /** The content of the form; null until its model has loaded. @returns {JobRequest | null} */
  get request() {
    return this.#inputs === null
      ? null
      : {
          model: this.#model,
          prompt: this.#inputs.hasPrompt ? this.prompt.value.trim() : "",
          promptName: this.#inputs.promptName,
          options: this.#readOptions(),
          imageInputs: this.images.values,
        };
  }

  async #pickModel() {
    const { pickModel } = await import("./model_picker.js");
    const model = await pickModel(this.#models, this.#task);
    if (model !== null) {
      await this.selectModel(model);
    }
    byId("model").focus();
  }

  #offerWithoutImages() {
    const isPossible = this.#task !== "create" && this.tasks.includes("create");
    const onclick = () => this.setTask("create").then(() => this.submit());
    return isPossible && this.prompt.value.trim() !== ""
      ? { label: "Create one from the prompt alone", onclick }
      : null;
  }

  #renderControls({ fields }, defaults) {
    const previous = new Map(this.#controls.map((control) => [control.name, control.value()]));
    this.#controls = fields.map(createControl);
    for (const control of this.#controls) {
      const value = previous.get(control.name) ?? defaults[control.name];
      if (value !== undefined) {
        setIfValid(control, value);
      }
    }
    const [main, other] = [true, false].map((isMain) =>
      this.#controls
        .filter(({ field }) => isMainField(field) === isMain)
        .map(({ element }) => element),
    );
    byId("main-fields").replaceChildren(...main);
    byId("option-fields").replaceChildren(...other);
    byId("options").hidden = other.length === 0;
  }

  #readOptions() {
    const values = this.#controls.map((control) => [control.name, control.value()]);
    return Object.fromEntries(values.filter(([, value]) => value !== undefined));
  }

  #handleChange() {
    if (this.#inputs === null) {
      return;
    }
    const { prompt, options } = this.request;
    const count = this.#controls.find(({ name }) => name === "num_images")?.field.preset ?? 1;
    byId("cost").textContent = describeEstimate(
      this.#model,
      { prompt, options, count },
      proxyInfo.isSandbox,
    );
    const changed = this.#controls.filter(
      ({ name, field }) => !isMainField(field) && Object.hasOwn(options, name),
    ).length;
    byId("options-changed").textContent = changed > 0 ? `${changed} changed` : "";
    const length = this.prompt.value.length;
    byId("prompt-count").textContent = length > PROMPT_WARNING ? `${length} characters` : "";
    this.dispatchEvent(new Event("change"));
  }

  #clearProblems() {
    byId("prompt-problem").textContent = "";
    this.prompt.setAttribute("aria-invalid", "false");
    byId("form-problem").textContent = "";
  }

  #clearCorrectedProblems() {
    if (this.prompt.value.trim() !== "" && byId("prompt-problem").textContent !== "") {
      this.#clearProblems();
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
    if (event.repeat && (isShortcut || event.target.tagName !== "TEXTAREA")) {
      event.preventDefault();
    } else if (isShortcut) {
      this.#handleSubmit(event);
    }
  }

  #handleSubmit(event) {
    event.preventDefault();
    if (this.#inputs !== null && this.#validate()) {
      const { request } = this;
      if (this.#filter.accepts(toText(request))) {
        this.onSubmit(request);
      }
    }
  }

  allowRepeat() {
    this.#filter.shorten();
  }

  /** Show the problems and focus the first invalid input. Return whether there is none. */
  #validate() {
    const invalid = this.images.validate(this.#offerWithoutImages());
    const isPromptMissing = this.#inputs.isPromptRequired && this.prompt.value.trim() === "";
    byId("prompt-problem").textContent = isPromptMissing ? "Write a prompt first." : "";
    this.prompt.setAttribute("aria-invalid", String(isPromptMissing));
    if (isPromptMissing) {
      invalid.push(this.prompt);
    }
    for (const control of this.#controls) {
      if (control.validate() !== "") {
        byId("options").open ||= !isMainField(control.field);
        invalid.push(control.element.querySelector("input, select, textarea"));
      }
    }
    if (invalid.length > 0) {
      this.dispatchEvent(new Event("invalid"));
      invalid[0].focus();
    }
    return invalid.length === 0;
  }
}
