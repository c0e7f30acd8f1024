/** One result, large: its pictures, before and after, and what is known of it. */
import { about } from "./proxy_status.js";
import { asInput, copy, download } from "./image_actions.js";
import { announce } from "./job_cards.js";
import { compare } from "./before_after_slider.js";
import { el, find, safeUrl } from "./dom.js";
import { icon } from "./icons.js";
import { costOf } from "./costs.js";
import { duration } from "./job_progress.js";
import { nice } from "./error_messages.js";

export class Stage {
  #job = null;
  #index = 0;
  #isCompared = true;
  #before = null;

  /** @param {{onInput: Function, onReuse: Function}} actions */
  constructor(actions) {
    this.actions = actions;
  }

  /** @returns {string | null} the id of the job that is shown */
  get shownId() {
    return this.#job?.id ?? null;
  }

  /** @param {import("./jobs.js").Job} job */
  show(job, index = 0) {
    if (this.#before?.startsWith("blob:")) {
      URL.revokeObjectURL(this.#before);
    }
    this.#job = job;
    this.#index = index;
    this.#before =
      job.before instanceof Blob ? URL.createObjectURL(job.before) : safeUrl(job.before);
    this.#render();
  }

  clear() {
    this.#job = null;
    find("shown").hidden = true;
    find("welcome").hidden = false;
  }

  #render() {
    find("welcome").hidden = true;
    find("shown").hidden = false;
    find("shown").replaceChildren(this.#picture(), this.#toolbar(), this.#grid(), this.#facts());
  }

  get #image() {
    return this.#job.images[this.#index];
  }

  get #alt() {
    const { prompt, model, images } = this.#job;
    const which = images.length > 1 ? `Picture ${this.#index + 1} of ${images.length}: ` : "";
    return which + (prompt || `made by ${model}`);
  }

  #picture() {
    const { url, width, height } = this.#image;
    const image = el("img", {
      className: "after",
      src: url,
      alt: this.#alt,
      width: width ?? 1024,
      height: height ?? 768,
      draggable: false,
    });
    const frame =
      this.#before !== null && this.#isCompared
        ? compare(this.#before, image)
        : el("div", { className: "plain" }, image);
    // The place is there before the picture is: nothing jumps.
    frame.style.setProperty("--shape", `${width ?? 4} / ${height ?? 3}`);
    frame.style.setProperty("--ratio", String((width ?? 4) / (height ?? 3)));
    image.addEventListener("error", () => frame.replaceWith(this.#gone()));
    return frame;
  }

  #gone() {
    const thumb =
      this.#job.thumb instanceof Blob
        ? el("img", { src: URL.createObjectURL(this.#job.thumb), alt: this.#alt })
        : null;
    const text =
      "The picture is not at its address any more, or cannot be reached just now. " +
      "fal deletes its files after a while; the proxy can keep them.";
    return el("div", { className: "gone" }, thumb, el("p", { className: "notice warn" }, text));
  }

  #toolbar() {
    const button = (name, text, onclick, props = {}) =>
      el("button", { type: "button", className: "button", onclick, ...props }, icon(name), text);
    const toggle = () => {
      this.#isCompared = !this.#isCompared;
      this.#render();
      find("shown").querySelector("[aria-pressed]").focus();
    };
    return el(
      "div",
      { className: "row tools", role: "group", "aria-label": "This picture" },
      this.#before !== null &&
        button("compare", "Compare", toggle, { "aria-pressed": String(this.#isCompared) }),
      button("zoom", "Zoom", () => this.#zoom()),
      button("download", "Download", () => download(this.#job, this.#index)),
      button("link", "Copy URL", (event) => this.#copy(event.currentTarget)),
      button("edit", "Use as input", async () =>
        this.actions.onInput(await asInput(this.#job, this.#index)),
      ),
      button("reuse", "Use settings", () => this.actions.onReuse(this.#job)),
    );
  }

  async #zoom() {
    const { zoom } = await import("./zoom_dialog.js");
    zoom(this.#image.url, this.#alt);
  }

  async #copy(button) {
    const isCopied = await copy(this.#image.url);
    const text = isCopied ? "Copied" : "Not copied";
    button.lastChild.textContent = text;
    announce(
      isCopied
        ? "The address is in the clipboard."
        : "The browser does not let the page use the clipboard.",
    );
    setTimeout(() => (button.lastChild.textContent = "Copy URL"), 2500);
  }

  /** All pictures of the result, when there are several. */
  #grid() {
    const { images } = this.#job;
    if (images.length < 2) {
      return "";
    }
    const choose = (index) => {
      this.#index = index;
      this.#render();
      find("shown").querySelectorAll(".grid button")[index].focus();
    };
    return el(
      "ul",
      { className: "grid", "aria-label": "All pictures of this result" },
      ...images.map(({ url }, index) => {
        const props = {
          type: "button",
          onclick: () => choose(index),
          "aria-pressed": String(index === this.#index),
          "aria-label": `Picture ${index + 1} of ${images.length}`,
        };
        return el("li", {}, el("button", props, el("img", { src: url, alt: "", loading: "lazy" })));
      }),
    );
  }

  #facts() {
    const job = this.#job;
    const { width, height } = this.#image;
    const cost = costOf(job, about.isSandbox);
    const facts = [
      ["Model", job.model],
      ["Seed", job.seed === null ? "not told" : String(job.seed)],
      ["Size", width && height ? `${width} × ${height}` : "not told"],
      ["Time", duration((job.ended ?? job.created) - job.created)],
      ...Object.entries(job.options)
        .filter(([name]) => name !== "seed")
        .map(([name, value]) => [nice(name), shown(value)]),
    ];
    return el(
      "div",
      { className: "facts" },
      el("p", { className: "shown-prompt" }, job.prompt || "No prompt"),
      el(
        "p",
        { className: "row" },
        el("span", { className: cost.isGood ? "chip good" : "chip" }, cost.text),
        job.isHidden &&
          el("span", { className: "chip warn" }, "The safety checker has hidden a picture"),
      ),
      el(
        "dl",
        {},
        ...facts.map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, text))),
      ),
    );
  }
}

function shown(value) {
  if (Array.isArray(value)) {
    return value.map(({ path, scale }) => `${path} at ${scale}`).join(", ");
  }
  if (typeof value === "object" && value !== null) {
    return `${value.width} × ${value.height}`;
  }
  return typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
}
