/** The dialog for choosing a model: those of the proxy, all of fal's, or any endpoint id. */
import { describePrice } from "./costs.js";
import { el } from "./dom.js";
import { TASKS } from "./header.js";
import { icon } from "./icons.js";
import { isEndpointId, modelOfEndpoint, searchModels } from "./models.js";
import { readStored, writeStored } from "./stored_values.js";

const SEARCH_DELAY = 250; // ms after the last key
const RECENT_MAX = 4;
const TASK_ICONS = { create: "image", edit: "edit", animate: "film", speak: "sound" };

/**
 * Show the dialog.
 *
 * @param {import("./models.js").Model[]} models those of the proxy's list
 * @param {string} task the current task, which is shown first
 * @returns {Promise<import("./models.js").Model | null>} null: closed without a choice
 */
export function pickModel(models, task) {
  return new Promise((resolve) => new ModelPicker(models, task, resolve));
}

class ModelPicker {
  #models;
  #task;
  #chosen = null;
  #found = [];
  #cursor = null;
  #search = null; // AbortController
  #timer = null;
  #status = "";

  constructor(models, task, onClose) {
    this.#models = models;
    this.#task = task;
    this.input = el("input", {
      type: "search",
      id: "model-search",
      placeholder: "Name or endpoint id",
      autocomplete: "off",
      spellcheck: false,
      "aria-label": "Search models",
      oninput: () => this.#handleInput(),
    });
    this.filters = el("div", { className: "row kinds", role: "group", "aria-label": "Task" });
    this.list = el("div", { className: "model-list" });
    const close = () => this.dialog.close();
    this.dialog = el(
      "dialog",
      { className: "picker", "aria-labelledby": "picker-title" },
      el(
        "div",
        { className: "dialog-head" },
        el("h2", { id: "picker-title" }, "Choose a model"),
        el(
          "button",
          {
            type: "button",
            className: "button quiet square",
            "aria-label": "Close",
            onclick: close,
          },
          icon("close"),
        ),
      ),
      el("div", { className: "picker-search" }, this.input, this.filters),
      this.list,
    );
    this.dialog.addEventListener("keydown", (event) => this.#handleKey(event));
    this.dialog.addEventListener("close", () => {
      clearTimeout(this.#timer);
      this.#search?.abort();
      this.dialog.remove();
      onClose(this.#chosen);
    });
    document.body.append(this.dialog);
    this.dialog.showModal();
    this.input.focus();
    this.#renderFilters();
    this.#handleInput(0);
  }

  get #text() {
    return this.input.value.trim();
  }

  #handleInput(delay = SEARCH_DELAY) {
    clearTimeout(this.#timer);
    this.#search?.abort();
    this.#found = [];
    this.#cursor = null;
    this.#status = "Searching fal's models…";
    this.#render();
    this.#timer = setTimeout(() => this.#findMore(), delay);
  }

  async #findMore() {
    const search = new AbortController();
    this.#search = search;
    try {
      const { signal } = search;
      const { models, nextCursor } = await searchModels(this.#text, {
        cursor: this.#cursor,
        signal,
      });
      this.#found.push(...models);
      this.#cursor = nextCursor;
      this.#status = "";
    } catch {
      if (search.signal.aborted) {
        return;
      }
      this.#status = "fal's list of models cannot be read at the moment.";
    }
    this.#render();
  }

  #renderFilters() {
    const tasks = { "": "All", ...TASKS };
    this.filters.replaceChildren(
      ...Object.entries(tasks).map(([task, label]) =>
        el(
          "button",
          {
            type: "button",
            className: "chip button-chip",
            "aria-pressed": String(task === this.#task),
            onclick: () => {
              this.#task = task;
              this.#renderFilters();
              this.filters.querySelector('[aria-pressed="true"]').focus();
              this.#render();
            },
          },
          label,
        ),
      ),
    );
  }

  #render() {
    const words = this.#text.toLowerCase().split(/\s+/).filter(Boolean);
    const isMatching = (model) => {
      const text =
        `${model.name} ${model.title} ${model.endpoint} ${model.description}`.toLowerCase();
      return (
        (!this.#task || model.task === this.#task) && words.every((word) => text.includes(word))
      );
    };
    const listed = this.#models.filter(isMatching);
    const known = new Set(this.#models.map(({ endpoint }) => endpoint));
    const recent = (readStored("recent") ?? []).filter(isMatching);
    const others = this.#found.filter(
      (model) => !known.has(model.endpoint) && (!this.#task || model.task === this.#task),
    );
    const isShown = [...listed, ...others].some(({ endpoint }) => endpoint === this.#text);
    const isId = isEndpointId(this.#text) && !isShown;
    this.list.replaceChildren(
      ...this.#section("Recent", recent),
      ...this.#section("Models of this proxy", listed),
      ...this.#section("All models of fal", others),
      isId ? this.#entry(this.#modelOf(this.#text), `Use endpoint id ${this.#text}`) : "",
      this.#cursor !== null
        ? el(
            "button",
            { type: "button", className: "button", onclick: () => this.#findMore() },
            "Show more",
          )
        : "",
      el("p", { className: "muted small", role: "status" }, this.#statusText(listed, others, isId)),
    );
  }

  #modelOf(endpoint) {
    const known = [...this.#models, ...this.#found];
    return known.find((model) => model.endpoint === endpoint) ?? modelOfEndpoint(endpoint);
  }

  #statusText(listed, others, isId) {
    const isEmpty = listed.length + others.length === 0 && !isId && this.#cursor === null;
    return (
      this.#status ||
      (isEmpty ? "No model matches. Enter an endpoint id such as fal-ai/flux/dev." : "")
    );
  }

  #section(title, models) {
    return models.length === 0
      ? []
      : [
          el("h3", {}, title),
          el("ul", {}, ...models.map((model) => el("li", {}, this.#entry(model)))),
        ];
  }

  #entry(model, label = model.title) {
    const choose = () => {
      this.#chosen = model;
      const others = (readStored("recent") ?? []).filter(
        ({ endpoint }) => endpoint !== model.endpoint,
      );
      writeStored("recent", [model, ...others].slice(0, RECENT_MAX));
      this.dialog.close();
    };
    const button = el(
      "button",
      { type: "button", className: "model-entry", onclick: choose },
      icon(TASK_ICONS[model.task] ?? "sparkle"),
      el("span", {}, el("b", {}, label), el("span", { className: "small muted" }, model.summary)),
      el(
        "span",
        { className: "small price" },
        typeof model.price === "number" ? describePrice(model) : "",
      ),
    );
    button.value = model.endpoint;
    return button;
  }

  /** The arrow keys move through the list; Enter in the search field chooses the first model. */
  #handleKey(event) {
    const entries = [...this.list.querySelectorAll(".model-entry")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step !== undefined) {
      event.preventDefault();
      const next = entries.indexOf(document.activeElement) + step;
      (next < 0 ? this.input : entries[Math.min(next, entries.length - 1)])?.focus();
    } else if (event.key === "Enter" && event.target === this.input) {
      event.preventDefault();
      const exact = entries.find(({ value }) => value === this.#text);
      (exact ?? entries[0])?.click();
    }
  }
}
