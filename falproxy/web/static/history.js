/** The history: thumbnails of finished jobs, to show, search, filter, delete, export and import. */
import { byId, el } from "./dom.js";
import { icon } from "./icons.js";
import { announce } from "./job_rows.js";
import { defaultThumbnail } from "./media.js";
import { showToast } from "./toast.js";

const PAGE_SIZE = 48; // thumbnails that are shown at once
const KINDS = { "": "All", image: "Images", video: "Video", audio: "Audio" };

export class JobHistory {
  #items = new Map(); // job id → {job, searchText, element?, ...}
  #shownCount = PAGE_SIZE;
  #kind = "";
  #currentId = null;
  #isScheduled = false;

  /**
   * @param {import("./jobs.js").Jobs} jobs
   * @param {{onShow: Function}} actions
   */
  constructor(jobs, { onShow }) {
    this.jobs = jobs;
    this.onShow = onShow;
    jobs.addEventListener("change", ({ detail }) => this.#updateJob(detail.job));
    jobs.addEventListener("remove", ({ detail }) => this.#removeItems(detail.ids));
    byId("history-search").addEventListener("input", () => this.#restart());
    byId("more-history").addEventListener("click", () => {
      this.#shownCount += PAGE_SIZE;
      this.#render();
    });
    byId("history-menu").querySelector("summary").append(icon("more"));
    byId("clear-history").addEventListener("click", () => this.#confirmClear());
    byId("export-history").addEventListener("click", () => this.#export());
    byId("import-history").addEventListener("click", () => this.#import());
    this.#renderKinds();
    this.#render();
  }

  markCurrent(id) {
    this.#currentId = id;
    for (const { job, openButton } of this.#items.values()) {
      openButton?.setAttribute("aria-pressed", String(job.id === id));
    }
  }

  #updateJob(job) {
    if (job.state !== "done" || job.images.length === 0) {
      return;
    }
    const known = this.#items.get(job.id);
    if (known === undefined) {
      this.#items.set(job.id, { job, thumb: null, thumbUrl: null, searchText: searchTextOf(job) });
      this.#schedule();
    } else if (known.element && job.thumb !== known.thumb) {
      known.image.src = this.#thumbnailUrl(job, known);
    }
  }

  /** Render once after many changes. */
  #schedule() {
    if (!this.#isScheduled) {
      this.#isScheduled = true;
      queueMicrotask(() => {
        this.#isScheduled = false;
        this.#render();
      });
    }
  }

  #restart() {
    this.#shownCount = PAGE_SIZE;
    this.#render();
  }

  /** Show the newest items that match. Elements that are shown already are kept. */
  #render() {
    const words = byId("history-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = [...this.#items.values()]
      .filter(({ job, searchText }) => {
        const kind = job.images[0].kind ?? "image";
        return (
          (!this.#kind || kind === this.#kind) && words.every((word) => searchText.includes(word))
        );
      })
      .sort((one, other) => other.job.created - one.job.created);
    const shown = matching.slice(0, this.#shownCount);
    const list = byId("thumbnails");
    shown.forEach((item, position) => {
      item.element ??= this.#createElement(item);
      if (list.children[position] !== item.element) {
        list.insertBefore(item.element, list.children[position] ?? null);
      }
    });
    while (list.children.length > shown.length) {
      list.lastChild.remove();
    }
    const total = this.#items.size;
    const isFiltered = words.length > 0 || this.#kind !== "";
    byId("history-count").textContent = isFiltered
      ? `${matching.length} of ${total}`
      : total > 0
        ? String(total)
        : "";
    byId("more-history").hidden = matching.length <= shown.length;
    for (const name of ["clear-history", "export-history"]) {
      byId(name).hidden = total === 0;
    }
    byId("history-search").disabled = total === 0;
    byId("history-kinds").hidden = total === 0;
    byId("history-empty").hidden = matching.length > 0;
    byId("history-empty").textContent =
      total > 0 ? "No results match the search." : "Results are stored in this browser only.";
  }

  #renderKinds() {
    byId("history-kinds").replaceChildren(
      ...Object.entries(KINDS).map(([kind, label]) => {
        const onclick = () => {
          this.#kind = kind;
          for (const button of byId("history-kinds").children) {
            button.setAttribute("aria-pressed", String(button.value === kind));
          }
          this.#restart();
        };
        const props = { type: "button", className: "chip button-chip", value: kind, onclick };
        return el("button", { ...props, "aria-pressed": String(kind === this.#kind) }, label);
      }),
    );
  }

  #createElement(item) {
    const { job } = item;
    const name = job.prompt || job.model;
    item.image = el("img", {
      alt: "",
      width: 160,
      height: 160,
      loading: "lazy",
      decoding: "async",
    });
    item.image.src = this.#thumbnailUrl(job, item);
    item.image.onerror = () => item.image.classList.add("is-unavailable");
    item.openButton = el(
      "button",
      {
        type: "button",
        className: "open-button",
        onclick: () => this.onShow(job),
        "aria-pressed": String(job.id === this.#currentId),
        title: `${name}\n${job.model}\n${dateOf(job)}`,
      },
      item.image,
      job.images.length > 1 &&
        el("span", { className: "count-badge", "aria-hidden": "true" }, `${job.images.length}`),
      el("span", { className: "small tile-name", dir: "auto" }, name),
      el("span", { className: "muted tile-fact" }, `${shortDateOf(job)} · ${job.model}`),
    );
    const deleteProps = {
      type: "button",
      className: "button square delete-button",
      "aria-label": `Delete: ${name}`,
      title: "Delete",
      onclick: () => this.#deleteJob(job),
    };
    return el("li", {}, item.openButton, el("button", deleteProps, icon("trash")));
  }

  #thumbnailUrl(job, item) {
    if (item.thumbUrl !== null) {
      URL.revokeObjectURL(item.thumbUrl);
      item.thumbUrl = null;
    }
    item.thumb = job.thumb;
    if (job.thumb instanceof Blob) {
      item.thumbUrl = URL.createObjectURL(job.thumb);
      return item.thumbUrl;
    }
    return defaultThumbnail(job.images[0]);
  }

  async #deleteJob(job) {
    const { element } = this.#items.get(job.id);
    const neighbor = element.nextElementSibling ?? element.previousElementSibling;
    // Otherwise the keyboard focus would be lost.
    (neighbor?.querySelector("button") ?? byId("prompt")).focus();
    await this.#removeWithUndo([job], "Deleted from the history.");
  }

  async #removeWithUndo(removed, text) {
    announce(text);
    showToast(text, { label: "Undo", onclick: () => this.jobs.restore(removed) });
    await this.jobs.remove(removed.map(({ id }) => id));
  }

  #removeItems(ids) {
    for (const id of ids) {
      const item = this.#items.get(id);
      if (item?.thumbUrl) {
        URL.revokeObjectURL(item.thumbUrl);
      }
      item?.element?.remove();
      this.#items.delete(id);
    }
    this.#render();
  }

  async #export() {
    const { exportJobs } = await import("./history_file.js");
    await exportJobs([...this.#items.values()].map(({ job }) => job));
  }

  async #import() {
    const { chooseAndReadJobs } = await import("./history_file.js");
    const { jobs, problem } = await chooseAndReadJobs();
    if (problem) {
      showToast(problem);
      return;
    }
    const added = jobs.filter(({ id }) => this.jobs.get(id) === undefined);
    await this.jobs.restore(added);
    const others = added.length < jobs.length ? ": the others are here already" : "";
    showToast(`Imported ${added.length} of ${jobs.length} results${others}.`);
  }

  #confirmClear() {
    const count = this.#items.size;
    const subject = count === 1 ? "the result" : `all ${count} results`;
    const dialog = el(
      "dialog",
      { "aria-labelledby": "clear-title" },
      el(
        "form",
        { method: "dialog" },
        el("h2", { id: "clear-title" }, `Delete ${subject} from the history?`),
        el(
          "p",
          { className: "muted" },
          "The files are not deleted, only their entries in this browser.",
        ),
        el(
          "div",
          { className: "row end" },
          el("button", { className: "button quiet", value: "" }, "Keep"),
          el("button", { className: "button danger", value: "delete" }, "Delete"),
        ),
      ),
    );
    dialog.addEventListener("close", async () => {
      dialog.remove();
      if (dialog.returnValue === "delete") {
        const removed = [...this.#items.values()].map(({ job }) => job);
        await this.#removeWithUndo(
          removed,
          `Deleted ${count === 1 ? "one result" : `${count} results`}.`,
        );
        byId("prompt").focus();
      }
    });
    document.body.append(dialog);
    dialog.showModal();
  }
}

function dateOf({ created }) {
  return new Date(created).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

/** The time of a job of today, otherwise the day. */
function shortDateOf({ created }) {
  const date = new Date(created);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday
    ? date.toLocaleTimeString([], { timeStyle: "short" })
    : date.toLocaleDateString([], { day: "numeric", month: "short", year: "2-digit" });
}

function searchTextOf(job) {
  const options = JSON.stringify(job.options);
  return [job.prompt, job.model, job.endpoint, job.seed, options, dateOf(job)]
    .join(" ")
    .toLowerCase();
}
