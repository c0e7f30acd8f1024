/**
 * An image input of the form, for one image or several: drop, paste, choose a file, or enter a URL.
 */
import { el, randomId, safeUrl } from "./dom.js";
import { inputLabel } from "./field.js";
import { icon } from "./icons.js";
import {
  InvalidImageError,
  checkImageFile,
  formatFileSize,
  loadImage,
  readImageFromClipboard,
} from "./image_files.js";
import { createThumbnail } from "./image_thumbnails.js";
import { proxyInfo } from "./proxy_status.js";

const IMAGES_MAX = 10; // of an input that accepts several

export const isMaskName = (name) => /mask/.test(name);

export class ImageInput {
  #id = randomId();
  #items = []; // {file?, url?, previewUrl, description}
  #list = el("ul", { className: "chosen-images" });
  #problem = el("p", { className: "problem", id: `${this.#id}-problem`, role: "alert" });
  #onChange;

  /**
   * @param {{name: string, isMany: boolean, isRequired: boolean, hint: string}} input
   * @param {{onChange: () => void, onDraw?: (input: ImageInput) => void}} actions onDraw: for masks
   */
  constructor({ name, isMany, isRequired, hint }, { onChange, onDraw }) {
    this.name = name;
    this.isMany = isMany;
    this.isRequired = isRequired;
    this.isMask = isMaskName(name);
    this.hint = hint;
    this.#onChange = onChange;
    this.element = this.#build(this.isMask ? onDraw : undefined);
    this.#render();
  }

  /** The chosen images. @returns {import("./image_upload.js").InputImage[]} */
  get images() {
    return this.#items.map(({ file, url }) => (file ? { file } : { url }));
  }

  get isFull() {
    return this.#items.length >= this.#max;
  }

