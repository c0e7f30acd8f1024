/** Jobs that run or have failed: one line each, updated in place. Finished ones vanish. */
import { byId, el } from "./dom.js";
import { icon } from "./icons.js";
import { describeState, formatDuration, progressPercent } from "./job_progress.js";
import { isRunning } from "./jobs.js";

const LOG_LINES_MAX = 50;

export class JobRows {
  #rows = new Map(); // job id → JobRow

  /**
   * @param {import("./jobs.js").Jobs} jobs
   * @param {{onCancel: Function, onReuse: Function, onRetry: Function}} actions each is called with a job
   */
  constructor(jobs, actions) {
    this.jobs = jobs;
    this.actions = actions;
    jobs.addEventListener("change", ({ detail }) => this.#updateJob(detail.job));
    jobs.addEventListener("remove", ({ detail }) =>
      detail.ids.forEach((id) => this.#removeRow(id)),
    );
    byId("clear-jobs").addEventListener("click", () => this.#clearFinished());
    setInterval(() => this.#rows.forEach((row) => row.updateClock()), 1000);
  }

  #updateJob(job) {
    if (job.state === "done") {
      this.#removeRow(job.id); // it is in the history
      return;
    }
    if (!this.#rows.has(job.id)) {
      const row = new JobRow(job, this.actions, () => this.jobs.remove([job.id]));
      this.#rows.set(job.id, row);
      byId("jobs").prepend(row.element);
    }
    const newState = this.#rows.get(job.id).update(job);
    if (newState !== null && (isRunning(job) || job.state === "cancelled")) {
      announce(`${newState}: ${job.prompt || job.model}`);
    }
    this.#renderClear();
  }

  #removeRow(id) {
    const row = this.#rows.get(id);
    const hadFocus = row?.element.contains(document.activeElement);
    row?.element.remove();
    this.#rows.delete(id);
    this.#renderClear();
    if (hadFocus) {
      byId("results").focus({ preventScroll: true });
    }
  }

  get #finished() {
    return [...this.#rows.values()].map(({ job }) => job).filter((job) => !isRunning(job));
  }

  #renderClear() {
    byId("clear-jobs").hidden = this.#finished.length < 2;
  }

  #clearFinished() {
    this.jobs.remove(this.#finished.map(({ id }) => id));
    byId("results").focus({ preventScroll: true });
  }
}

/** Announce a text to screen readers. @param {string} text */
export function announce(text) {
  byId("announcer").textContent = text;
}

class JobRow {
  constructor(job, actions, onDismiss) {
    this.job = job;
    const name = job.prompt || job.model;
    const button = (props, ...content) => el("button", { type: "button", ...props }, ...content);
    this.state = el("span", { className: "job-state" });
    this.clock = el("span", { className: "clock muted small" });
    this.progress = el(
      "div",
      {
        className: "progress",
        role: "progressbar",
        "aria-label": `Progress: ${name}`,
        "aria-valuemin": 0,
        "aria-valuemax": 100,
      },
      el("i"),
    );
    this.log = el("ol", {
      className: "log mono small",
      "aria-label": "Log of the model",
      tabIndex: 0,
      hidden: true,
    });
    this.logToggle = button(
      { className: "button quiet log-toggle", "aria-expanded": "false" },
      "Log",
    );
    this.logToggle.onclick = () => {
      this.log.hidden = !this.log.hidden;
      this.logToggle.setAttribute("aria-expanded", String(!this.log.hidden));
      this.#scrollLog();
    };
    this.info = el("p", { className: "job-info small" });
    this.problem = el("p", { className: "job-problem small", role: "alert", hidden: true });
    this.cancelButton = button(
      {
        className: "button quiet square",
        "aria-label": `Cancel: ${name}`,
        title: "Cancel",
        onclick: () => actions.onCancel(job),
      },
      icon("close"),
    );
    this.retryButton = button(
      { className: "button", onclick: () => actions.onRetry(job) },
      "Retry",
    );
    this.reuseButton = button(
      { className: "button quiet", onclick: () => actions.onReuse(job) },
      "Edit and rerun",
    );
    this.dismissButton = button(
      {
        className: "button quiet square",
        "aria-label": `Dismiss: ${name}`,
        title: "Dismiss",
        onclick: onDismiss,
      },
      icon("close"),
    );
    this.element = el(
      "li",
      { className: "job" },
      el(
        "div",
        { className: "job-line" },
        el("span", { className: "dot", "aria-hidden": "true" }),
        el("span", { className: "job-prompt", dir: "auto", title: `${name}\n${job.model}` }, name),
        this.problem,
        this.state,
        this.clock,
        el(
          "span",
          { className: "job-buttons" },
          this.logToggle,
          this.retryButton,
          this.reuseButton,
          this.cancelButton,
          this.dismissButton,
        ),
      ),
      this.info,
      this.log,
      this.progress,
    );
  }

