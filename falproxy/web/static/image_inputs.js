/**
 * An image input of the form, for one image or several: drop, paste, choose a file, or enter a URL.
 */
import { el, randomId, safeUrl } from "./dom.js";
import { inputLabel } from "./field.js";
import { icon } from "./icons.js";
import { InvalidImageError, checkImageFile, formatFileSize, loadImage } from "./image_files.js";
import { proxyInfo } from "./proxy_status.js";

const IMAGES_MAX = 10; // of an input that accepts several

export class ImageInput {
  #id = randomId();
  #items = []; // {file?, url?, previewUrl, description}
  #list = el("ul", { className: "chosen-images" });
  #problem = el("p", { className: "problem", id: `${this.#id}-problem`, role: "alert" });

  /** @param {{name: string, isMany: boolean, isRequired: boolean}} input */
  constructor({ name, isMany, isRequired }) {
    this.name = name;
    this.isMany = isMany;
    this.isRequired = isRequired;
    this.element = this.#build();
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

  /** Add the valid files. @param {Iterable<Blob>} files */
  async addFiles(files) {
    this.showProblem("");
    for (const file of [...files].slice(0, this.#max)) {
      try {
        const { file: checked, width, height } = await checkImageFile(file, proxyInfo.formats);
        const size = width === null ? "" : `${width} × ${height}, `;
        this.#addItem({
          file: checked,
          previewUrl: URL.createObjectURL(checked),
          description: `${checked.name}, ${size}${formatFileSize(checked.size)}`,
        });
      } catch (error) {
        const text =
          error instanceof InvalidImageError ? error.message : "This file cannot be read.";
        this.showProblem(text);
      }
    }
  }

  /** Add an image by its URL. Return false if fal could not fetch such a URL. @param {string} text */
  async addUrl(text) {
    const url = safeUrl(text.trim());
    if (url === null || url.startsWith("blob:")) {
      this.showProblem("This is not the URL of an image. It must start with https://");
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
    }
    this.#render();
    return true;
  }

  /** Show a problem, or remove it if the text is empty. @param {string} text */
  showProblem(text) {
    this.#problem.textContent = text;
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
  }

  #removeItem(item) {
    this.#items = this.#items.filter((other) => other !== item);
    revokePreview(item);
    this.#render();
    this.focus();
  }

  #render() {
    this.dropArea.hidden = this.isFull; // the chosen image takes its place
    this.#list.replaceChildren(
      ...this.#items.map((item) => {
        const removeProps = {
          type: "button",
          className: "button quiet square",
          "aria-label": `Remove ${item.description}`,
          title: "Remove",
          onclick: () => this.#removeItem(item),
        };
        return el(
          "li",
          {},
          el("img", { src: item.previewUrl, alt: "", width: 56, height: 56 }),
          el("span", { className: "small description" }, item.description),
          el("button", removeProps, icon("close")),
        );
      }),
    );
  }

  #build() {
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
        el("span", { className: "muted" }, " or drop it here"),
      ),
    );
    const pasteProps = { type: "button", className: "button quiet", onclick: () => this.#paste() };
    const urlProps = {
      type: "button",
      className: "button quiet",
      "aria-expanded": "false",
      onclick: () => this.#toggleUrlRow(),
    };
    this.dropArea = el("div", { className: "drop-area" }, fileInput, dropZone);
    this.urlButton = el("button", urlProps, icon("link"), "From a URL");
    return el(
      "div",
      { className: "image-input field", role: "group", "aria-label": title },
      el("span", { className: "label" }, title),
      this.#list,
      this.dropArea,
      el(
        "div",
        { className: "row" },
        el("button", pasteProps, icon("paste"), "Paste"),
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
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((name) => name.startsWith("image/"));
        if (type) {
          await this.addFiles([await item.getType(type)]);
          return;
        }
      }
      this.showProblem("There is no image in the clipboard. Copy one, then paste it here.");
    } catch {
      this.showProblem(
        "The browser does not allow the page to read the clipboard. Press Ctrl + V instead.",
      );
    }
  }
}

function revokePreview({ previewUrl }) {
  if (previewUrl.startsWith("blob:")) {
    URL.revokeObjectURL(previewUrl);
  }
}
