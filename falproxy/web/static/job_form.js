/** The form: a model, its pictures, a prompt, its options. What it yields is a wish. */
import { el, find } from "./dom.js";
import { inputsOf } from "./models.js";
import { estimate } from "./costs.js";
import { controlOf } from "./option_controls.js";
import { Slot } from "./image_inputs.js";

/**
 * @typedef {object} Wish
 * @property {object} model of the catalogue
 * @property {string} prompt
 * @property {Record<string, unknown>} options those that differ from the model's defaults
 * @property {{name: string, isMany: boolean, pictures: import("./image_upload.js").Picture[]}[]} slots
 */

const isMac = /Mac|iPhone|iPad/.test(navigator.platform);

export class MakeForm {
  #models = [];
  #inputs = null;
  #slots = [];
  #controls = [];
  #turn = 0; // counts choices of a model: the inputs of an older one may come later

  /** @param {(wish: Wish) => void} onWish is called with what is to be made */
  constructor(onWish) {
    this.form = find("make");
    this.prompt = find("prompt");
    this.onWish = onWish;
    find("keys").textContent = isMac ? "⌘ + Enter" : "Ctrl + Enter";
    this.form.addEventListener("submit", (event) => this.#submit(event));
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        this.#submit(event);
      }
    });
    this.form.addEventListener("input", () => {
      this.#showPrice();
      this.#forgive();
    });
    find("model").addEventListener("change", () => this.#show());
    this.#listenForPictures();
  }

  /** @param {object[]} models */
  async offer(models) {
    this.#models = models;
    find("model").replaceChildren(
      ...models.map(({ name, endpoint }) => el("option", { value: endpoint }, name)),
    );
    find("model").value = (models.find(({ name }) => name === "kontext") ?? models[0]).endpoint;
    await this.#show();
  }

  /**
   * Puts the settings of a job into the form.
   *
   * @param {{endpoint: string, prompt: string, options: object}} job
   */
  async fill({ endpoint, prompt, options }) {
    if (this.#models.some((model) => model.endpoint === endpoint)) {
      find("model").value = endpoint;
      await this.#show();
    }
    this.prompt.value = prompt;
    this.#controls.forEach((control) => control.set(options[control.name]));
    find("options").open = Object.keys(options).length > 0;
    this.#showPrice();
    this.prompt.focus();
  }

  /** Takes a picture, with a model that can. @param {{file: File} | {url: string}} picture */
  async takePicture({ file, url }) {
    if (this.#slots.length === 0) {
      const able = this.#models.find(({ required }) => required.includes("image_url"));
      if (able === undefined) {
        return;
      }
      find("model").value = able.endpoint;
      await this.#show();
    }
    const slot = this.#openSlot();
    await (file ? slot.addFiles([file]) : slot.addUrl(url));
    this.prompt.focus();
  }

  submit() {
    this.form.requestSubmit();
  }

  get #model() {
    return this.#models.find(({ endpoint }) => endpoint === find("model").value);
  }

  #openSlot() {
    return (
      this.#slots.find((slot) => slot.element.contains(document.activeElement)) ??
      this.#slots.find((slot) => !slot.isFull) ??
      this.#slots[0]
    );
  }

  async #show() {
    const turn = (this.#turn += 1);
    const model = this.#model;
    find("model-says").textContent = model.description;
    this.#showPrice();
    const inputs = await inputsOf(model);
    if (turn !== this.#turn) {
      return;
    }
    this.#inputs = inputs;
    find("make-problem").textContent = "";
    find("prompt-field").hidden = !inputs.hasPrompt;
    const isEdit = inputs.pictures.some(({ isRequired }) => isRequired);
    this.prompt.placeholder = isEdit
      ? "What should change? Make it winter, say."
      : "What do you want to see? A lighthouse at dusk, say.";
    this.#showSlots(inputs);
    this.#showControls(inputs, model.defaults ?? {});
    this.#showPrice();
  }

  /** Pictures that were chosen already stay, as far as the new model has a place for them. */
  #showSlots({ pictures }) {
    const chosen = this.#slots.flatMap((slot) => slot.pictures);
    this.#slots = pictures.map((input) => new Slot(input));
    for (const { file, url } of chosen) {
      const slot = this.#slots.find((one) => !one.isFull);
      if (file) {
        slot?.addFiles([file]);
      } else {
        slot?.addUrl(url);
      }
    }
    find("slots").classList.remove("is-empty");
    find("slots").hidden = this.#slots.length === 0;
    find("slots").replaceChildren(...this.#slots.map((slot) => slot.element));
  }

  #showControls({ fields }, defaults) {
    const before = new Map(this.#controls.map((control) => [control.name, control.value()]));
    this.#controls = fields.map(controlOf);
    for (const control of this.#controls) {
      const value = before.get(control.name) ?? defaults[control.name];
      if (value !== undefined) {
        control.set(value);
      }
    }
    find("fields").replaceChildren(...this.#controls.map((control) => control.element));
    find("options").hidden = fields.length === 0;
  }

  #options() {
    const values = this.#controls.map((control) => [control.name, control.value()]);
    return Object.fromEntries(values.filter(([, value]) => value !== undefined));
  }

  #showPrice() {
    const options = this.#options();
    find("price").textContent = estimate(this.#model, options.num_images ?? 1);
    const count = Object.keys(options).length;
    find("options-set").textContent = count > 0 ? `${count} changed` : "";
  }

  /** What was complained about and is mended now is complained about no longer. */
  #forgive() {
    if (this.prompt.value.trim() !== "" && find("prompt-problem").textContent !== "") {
      find("prompt-problem").textContent = "";
      this.prompt.setAttribute("aria-invalid", "false");
    }
    const isWrong = ({ element }) => Boolean(element.querySelector(".problem")?.textContent);
    this.#controls.filter(isWrong).forEach((control) => control.problem());
  }

  #submit(event) {
    event.preventDefault();
    if (this.#inputs === null || !this.#isComplete()) {
      return;
    }
    const slots = this.#slots.map(({ name, isMany, pictures }) => ({ name, isMany, pictures }));
    this.onWish({
      model: this.#model,
      prompt: this.#inputs.hasPrompt ? this.prompt.value.trim() : "",
      options: this.#options(),
      slots,
    });
  }

  /** Whether nothing is missing or wrong; else it is said beside the first such thing, which gets the
   *  focus. */
  #isComplete() {
    const wrong = [];
    for (const slot of this.#slots) {
      const isMissing = slot.isRequired && slot.pictures.length === 0;
      if (isMissing) {
        slot.complain("This model starts from a picture: choose one.");
        wrong.push(slot);
      }
    }
    const isPromptMissing = this.#inputs.isPromptRequired && this.prompt.value.trim() === "";
    find("prompt-problem").textContent = isPromptMissing ? "Say what you want to see." : "";
    this.prompt.setAttribute("aria-invalid", String(isPromptMissing));
    if (isPromptMissing) {
      wrong.push(this.prompt);
    }
    for (const control of this.#controls) {
      if (control.problem() !== "") {
        find("options").open = true;
        wrong.push(control.element.querySelector("input, select"));
      }
    }
    wrong[0]?.focus();
    return wrong.length === 0;
  }

  #listenForPictures() {
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (files.length > 0 && this.#slots.length > 0) {
        event.preventDefault();
        this.#openSlot().addFiles(files);
      }
    });
    const mark = (isOver) => this.form.classList.toggle("is-over", isOver);
    document.addEventListener("dragover", (event) => {
      event.preventDefault(); // or the browser would open what is dropped
      mark(this.#slots.length > 0);
    });
    document.addEventListener("dragleave", (event) => mark(event.relatedTarget !== null));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      mark(false);
      const slot =
        this.#slots.find((one) => one.element.contains(event.target)) ?? this.#openSlot();
      const url = event.dataTransfer.getData("text/uri-list").split("\n")[0];
      if (event.dataTransfer.files.length > 0) {
        slot?.addFiles(event.dataTransfer.files);
      } else if (url) {
        slot?.addUrl(url);
      }
    });
  }
}