  /** Render a job. Return its state as a text if that has changed, else null. */
  update(job) {
    this.job = job;
    const state = describeState(job);
    const isChanged = this.state.textContent !== state;
    this.state.textContent = state;
    const runs = isRunning(job);
    this.element.dataset.state = job.state;
    this.progress.hidden = !runs;
    this.cancelButton.hidden = !runs;
    this.cancelButton.disabled = job.isCancelling;
    this.retryButton.hidden = runs;
    this.retryButton.textContent = job.state === "unknown" ? "Send again" : "Retry";
    this.reuseButton.hidden = runs;
    this.dismissButton.hidden = runs;
    setText(this.info, job.warning ?? "");
    this.info.hidden = !job.warning;
    this.#renderProgress(job);
    this.#renderLog(job);
    this.#renderProblem(job);
    this.updateClock();
    return isChanged ? state : null;
  }

  updateClock() {
    const { job } = this;
    setText(this.clock, isRunning(job) ? formatDuration(Date.now() - job.created) : "");
  }

  #renderProgress(job) {
    const percent = job.state === "running" ? progressPercent(job.lines) : null;
    this.progress.classList.toggle("is-indeterminate", percent === null);
    this.progress.style.setProperty("--percent", `${percent ?? 0}%`);
    if (percent === null) {
      this.progress.removeAttribute("aria-valuenow");
    } else {
      this.progress.setAttribute("aria-valuenow", String(percent));
    }
  }

  #renderLog({ lines, problem }) {
    const detail = problem?.detail
      ? [problem.status ? `${problem.detail} (${problem.status})` : problem.detail]
      : [];
    const shown = [...(lines ?? []).slice(-LOG_LINES_MAX), ...detail];
    this.logToggle.hidden = shown.length === 0;
    this.log.hidden ||= shown.length === 0;
    setText(this.logToggle, problem ? "Details" : "Log");
    if (shown.join("\n") !== this.renderedLog) {
      this.renderedLog = shown.join("\n");
      this.log.replaceChildren(...shown.map((line) => el("li", {}, line)));
      this.#scrollLog();
    }
  }

  /** Show the newest lines of a running job, and an error from its beginning. */
  #scrollLog() {
    const count = (this.job.lines ?? []).slice(-LOG_LINES_MAX).length;
    const first = this.job.problem ? this.log.children[count] : null;
    this.log.scrollTop = first ? first.offsetTop - this.log.offsetTop : this.log.scrollHeight;
  }

  #renderProblem({ problem }) {
    if (problem === this.renderedProblem) {
      return;
    }
    this.renderedProblem = problem;
    this.problem.hidden = !problem;
    if (problem) {
      this.problem.replaceChildren(
        `${problem.title}. `,
        el("span", { className: "muted" }, problem.action),
      );
      this.problem.title = `${problem.title}. ${problem.action}`;
    }
  }
}

function setText(element, text) {
  if (element.textContent !== text) {
    element.textContent = text;
  }
}
