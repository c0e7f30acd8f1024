/**
 * The image inputs of the form. Images are kept when another model is selected; pasted and dropped
 * images are accepted anywhere on the page.
 */
import { byId } from "./dom.js";
import { ImageInput, isMaskName } from "./image_inputs.js";

export class FormImages {
  #inputs = [];
  #kept = []; // {image, isMask} for which the current model has no room
  #onChange;
  #onMissingInput;

  /**
   * @param {{onChange: () => void, onMissingInput: () => Promise<void>}} actions onMissingInput: an
   *   image was added, but the model takes none; selects a model that does
   */
  constructor({ onChange, onMissingInput }) {
    this.#onChange = onChange;
    this.#onMissingInput = onMissingInput;
    this.#listen();
  }

  /** @returns {ImageInput[]} */
  get inputs() {
    return this.#inputs;
  }

  /** The images of each input. */
  get values() {
    return this.#inputs.map(({ name, isMany, images }) => ({ name, isMany, images }));
  }

  /** All images, with those for which the model has no room. @returns {import("./form_draft.js").DraftImage[]} */
  get all() {
    const shown = this.#inputs.flatMap(({ name, isMask, images }) =>
      images.map((image) => ({ name, isMask, image })),
    );
    return [...shown, ...this.#kept.map((kept) => ({ name: "", ...kept }))];
  }

  /** Show the inputs of a model, with the images that were added already as far as there is room. */
  async setInputs(definitions) {
    const images = this.all;
    const actions = { onChange: this.#onChange, onDraw: (input) => this.#drawMask(input) };
    this.#inputs = definitions.map((definition) => new ImageInput(definition, actions));
    byId("image-inputs").hidden = this.#inputs.length === 0;
    byId("image-inputs").replaceChildren(...this.#inputs.map((input) => input.element));
    this.#kept = [];
    for (const { image, isMask } of images) {
      await this.#place(image, isMask);
    }
  }

  /**
   * Replace all images by those of a job.
   *
   * @param {{name: string, isMask?: boolean, images: object[]}[]} values
   */
  async setValues(values) {
    this.#kept = [];
    const definitions = this.#inputs;
    this.#inputs = [];
    await this.setInputs(definitions);
    for (const { name, isMask = isMaskName(name), images } of values) {
      for (const image of images) {
        await this.#place(image, isMask, name);
      }
    }
  }

  /** Add an image to the input of a name, or to one that has room for it. */
  async #place(image, isMask, name = "") {
    const free = this.#inputs.filter((input) => !input.isFull);
    const target =
      free.find((input) => input.name === name) ?? free.find((input) => input.isMask === isMask);
    if (target === undefined) {
      this.#kept.push({ image, isMask });
    } else {
      await target.addImages([image]);
    }
  }

  /** @param {import("./image_upload.js").InputImage} image */
  async add(image) {
    await this.#addTo(this.#target(), [image]);
  }

  /**
   * Show a problem at each input that needs an image and has none. Return those inputs.
   *
   * @param {{label: string, onclick: () => void} | null} offer what to do without an image
   */
  validate(offer) {
    const missing = this.#inputs.filter(
      ({ isRequired, images }) => isRequired && images.length === 0,
    );
    for (const input of missing) {
      const subject = input.isMask ? "a mask: draw one, or choose a file" : "an image: choose one";
      input.showProblem(`This model needs ${subject}.`, input === missing[0] ? offer : null);
    }
    return missing;
  }

  async #addTo(target, images) {
    if (target === undefined) {
      await this.#onMissingInput();
      target = this.#target();
    }
    const files = images.map(({ file }) => file).filter(Boolean);
    await target?.addFiles(files);
    await target?.addImages(images.filter(({ url }) => url !== undefined));
  }

  #target() {
    return (
      this.#inputs.find((input) => input.element.contains(document.activeElement)) ??
      this.#inputs.find((input) => !input.isFull && !input.isMask) ??
      this.#inputs[0]
    );
  }

  async #drawMask(input) {
    const base = this.#inputs.find(({ isMask, images }) => !isMask && images.length > 0);
    if (base === undefined) {
      input.showProblem("Choose the image first, then draw the mask on it.");
      return;
    }
    const { drawMask } = await import("./mask_dialog.js");
    const file = await drawMask(base.images[0]);
    if (file !== null) {
      await input.addFiles([file]);
    }
  }

  #listen() {
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files].filter(({ type }) => type.startsWith("image/"));
      if (files.length > 0) {
        event.preventDefault();
        this.#addTo(
          this.#target(),
          files.map((file) => ({ file })),
        );
      }
    });
    const highlight = (isOn) => byId("job-form").classList.toggle("is-drop-target", isOn);
    document.addEventListener("dragover", (event) => {
      event.preventDefault(); // otherwise the browser opens the dropped file
      highlight(true);
    });
    document.addEventListener("dragleave", (event) => highlight(event.relatedTarget !== null));
    document.addEventListener("dragend", () => highlight(false));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      highlight(false);
      const target =
        this.#inputs.find((input) => input.element.contains(event.target)) ?? this.#target();
      const files = [...event.dataTransfer.files].map((file) => ({ file }));
      const url = event.dataTransfer.getData("text/uri-list").split("\n")[0];
      if (files.length > 0 || url) {
        this.#addTo(target, files.length > 0 ? files : [{ url }]);
      }
    });
  }
}
