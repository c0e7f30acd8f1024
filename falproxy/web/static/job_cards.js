/** Jobs that run, and those that did not work out: one card each, changed in place. */
import { el, find } from "./dom.js";
import { icon } from "./icons.js";
import { isRunning } from "./jobs.js";
import { duration, percentOf, phaseOf } from "./job_progress.js";

const LINES = 50; // of the log that are shown, the last few of them without scrolling

export class Cards {
  #cards = new Map();

  /**
   * @param {import("./jobs.js").Jobs} jobs
   * @param {{onCancel: Function, onReuse: Function, onShow: Function}} actions each is called with a job
   */
  constructor(jobs, actions) {
    this.jobs = jobs;
    this.actions = actions;
    jobs.addEventListener("change", ({ detail }) => this.#update(detail.job));
    jobs.addEventListener("remove", ({ detail }) => detail.ids.forEach((id) => this.#drop(id)));
    setInterval(() => this.#tick(), 1000);
  }

  #update(job) {
    if (!this.#cards.has(job.id)) {
      if (job.state === "done") {
        return; // it is in the history
      }
      const card = new Card(job, this.actions, () =>
        job.state === "done" ? this.#drop(job.id) : this.jobs.remove([job.id]),
      );
      this.#cards.set(job.id, card);
      find("jobs").prepend(card.element);
      find("jobs-section").hidden = false;
    }
    const card = this.#cards.get(job.id);
    const phase = card.update(job);
    if (phase !== null && (isRunning(job) || job.state === "cancelled")) {
      announce(`${phase}: ${job.prompt || job.model}`);
    }
  }

  /** Takes away the cards of jobs that are done. They stay until then, so that nothing below them
   *  moves by itself. */
  tidy() {
    for (const [id, { job }] of this.#cards) {
      if (job.state === "done") {
        this.#drop(id);
      }
    }
  }

  #drop(id) {
    const card = this.#cards.get(id);
    const hadFocus = card?.element.contains(document.activeElement);
    card?.element.remove();
    this.#cards.delete(id);
    find("jobs-section").hidden = this.#cards.size === 0;
    if (hadFocus) {
      find("results").focus();
    }
  }

  #tick() {
    this.#cards.forEach((card) => card.tick());
  }
}

/** Says something to those who listen instead of look. @param {string} text */
export function announce(text) {
  find("announcer").textContent = text;
}

class Card {
  constructor(job, actions, dismiss) {
    this.job = job;
    this.phase = el("strong", { className: "phase" });
    this.clock = el("span", { className: "clock muted mono" });
    this.bar = el(
      "div",
      {
        className: "bar",
        role: "progressbar",
        "aria-label": `Progress: ${job.prompt || job.model}`,
        "aria-valuemin": 0,
        "aria-valuemax": 100,
      },
      el("i"),
    );
    this.log = el("ol", {
      className: "log mono small",
      "aria-label": "Log of the model",
      tabIndex: 0,
    });
    this.says = el("p", { className: "says small muted" });
    this.problem = el("div", { className: "notice bad", role: "alert", hidden: true });
    const name = job.prompt || job.model;
    this.cancel = el(
      "button",
      {
        type: "button",
        className: "button",
        "aria-label": `Cancel: ${name}`,
        onclick: () => actions.onCancel(job),
      },
      "Cancel",
    );
    this.again = el(
      "button",
      { type: "button", className: "button", onclick: () => actions.onReuse(job) },
      icon("reuse"),
      "Use again",
    );
    this.look = el(
      "button",
      {
        type: "button",
        className: "button",
        "aria-label": `Show: ${name}`,
        onclick: () => actions.onShow(job),
      },
      "Show",
    );
    this.dismiss = el(
      "button",
      {
        type: "button",
        className: "button quiet square",
        "aria-label": `Dismiss: ${name}`,
        title: "Dismiss",
        onclick: dismiss,
      },
      icon("close"),
    );
    this.element = el(
      "li",
      { className: "card job" },
      el(
        "div",
        { className: "job-head" },
        this.phase,
        this.clock,
        el("div", { className: "row" }, this.cancel, this.look, this.again, this.dismiss),
      ),
      el("p", { className: "job-prompt" }, job.prompt || "No prompt"),
      this.says,
      this.bar,
      this.problem,
      this.log,
    );
  }

  /** Shows a job as it is now. Returns what it does, if that has changed. */
  update(job) {
    this.job = job;
    const phase = phaseOf(job);
    const isChanged = this.phase.textContent !== phase;
    this.phase.textContent = phase;
    const runs = isRunning(job);
    const isDone = job.state === "done";
    this.element.dataset.state = job.state;
    this.bar.hidden = !runs && !isDone;
    this.cancel.hidden = !runs;
    this.cancel.disabled = job.isCancelling;
    this.look.hidden = !isDone;
    this.again.hidden = runs || isDone;
    this.dismiss.hidden = runs;
    setText(this.says, job.trouble ?? job.model);
    this.says.classList.toggle("is-trouble", Boolean(job.trouble));
    this.#showProgress(job);
    this.#showLog(job);
    this.#showProblem(job);
    this.tick();
    return isChanged ? phase : null;
  }

  tick() {
    const { job } = this;
    setText(
      this.clock,
      duration((isRunning(job) ? Date.now() : (job.ended ?? job.created)) - job.created),
    );
  }

  #showProgress(job) {
    const percent =
      job.state === "done" ? 100 : job.state === "running" ? percentOf(job.lines) : null;
    this.bar.classList.toggle("is-open", percent === null);
    this.bar.style.setProperty("--done", `${percent ?? 0}%`);
    if (percent === null) {
      this.bar.removeAttribute("aria-valuenow");
    } else {
      this.bar.setAttribute("aria-valuenow", String(percent));
    }
  }

  #showLog(job) {
    const isDone = job.state === "done";
    this.log.hidden = !isRunning(job) && !isDone;
    const none = isDone ? "The model has said nothing." : "The model has said nothing yet.";
    const lines = job.lines?.length > 0 ? job.lines.slice(-LINES) : [none];
    if (lines.join("\n") !== this.shownLines) {
      this.shownLines = lines.join("\n");
      this.log.replaceChildren(...lines.map((line) => el("li", {}, line)));
      this.log.scrollTop = this.log.scrollHeight;
    }
  }

  #showProblem({ problem }) {
    if (problem === this.shownProblem) {
      return;
    }
    this.shownProblem = problem;
    this.problem.hidden = !problem;
    if (problem) {
      const detail =
        problem.detail &&
        el(
          "p",
          { className: "small" },
          problem.status ? `${problem.detail} (${problem.status})` : problem.detail,
        );
      this.problem.replaceChildren(
        el("p", {}, el("strong", {}, `${problem.title}. `), problem.action),
        detail || "",
      );
    }
  }
}

function setText(element, text) {
  if (element.textContent !== text) {
    element.textContent = text;
  }
}