  get #max() {
    return this.isMany ? IMAGES_MAX : 1;
  }

  /** Add images of a job or of another input. @param {import("./image_upload.js").InputImage[]} images */
  async addImages(images) {
    for (const { file, url } of images) {
      await (file ? this.addFiles([file]) : this.addUrl(url));
    }
  }

  /** Add the valid files, as far as there is room. @param {Iterable<Blob>} files */
  async addFiles(files) {
    const problems = [];
    const chosen = [...files];
    const room = this.isMany ? this.#max - this.#items.length : 1;
    for (const file of chosen.slice(0, room)) {
      try {
        const { file: checked, width, height } = await checkImageFile(file, proxyInfo.formats);
        const size = width === null ? "" : `${width} × ${height}, `;
        this.#addItem({
          file: checked,
          previewUrl: URL.createObjectURL(checked),
          description: `${checked.name}, ${size}${formatFileSize(checked.size)}`,
        });
      } catch (error) {
        const isInvalid = error instanceof InvalidImageError;
        const text = isInvalid ? error.message : "This file cannot be read.";
        problems.push(chosen.length > 1 ? `${file.name}: ${text}` : text);
      }
    }
    if (chosen.length > room) {
      const max = this.isMany ? `at most ${this.#max} images` : "one image";
      problems.push(`This input takes ${max}: ${chosen.length - room} not added.`);
    }
    this.showProblem(problems.join(" "));
  }

  /** Add an image by its URL. Return false if fal could not fetch such a URL. @param {string} text */
  async addUrl(text) {
    const url = safeUrl(text.trim());
    if (url === null || url.startsWith("blob:")) {
      this.showProblem("This is not the URL of an image. It must start with https://");
      return false;
    }
    if (this.isMany && this.isFull) {
      this.showProblem(`This input takes at most ${this.#max} images.`);
      return false;
    }
    this.showProblem("");
    const description = url.startsWith("data:") ? "a data URI" : url;
    const item = { url, previewUrl: url, description };
    this.#addItem(item);
    try {
      const { naturalWidth, naturalHeight } = await loadImage(url);
      item.description = `${naturalWidth} × ${naturalHeight}, ${description}`;
    } catch {
      item.description = `No preview, but fal may be able to read it: ${description}`;
      item.previewUrl = null;
    }
    this.#render();
    return true;
  }

  /**
   * Show a problem, or remove it if the text is empty.
   *
   * @param {string} text
   * @param {{label: string, onclick: () => void} | null} [offer] a way out, shown as a button
   */
  showProblem(text, offer = null) {
    this.#problem.textContent = text;
    if (offer !== null) {
      const { label, onclick } = offer;
      const props = { type: "button", className: "link-button", onclick };
      this.#problem.append(" ", el("button", props, label));
    }
    this.element.classList.toggle("is-invalid", text !== "");
  }

  focus() {
    this.element.querySelector("input[type=file]").focus();
  }

  #addItem(item) {
    if (!this.isMany) {
      this.#items.splice(0).forEach(revokePreview);
    }
    this.#items.push(item);
    this.#render();
    this.#onChange();
  }

  #removeItem(item) {
    this.#items = this.#items.filter((other) => other !== item);
    revokePreview(item);
    this.#render();
    this.focus();
    this.#onChange();
  }

  #moveItem(item, position) {
    const target = Math.max(0, Math.min(this.#items.length - 1, position));
    this.#items.splice(this.#items.indexOf(item), 1);
    this.#items.splice(target, 0, item);
    this.#render();
    this.#list.children[target].querySelector(".thumb").focus();
    this.#onChange();
  }

  #render() {
    this.dropArea.hidden = this.isFull; // the chosen image takes its place
    this.element.classList.toggle("has-images", this.#items.length > 0);
    this.#list.classList.toggle("is-many", this.isMany);
    this.#list.replaceChildren(
      ...this.#items.map((item, index) => this.#createThumbnail(item, index)),
    );
  }

  #createThumbnail(item, index) {
    return createThumbnail(item, {
      index,
      count: this.#items.length,
      isMany: this.isMany,
      listId: this.#id,
      onRemove: () => this.#removeItem(item),
      onMove: (moved, position) => this.#moveItem(this.#items[moved], position),
    });
  }

  #build(onDraw) {
    const fileInput = el("input", {
      type: "file",
      id: `${this.#id}-file`,
      className: "file-input",
      accept: "image/*",
      multiple: this.isMany,
      "aria-describedby": `${this.#id}-problem`,
      onchange: () => {
        this.addFiles(fileInput.files);
        fileInput.value = "";
      },
    });
    const title = inputLabel(this.name) + (this.isRequired ? "" : " (optional)");
    const dropZone = el(
      "label",
      { className: "drop-zone", for: fileInput.id },
      icon("upload"),
      el(
        "span",
        {},
        el("b", {}, this.isMany ? "Choose images" : "Choose an image"),
        el("span", { className: "muted" }, this.isMany ? " or drop them here" : " or drop it here"),
      ),
    );
    const button = (name, label, onclick, props = {}) =>
      el(
        "button",
        { type: "button", className: "button quiet", onclick, ...props },
        icon(name),
        label,
      );
    this.dropArea = el("div", { className: "drop-area" }, fileInput, dropZone);
    this.urlButton = button("link", "From URL", () => this.#toggleUrlRow(), {
      "aria-expanded": "false",
    });
    return el(
      "div",
      { className: "image-input field", role: "group", "aria-label": title },
      el("span", { className: "label" }, title),
      this.hint && el("span", { className: "hint" }, this.hint),
      el("div", { className: "image-wrap" }, this.#list, this.dropArea),
      el(
        "div",
        { className: "row" },
        onDraw && button("brush", "Draw mask", () => onDraw(this)),
        button("paste", "Paste", () => this.#paste()),
        this.urlButton,
      ),
      this.#buildUrlRow(),
      this.#problem,
    );
  }

  #buildUrlRow() {
    const input = el("input", {
      type: "url",
      id: `${this.#id}-url`,
      placeholder: "https://",
      autocomplete: "off",
      "aria-label": "URL of an image",
    });
    const addEnteredUrl = async () => {
      if (await this.addUrl(input.value)) {
        input.value = "";
        this.#toggleUrlRow(false);
      }
    };
    input.onkeydown = (event) => {
      if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
        event.preventDefault();
        addEnteredUrl();
      }
    };
    this.urlRow = el(
      "div",
      { className: "row url-row", hidden: true },
      input,
      el("button", { type: "button", className: "button", onclick: addEnteredUrl }, "Use"),
    );
    return this.urlRow;
  }

  #toggleUrlRow(isOpen = this.urlRow.hidden) {
    this.urlRow.hidden = !isOpen;
    this.urlButton.setAttribute("aria-expanded", String(isOpen));
    (isOpen ? this.urlRow.querySelector("input") : this.urlButton).focus();
  }

  async #paste() {
    const { file, problem } = await readImageFromClipboard();
    if (file) {
      await this.addFiles([file]);
    } else {
      this.showProblem(problem);
    }
  }
}

function revokePreview({ previewUrl }) {
  if (previewUrl?.startsWith("blob:")) {
    URL.revokeObjectURL(previewUrl);
  }
}
