/** Progress of a job: the percentage from its log, its state and duration as texts. */

const TQDM_PERCENT = /(\d{1,3})%\|/; // a tqdm progress bar
const STEPS = /\b(\d{1,4})\s*\/\s*(\d{1,4})\b/;
const PERCENT_MAX = 99; // until the result has arrived

/**
 * Return the progress that the last line of fal's log with a step count or percentage shows.
 *
 * @param {string[]} lines
 * @returns {number | null} percent below 100; null if no line shows it
 */
export function progressPercent(lines) {
  for (const line of [...(lines ?? [])].reverse()) {
    const steps = STEPS.exec(line);
    if (steps !== null && Number(steps[2]) > 0 && Number(steps[1]) <= Number(steps[2])) {
      return Math.min(PERCENT_MAX, Math.floor((100 * Number(steps[1])) / Number(steps[2])));
    }
    const percent = TQDM_PERCENT.exec(line);
    if (percent !== null && Number(percent[1]) <= 100) {
      return Math.min(PERCENT_MAX, Number(percent[1]));
    }
  }
  return null;
}

/**
 * Return the state of a job as a short text.
 *
 * @param {import("./jobs.js").Job} job
 */
export function describeState(job) {
  if (job.isCancelling && ["preparing", "sending", "queued", "running"].includes(job.state)) {
    return "Cancelling";
  }
  switch (job.state) {
    case "preparing":
      return job.isHeld
        ? "Not sent yet"
        : typeof job.uploaded === "number"
          ? `Uploading, ${Math.round(100 * job.uploaded)} %`
          : job.inputs > 0
            ? "Preparing the image"
            : "Preparing";
    case "sending":
      return "Sending";
    case "queued":
      return job.position === null
        ? "In the queue"
        : job.position === 0
          ? "Next in the queue"
          : `#${job.position + 1} in the queue`;
    case "running":
      return "Running";
    case "done":
      return "Done";
    case "cancelled":
      return "Cancelled";
    case "failed":
      return "Failed";
    default:
      return "Response lost";
  }
}

/** `2.6 s`, `12 s`, `2 min 5 s`. @param {number} ms */
export function formatSeconds(ms) {
  return ms < 10_000 ? `${(Math.max(0, ms) / 1000).toFixed(1)} s` : formatDuration(ms);
}

/** `12 s`, `2 min 5 s`. @param {number} ms */
export function formatDuration(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}
