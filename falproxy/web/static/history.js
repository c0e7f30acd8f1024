/** What was made before: thumbnails to look at again, to search, to delete. */
import { announce } from "./job_cards.js";
import { el, find } from "./dom.js";
import { icon } from "./icons.js";

export class History {
  #items = new Map(); // id → {element, job, thumb}

  /**
   * @param {import("./jobs.js").Jobs} jobs
   * @param {{onShow: Function}} actions
   */
  constructor(jobs, { onShow }) {
    this.jobs = jobs;
    this.onShow = onShow;
    jobs.addEventListener("change", ({ detail }) => this.#update(detail.job));
    jobs.addEventListener("remove", ({ detail }) => this.#drop(detail.ids));
    find("search").addEventListener("input", () => this.#filter());
    find("clear").addEventListener("click", () => this.#askToClear());
    this.#filter();
  }

  /** Marks the one that is shown. @param {string | null} id */
  mark(id) {
    for (const [one, { open }] of this.#items) {
      open.setAttribute("aria-pressed", String(one === id));
    }
  }

  #update(job) {
    if (job.state !== "done" || job.images.length === 0) {
      return;
    }
    const known = this.#items.get(job.id);
    if (known === undefined) {
      const item = this.#make(job);
      this.#items.set(job.id, item);
      this.#place(item);
      this.#filter();
    } else if (job.thumb !== known.thumb) {
      known.image.src = this.#source(job, known);
    }
  }

  #make(job) {
    const item = { job, thumb: job.thumb, url: null };
    const name = job.prompt || job.model;
    item.image = el("img", {
      alt: "",
      width: 160,
      height: 160,
      loading: "lazy",
      decoding: "async",
    });
    item.image.src = this.#source(job, item);
    item.image.onerror = () => item.image.classList.add("is-gone");
    item.open = el(
      "button",
      {
        type: "button",
        className: "open",
        onclick: () => this.onShow(job),
        "aria-pressed": "false",
      },
      item.image,
      el("span", { className: "small" }, name),
    );
    const when = new Date(job.created).toLocaleString([], {
      dateStyle: "medium",
      timeStyle: "short",
    });
    item.open.title = `${name}\n${when}`;
    const remove = {
      type: "button",
      className: "button square remove",
      "aria-label": `Delete: ${name}`,
      title: "Delete",
      onclick: () => this.#delete(job),
    };
    item.element = el("li", {}, item.open, el("button", remove, icon("trash")));
    item.words = [job.prompt, job.model, job.endpoint, job.seed, JSON.stringify(job.options), when]
      .join(" ")
      .toLowerCase();
    return item;
  }

  #source(job, item) {
    if (item.url !== null) {
      URL.revokeObjectURL(item.url);
      item.url = null;
    }
    item.thumb = job.thumb;
    if (job.thumb instanceof Blob) {
      item.url = URL.createObjectURL(job.thumb);
      return item.url;
    }
    return job.images[0].url;
  }

  /** The newest comes first. */
  #place(item) {
    const later = [...this.#items.values()].filter(
      (other) => other !== item && other.job.created < item.job.created,
    );
    later.sort((one, other) => other.job.created - one.job.created);
    find("thumbs").insertBefore(item.element, later[0]?.element ?? null);
  }

  #filter() {
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const item of this.#items.values()) {
      item.element.hidden = !words.every((word) => item.words.includes(word));
      count += item.element.hidden ? 0 : 1;
    }
    const all = this.#items.size;
    find("history-count").textContent =
      words.length > 0 ? `${count} of ${all}` : all > 0 ? String(all) : "";
    find("clear").hidden = all === 0;
    find("search").disabled = all === 0;
    const empty = find("history-empty");
    empty.hidden = count > 0;
    empty.textContent =
      all > 0
        ? "Nothing in the history has these words."
        : "What you make is kept in this browser, and only here.";
  }

  async #delete(job) {
    const { element } = this.#items.get(job.id);
    const next = element.nextElementSibling ?? element.previousElementSibling;
    const removed = this.jobs.remove([job.id]);
    (next?.querySelector("button") ?? find("prompt")).focus(); // nobody is left without a place
    announce("Deleted from the history.");
    await removed;
  }

  #drop(ids) {
    for (const id of ids) {
      const item = this.#items.get(id);
      if (item?.url) {
        URL.revokeObjectURL(item.url);
      }
      item?.element.remove();
      this.#items.delete(id);
    }
    this.#filter();
  }

  #askToClear() {
    const count = this.#items.size;
    const what = count === 1 ? "the picture" : `all ${count} results`;
    const dialog = el(
      "dialog",
      { "aria-labelledby": "clear-title" },
      el(
        "form",
        { method: "dialog" },
        el("h2", { id: "clear-title" }, `Delete ${what} from the history?`),
        el(
          "p",
          { className: "muted" },
          "The pictures themselves stay where they are; this browser forgets them.",
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
        find("prompt").focus();
      }
    });
    document.body.append(dialog);
    dialog.showModal();
  }
}
