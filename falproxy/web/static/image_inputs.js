/** A place for one picture of the form, or for several: drop, paste, choose, or give an address. */
import { about } from "./proxy_status.js";
import { el, newName, safeUrl } from "./dom.js";
import { icon } from "./icons.js";
import { PictureProblem, examine, load, megabytes } from "./image_files.js";
import { nice } from "./error_messages.js";

const MANY_MAX = 10;

export class Slot {
  #id = newName();
  #items = []; // {file?, url?, shown, says}
  #list = el("ul", { className: "chosen" });
  #problem = el("p", { className: "problem", id: `${this.#id}-problem`, role: "alert" });

  /** @param {{name: string, isMany: boolean, isRequired: boolean}} input */
  constructor({ name, isMany, isRequired }) {
    this.name = name;
    this.isMany = isMany;
    this.isRequired = isRequired;
    this.element = this.#build();
    this.#render();
  }

  /** What was chosen. @returns {import("./image_upload.js").Picture[]} */
  get pictures() {
    return this.#items.map(({ file, url }) => (file ? { file } : { url }));
  }

  get isFull() {
    return this.#items.length >= (this.isMany ? MANY_MAX : 1);
  }

  /** Checks files, and takes those that are pictures. @param {Iterable<Blob>} files */
  async addFiles(files) {
    this.complain("");
    for (const file of [...files].slice(0, this.isMany ? MANY_MAX : 1)) {
      try {
        const { file: checked, width, height } = await examine(file, about.formats);
        const size = width === null ? "" : `${width} × ${height}, `;
        this.#add({
          file: checked,
          shown: URL.createObjectURL(checked),
          says: `${checked.name}, ${size}${megabytes(checked.size)}`,
        });
      } catch (error) {
        const text = error instanceof PictureProblem ? error.message : "This file cannot be read.";
        this.complain(text);
      }
    }
  }

  /** Takes an address, when it is one that fal could read. @param {string} text */
  async addUrl(text) {
    const url = safeUrl(text.trim());
    if (url === null || url.startsWith("blob:")) {
      this.complain("This is no address of a picture. It begins with https://");
      return false;
    }
    this.complain("");
    const item = { url, shown: url, says: url.startsWith("data:") ? "a data URI" : url };
    this.#add(item);
    try {
      const { naturalWidth, naturalHeight } = await load(url);
      item.says = `${naturalWidth} × ${naturalHeight}, ${item.says}`;
    } catch {
      item.says = `Not shown here, fal may read it all the same: ${item.says}`;
    }
    this.#render();
    return true;
  }

  /** Says what is wrong with the choice; an empty text is nothing. @param {string} text */
  complain(text) {
    this.#problem.textContent = text;
    this.element.classList.toggle("is-wrong", text !== "");
  }

  focus() {
    this.element.querySelector("input[type=file]").focus();
  }

  clear() {
    this.#items.splice(0).forEach(release);
    this.#render();
  }

  #add(item) {
    if (!this.isMany) {
      this.#items.splice(0).forEach(release);
    }
    this.#items.push(item);
    this.#render();
  }

  #remove(item) {
    this.#items = this.#items.filter((other) => other !== item);
    release(item);
    this.#render();
    this.focus();
  }

  #render() {
    this.area.hidden = this.isFull; // what is chosen takes its place
    this.#list.replaceChildren(
      ...this.#items.map((item) => {
        const label = `Remove ${item.says}`;
        const remove = {
          type: "button",
          className: "button quiet square",
          "aria-label": label,
          title: "Remove",
          onclick: () => this.#remove(item),
        };
        return el(
          "li",
          {},
          el("img", { src: item.shown, alt: "", width: 56, height: 56 }),
          el("span", { className: "small says" }, item.says),
          el("button", remove, icon("close")),
        );
      }),
    );
    this.element.dispatchEvent(new Event("falproxy:chosen", { bubbles: true }));
  }

  #build() {
    const file = el("input", {
      type: "file",
      id: `${this.#id}-file`,
      className: "file",
      accept: "image/*",
      multiple: this.isMany,
      "aria-describedby": `${this.#id}-problem`,
      onchange: () => {
        this.addFiles(file.files);
        file.value = "";
      },
    });
    const title = nice(this.name) + (this.isRequired ? "" : " (optional)");
    const drop = el(
      "label",
      { className: "drop", for: file.id },
      icon("upload"),
      el(
        "span",
        {},
        el("b", {}, this.isMany ? "Choose pictures" : "Choose a picture"),
        el("span", { className: "muted" }, " or drop it here"),
      ),
    );
    const paste = { type: "button", className: "button quiet", onclick: () => this.#paste() };
    const give = {
      type: "button",
      className: "button quiet",
      "aria-expanded": "false",
      onclick: () => this.#toggleAddress(),
    };
    this.area = el("div", { className: "drop-area" }, file, drop);
    this.giver = el("button", give, icon("link"), "From an address");
    return el(
      "div",
      { className: "slot field", role: "group", "aria-label": title },
      el("span", { className: "label" }, title),
      this.#list,
      this.area,
      el("div", { className: "row" }, el("button", paste, icon("paste"), "Paste"), this.giver),
      this.#addressRow(),
      this.#problem,
    );
  }

  #addressRow() {
    const input = el("input", {
      type: "url",
      id: `${this.#id}-url`,
      placeholder: "https://",
      autocomplete: "off",
      "aria-label": "Address of a picture",
    });
    const take = async () => {
      if (await this.addUrl(input.value)) {
        input.value = "";
        this.#toggleAddress(false);
      }
    };
    input.onkeydown = (event) => {
      if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
        event.preventDefault();
        take();
      }
    };
    this.address = el(
      "div",
      { className: "row address", hidden: true },
      input,
      el("button", { type: "button", className: "button", onclick: take }, "Use"),
    );
    return this.address;
  }

  #toggleAddress(isOpen = this.address.hidden) {
    this.address.hidden = !isOpen;
    this.giver.setAttribute("aria-expanded", String(isOpen));
    (isOpen ? this.address.querySelector("input") : this.giver).focus();
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
      this.complain("There is no picture in the clipboard. Copy one, then paste it here.");
    } catch {
      this.complain(
        "The browser does not let the page look into the clipboard. Press Ctrl + V instead.",
      );
    }
  }
}

function release({ shown }) {
  if (shown.startsWith("blob:")) {
    URL.revokeObjectURL(shown);
  }
}
