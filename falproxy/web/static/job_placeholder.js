/** The stage while the first job runs: a frame in the final ratio with progress and the last log line. */
import { el } from "./dom.js";
import { describeState, progressPercent } from "./job_progress.js";
import { ratioOf } from "./special_controls.js";

/** @param {import("./jobs.js").Job} job */
export function createPlaceholder(job) {
  const state = el("p", { className: "lead" });
  const line = el("p", { className: "muted small placeholder-line" });
  const bar = el("div", { className: "progress is-indeterminate", "aria-hidden": "true" }, el("i"));
  const frame = el("div", { className: "placeholder" }, state, bar, line);
  frame.style.setProperty("--ratio", String(expectedRatio(job)));
  return {
    id: job.id,
    created: job.created,
    element: el("div", { className: "stage" }, frame),
    update(changed) {
      const percent = changed.state === "running" ? progressPercent(changed.lines) : null;
      state.textContent = describeState(changed);
      line.textContent = changed.warning ?? changed.lines?.at(-1) ?? changed.prompt.slice(0, 120);
      bar.classList.toggle("is-indeterminate", percent === null);
      bar.style.setProperty("--percent", `${percent ?? 0}%`);
    },
  };
}

function expectedRatio({ options }) {
  const { image_size: size, aspect_ratio: aspect } = options;
  if (size?.width && size?.height) {
    return size.width / size.height;
  }
  const [width, height] = ratioOf(String(size ?? aspect ?? "")) ?? [4, 3];
  return width / height;
}
