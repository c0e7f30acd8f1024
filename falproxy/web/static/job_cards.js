/** Cards of the jobs that run or have failed, updated in place. */
import { byId, el } from "./dom.js";
import { icon } from "./icons.js";
import { describeState, formatDuration, progressPercent } from "./job_progress.js";
import { isRunning } from "./jobs.js";

const LOG_LINES_MAX = 50;

export class JobCards {
  #cards = new Map(); // job id → JobCard

  /**
   * @param {import("./jobs.js").Jobs} jobs
   * @param {{onCancel: Function, onReuse: Function, onShow: Function}} actions each is called with a job
   */
  constructor(jobs, actions) {
    this.jobs = jobs;
    this.actions = actions;
    jobs.addEventListener("change", ({ detail }) => this.#updateJob(detail.job));
    jobs.addEventListener("remove", ({ detail }) =>
      detail.ids.forEach((id) => this.#removeCard(id)),
    );
    setInterval(() => this.#updateClocks(), 1000);
  }

  #updateJob(job) {
    if (!this.#cards.has(job.id)) {
      if (job.state === "done") {
        return; // it is in the history
      }
      const card = new JobCard(job, this.actions, () =>
        job.state === "done" ? this.#removeCard(job.id) : this.jobs.remove([job.id]),
      );
      this.#cards.set(job.id, card);
      byId("jobs").prepend(card.element);
      byId("jobs-section").hidden = false;
    }
    const card = this.#cards.get(job.id);
    const newState = card.update(job);
    if (newState !== null && (isRunning(job) || job.state === "cancelled")) {
      announce(`${newState}: ${job.prompt || job.model}`);
    }
  }

  /** Remove the cards of finished jobs. Not done when a job finishes, to avoid a layout shift. */
  removeFinished() {
    for (const [id, { job }] of this.#cards) {
      if (job.state === "done") {
        this.#removeCard(id);
      }
    }
  }

  #removeCard(id) {
    const card = this.#cards.get(id);
    const hadFocus = card?.element.contains(document.activeElement);
    card?.element.remove();
    this.#cards.delete(id);
    byId("jobs-section").hidden = this.#cards.size === 0;
    if (hadFocus) {
      byId("results").focus();
    }
  }

  #updateClocks() {
    this.#cards.forEach((card) => card.updateClock());
  }
}

/** Announce a text to screen readers. @param {string} text */
export function announce(text) {
  byId("announcer").textContent = text;
}

class JobCard {
  constructor(job, actions, onDismiss) {
    this.job = job;
    this.state = el("strong", { className: "job-state" });
    this.clock = el("span", { className: "clock muted mono" });
    this.progress = el(
      "div",
      {
        className: "progress",
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
    this.info = el("p", { className: "job-info small muted" });
    this.problem = el("div", { className: "notice bad", role: "alert", hidden: true });
    const name = job.prompt || job.model;
    this.cancelButton = el(
      "button",
      {
        type: "button",
        className: "button",
        "aria-label": `Cancel: ${name}`,
        onclick: () => actions.onCancel(job),
      },
      "Cancel",
    );
    this.reuseButton = el(
      "button",
      { type: "button", className: "button", onclick: () => actions.onReuse(job) },
      icon("reuse"),
      "Use again",
    );
    this.showButton = el(
      "button",
      {
        type: "button",
        className: "button",
        "aria-label": `Show: ${name}`,
        onclick: () => actions.onShow(job),
      },
      "Show",
    );
    this.dismissButton = el(
      "button",
      {
        type: "button",
        className: "button quiet square",
        "aria-label": `Dismiss: ${name}`,
        title: "Dismiss",
        onclick: onDismiss,
      },
      icon("close"),
    );
    this.element = el(
      "li",
      { className: "card job" },
      el(
        "div",
        { className: "job-head" },
        this.state,
        this.clock,
        el(
          "div",
          { className: "row" },
          this.cancelButton,
          this.showButton,
          this.reuseButton,
          this.dismissButton,
        ),
      ),
      el("p", { className: "job-prompt" }, job.prompt || "No prompt"),
      this.info,
      this.progress,
      this.problem,
      this.log,
    );
  }

  /** Render a job. Return its state as a text if that has changed, else null. */
  update(job) {
    this.job = job;
    const state = describeState(job);
    const isChanged = this.state.textContent !== state;
    this.state.textContent = state;
    const runs = isRunning(job);
    const isDone = job.state === "done";
    this.element.dataset.state = job.state;
    this.progress.hidden = !runs && !isDone;
    this.cancelButton.hidden = !runs;
    this.cancelButton.disabled = job.isCancelling;
    this.showButton.hidden = !isDone;
    this.reuseButton.hidden = runs || isDone;
    this.dismissButton.hidden = runs;
    setText(this.info, job.warning ?? job.model);
    this.info.classList.toggle("is-warning", Boolean(job.warning));
    this.#renderProgress(job);
    this.#renderLog(job);
    this.#renderProblem(job);
    this.updateClock();
    return isChanged ? state : null;
  }

  updateClock() {
    const { job } = this;
    const end = isRunning(job) ? Date.now() : (job.ended ?? job.created);
    setText(this.clock, formatDuration(end - job.created));
  }

  #renderProgress(job) {
    const percent =
      job.state === "done" ? 100 : job.state === "running" ? progressPercent(job.lines) : null;
    this.progress.classList.toggle("is-indeterminate", percent === null);
    this.progress.style.setProperty("--percent", `${percent ?? 0}%`);
    if (percent === null) {
      this.progress.removeAttribute("aria-valuenow");
    } else {
      this.progress.setAttribute("aria-valuenow", String(percent));
    }
  }

  #renderLog(job) {
    const isDone = job.state === "done";
    this.log.hidden = !isRunning(job) && !isDone;
    const placeholder = isDone ? "The model has logged nothing." : "No log lines yet.";
    const lines = job.lines?.length > 0 ? job.lines.slice(-LOG_LINES_MAX) : [placeholder];
    if (lines.join("\n") !== this.renderedLog) {
      this.renderedLog = lines.join("\n");
      this.log.replaceChildren(...lines.map((line) => el("li", {}, line)));
      this.log.scrollTop = this.log.scrollHeight;
    }
  }

  #renderProblem({ problem }) {
    if (problem === this.renderedProblem) {
      return;
    }
    this.renderedProblem = problem;
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
