/** The history: thumbnails of finished jobs, to show, search and delete. */
import { byId, el } from "./dom.js";
import { icon } from "./icons.js";
import { announce } from "./job_cards.js";
import { defaultThumbnail } from "./media.js";

export class JobHistory {
  #items = new Map(); // job id → see #createItem

  /**
   * @param {import("./jobs.js").Jobs} jobs
   * @param {{onShow: Function}} actions
   */
  constructor(jobs, { onShow }) {
    this.jobs = jobs;
    this.onShow = onShow;
    jobs.addEventListener("change", ({ detail }) => this.#updateJob(detail.job));
    jobs.addEventListener("remove", ({ detail }) => this.#removeItems(detail.ids));
    byId("history-search").addEventListener("input", () => this.#applySearch());
    byId("clear-history").addEventListener("click", () => this.#confirmClear());
    this.#applySearch();
  }

  markCurrent(id) {
    for (const [itemId, { openButton }] of this.#items) {
      openButton.setAttribute("aria-pressed", String(itemId === id));
    }
  }

  #updateJob(job) {
    if (job.state !== "done" || job.images.length === 0) {
      return;
    }
    const known = this.#items.get(job.id);
    if (known === undefined) {
      const item = this.#createItem(job);
      this.#items.set(job.id, item);
      this.#insertByDate(item);
      this.#applySearch();
    } else if (job.thumb !== known.thumb) {
      known.image.src = this.#thumbnailUrl(job, known);
    }
  }

  #createItem(job) {
    const item = { job, thumb: job.thumb, thumbUrl: null };
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
        "aria-pressed": "false",
      },
      item.image,
      el("span", { className: "small" }, name),
    );
    const date = new Date(job.created).toLocaleString([], {
      dateStyle: "medium",
      timeStyle: "short",
    });
    item.openButton.title = `${name}\n${date}`;
    const deleteProps = {
      type: "button",
      className: "button square delete-button",
      "aria-label": `Delete: ${name}`,
      title: "Delete",
      onclick: () => this.#deleteJob(job),
    };
    item.element = el("li", {}, item.openButton, el("button", deleteProps, icon("trash")));
    const options = JSON.stringify(job.options);
    item.searchText = [job.prompt, job.model, job.endpoint, job.seed, options, date]
      .join(" ")
      .toLowerCase();
    return item;
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

  #insertByDate(item) {
    const older = [...this.#items.values()].filter(
      (other) => other !== item && other.job.created < item.job.created,
    );
    older.sort((one, other) => other.job.created - one.job.created);
    byId("thumbnails").insertBefore(item.element, older[0]?.element ?? null);
  }

  #applySearch() {
    const words = byId("history-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const item of this.#items.values()) {
      item.element.hidden = !words.every((word) => item.searchText.includes(word));
      count += item.element.hidden ? 0 : 1;
    }
    const total = this.#items.size;
    byId("history-count").textContent =
      words.length > 0 ? `${count} of ${total}` : total > 0 ? String(total) : "";
    byId("clear-history").hidden = total === 0;
    byId("history-search").disabled = total === 0;
    const empty = byId("history-empty");
    empty.hidden = count > 0;
    empty.textContent =
      total > 0 ? "No results match the search." : "Results are stored in this browser only.";
  }

  async #deleteJob(job) {
    const { element } = this.#items.get(job.id);
    const neighbor = element.nextElementSibling ?? element.previousElementSibling;
    const removed = this.jobs.remove([job.id]);
    // Otherwise the keyboard focus would be lost.
    (neighbor?.querySelector("button") ?? byId("prompt")).focus();
    announce("Deleted from the history.");
    await removed;
  }

  #removeItems(ids) {
    for (const id of ids) {
      const item = this.#items.get(id);
      if (item?.thumbUrl) {
        URL.revokeObjectURL(item.thumbUrl);
      }
      item?.element.remove();
      this.#items.delete(id);
    }
    this.#applySearch();
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
          "The image files are not deleted, only their entries in this browser.",
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
        await this.jobs.remove([...this.#items.keys()]);
        byId("prompt").focus();
      }
    });
    document.body.append(dialog);
    dialog.showModal();
  }
}
