/** The live status: a headline, a clock and the model's log lines. */
const panel = document.querySelector("#status");
const frame = document.querySelector("#frame");
const headline = document.querySelector("#headline");
const clock = document.querySelector("#clock");
const log = document.querySelector("#log");

let startedAt = 0;
let ticking;

/** Starts the clock of a new picture. */
export function startStatus() {
  log.replaceChildren();
  log.hidden = true;
  startedAt = performance.now();
  clearInterval(ticking);
  ticking = setInterval(showClock, 100);
  showClock();
}

/** Stops the clock and says how it ended; phase is "done", "failed" or "cancelled". */
export function endStatus(phase, words) {
  clearInterval(ticking);
  showClock();
  show(phase, words);
}

/** Shows where the picture is, as `generate` reports it. */
export function showProgress({ phase, position, logs }) {
  const words = {
    uploading: "Uploading your picture",
    submitting: "Sending to fal",
    queued: position > 0 ? `In the queue, ${position} ahead of you` : "In the queue, next in line",
    running: "Making the picture",
  };
  show(phase, words[phase]);
  showLogs(logs ?? []);
}

function show(phase, words) {
  panel.dataset.phase = phase;
  frame.dataset.phase = phase;
  // A live region speaks at every write, also when the words are the same.
  if (headline.textContent !== words) {
    headline.textContent = words;
  }
}

/** Every poll brings all lines so far: only what is new is added, so that only that is read out. */
function showLogs(lines) {
  for (const { message } of lines.slice(log.children.length)) {
    const line = document.createElement("li");
    line.textContent = message;
    log.append(line);
    log.hidden = false;
    log.scrollTop = log.scrollHeight;
  }
}

function showClock() {
  clock.textContent = `${((performance.now() - startedAt) / 1000).toFixed(1)} s`;
}
