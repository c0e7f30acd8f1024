/** How far a job is, by what is known for certain. */

const PERCENT = /(\d{1,3})%\|/; // tqdm's bar
const STEPS = /\b(\d{1,4})\s*\/\s*(\d{1,4})\b/;
const MOST = 99; // percent, until the result is there

/**
 * What fal's log says of the steps of a job.
 *
 * @param {string[]} lines
 * @returns {number | null} percent below 100; null where nobody knows
 */
export function percentOf(lines) {
  for (const line of [...(lines ?? [])].reverse()) {
    const steps = STEPS.exec(line);
    if (steps !== null && Number(steps[2]) > 0 && Number(steps[1]) <= Number(steps[2])) {
      return Math.min(MOST, Math.floor((100 * Number(steps[1])) / Number(steps[2])));
    }
    const percent = PERCENT.exec(line);
    if (percent !== null && Number(percent[1]) <= 100) {
      return Math.min(MOST, Number(percent[1]));
    }
  }
  return null;
}

/**
 * What a job is doing, in a few words.
 *
 * @param {import("./jobs.js").Job} job
 */
export function phaseOf(job) {
  if (job.isCancelling && ["preparing", "sending", "queued", "running"].includes(job.state)) {
    return "Cancelling";
  }
  switch (job.state) {
    case "preparing":
      return job.inputs > 0 ? "Getting the picture ready" : "Getting ready";
    case "sending":
      return "Sending";
    case "queued":
      return job.position === null
        ? "In the queue"
        : job.position === 0
          ? "Next in the queue"
          : `In the queue, ${job.position} ahead`;
    case "running":
      return "Running";
    case "done":
      return "Done";
    case "cancelled":
      return "Cancelled";
    case "failed":
      return "Failed";
    default:
      return "Answer lost";
  }
}

/** `12 s`, `2 min 5 s`. @param {number} ms */
export function duration(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}
