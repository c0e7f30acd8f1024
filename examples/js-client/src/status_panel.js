/** The status of the job: a headline, a clock and the log of the model. */
const panel = document.querySelector("#status");
const frame = document.querySelector("#frame");
const headline = document.querySelector("#headline");
const clock = document.querySelector("#clock");
const log = document.querySelector("#log");

let startedAt = 0;
let clockTimer;

/** Clear the log and start the clock. */
export function startStatus() {
  log.replaceChildren();
  log.hidden = true;
  startedAt = performance.now();
  clearInterval(clockTimer);
  clockTimer = setInterval(showClock, 100);
  showClock();
}

/** Stop the clock. phase: "done", "failed" or "cancelled". */
export function finishStatus(phase, text) {
  clearInterval(clockTimer);
  showClock();
  showPhase(phase, text);
}

/** Show the progress that `generate` reports. */
export function showProgress({ phase, position, logs }) {
  const texts = {
    uploading: "Uploading your image",
    submitting: "Sending to fal",
    queued: position > 0 ? `In the queue, ${position} ahead of you` : "In the queue, next in line",
    running: "Generating the image",
  };
  showPhase(phase, texts[phase]);
  showLogs(logs ?? []);
}

function showPhase(phase, text) {
  panel.dataset.phase = phase;
  frame.dataset.phase = phase;
  // Screen readers announce each change of a live region, even to the same text.
  if (headline.textContent !== text) {
    headline.textContent = text;
  }
}

/**
 * Each status has all log lines: append only the new ones, so that screen readers announce only
 * those.
 */
function showLogs(lines) {
  for (const { message } of lines.slice(log.children.length)) {
    const line = document.createElement("p");
    line.textContent = message;
    log.append(line);
    log.hidden = false;
    log.scrollTop = log.scrollHeight;
  }
}

function showClock() {
  clock.textContent = `${((performance.now() - startedAt) / 1000).toFixed(1)} s`;
}
