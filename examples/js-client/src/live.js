/** The page of live video: starts and stops a session, and shows its video. */
import { openLiveSession } from "./live_session.js";

const form = document.querySelector("#live-form");
const startButton = document.querySelector("#start");
const stopButton = document.querySelector("#stop");
const video = document.querySelector("#video");
const status = document.querySelector("#status");
const headline = document.querySelector("#headline");
const { endpoint, prompt } = form.elements;

let session = null;

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (session) {
    session.sendPrompt(prompt.value);
  } else if (!startButton.disabled) {
    start();
  }
});
stopButton.addEventListener("click", () => {
  session.close();
  stop("idle", "Stopped");
});

async function start() {
  startButton.disabled = endpoint.disabled = true;
  show("opening", "Opening a session");
  try {
    session = await openLiveSession({
      endpoint: endpoint.value,
      onStream: showStream,
      onEnd: (reason) => stop("ended", reason),
    });
  } catch (error) {
    stop("failed", error.message);
    return;
  }
  if (prompt.value) {
    session.sendPrompt(prompt.value);
  }
  startButton.textContent = "Send prompt";
  startButton.disabled = false;
  stopButton.hidden = false;
}

function showStream(stream) {
  video.srcObject = stream;
  video.addEventListener("playing", () => show("live", "Live"), { once: true });
}

function stop(phase, text) {
  session = null;
  video.srcObject = null;
  startButton.textContent = "Start";
  startButton.disabled = endpoint.disabled = false;
  stopButton.hidden = true;
  show(phase, text);
}

function show(phase, text) {
  status.dataset.phase = phase;
  headline.textContent = text;
}
