/** The detail of a call: its timeline, its ids and all facts of its record. */
import { el } from "../dom.js";
import { formatDuration, formatUsd, NONE } from "./format.js";

const COPIED_TIME = 2000; // ms
const REUSED = ["hit", "collapsed", "replayed"];
const CACHE_STEPS = { miss: "Not in the result cache", bypass: "Result cache not used" };

/** @param {object} call of `api/usage/calls` @returns {HTMLElement} */
export function callDetail(call) {
  return el(
    "div",
    { className: "call-detail" },
    el(
      "div",
      {},
      el("h3", {}, "Timeline"),
      partsBar(call),
      el("ol", { className: "timeline" }, ...steps(call).map(step)),
    ),
    el(
      "dl",
      { className: "facts" },
      ...idFact("Request id (falproxy)", call.proxy_request_id),
      ...idFact("Request id (fal.ai)", call.request_id),
      ...fact("Operation", call.operation),
      ...fact("Through", call.route),
      ...fact("Error", call.error),
      ...fact("Cache", call.cache),
      ...fact("Caller", call.principal),
      ...fact("User", call.user),
      ...fact("Cost", call.spent === null ? null : formatUsd(call.spent)),
      ...fact("Saved", call.saved === null ? null : formatUsd(call.saved)),
    ),
  );
}

/** Return the known steps of a call as names and seconds after its start. */
function steps(call) {
  const start = new Date(call.at);
  const after = (time) => (new Date(time) - start) / 1000;
  const found = [["Received", 0]];
  if (REUSED.includes(call.cache)) {
    found.push([`Result reused (${call.cache})`, call.seconds]);
  } else if (CACHE_STEPS[call.cache]) {
    found.push([CACHE_STEPS[call.cache], null]);
  }
  if (!REUSED.includes(call.cache) && call.upstream_seconds > 0) {
    found.push(["Sent to fal.ai", secondsBeforeFal(call)]);
    if (call.ended_at !== null || call.is_running) {
      found.push(["Accepted by fal’s queue", call.seconds]);
    }
  }
  if (call.run_seconds !== null && call.ended_at !== null) {
    found.push(["Started to run", Math.max(call.seconds, after(call.ended_at) - call.run_seconds)]);
  }
  if (call.ended_at !== null) {
    found.push([
      call.status < 400 ? "Completed" : `Failed with ${call.error ?? call.status}`,
      after(call.ended_at),
    ]);
    const recorded = Math.max(after(call.ended_at), after(call.fetched_at));
    found.push(...storedStep(call, recorded), ["Result recorded", recorded]);
  } else if (call.is_running) {
    found.push(["The result was not fetched yet", null]);
  } else {
    found.push(...storedStep(call, call.seconds));
    found.push([
      call.status < 400 ? "Response sent" : `Failed with ${call.error ?? call.status}`,
      call.seconds,
    ]);
  }
  return found;
}

/** Return when the files of the result had been stored; nothing if it has none. */
function storedStep({ stored_seconds: seconds }, at) {
  return seconds === null ? [] : [[`Files stored, in ${formatDuration(seconds)}`, at]];
}

/** Return the proxy's share before fal.ai. A job's files are stored when its result is fetched. */
function secondsBeforeFal(call) {
  const isJob = call.ended_at !== null || call.is_running;
  return isJob ? call.own_seconds : Math.max(0, call.own_seconds - (call.stored_seconds ?? 0));
}

function step([name, seconds]) {
  return el(
    "li",
    {},
    el("span", {}, name),
    el("span", { className: "muted" }, seconds === null ? NONE : `+ ${formatDuration(seconds)}`),
  );
}

/** A bar of the parts of the duration. The same numbers are in its text. */
function partsBar(call) {
  const parts = [
    ["proxy", secondsBeforeFal(call)],
    ["queue", call.queue_seconds],
    ["run", call.run_seconds],
    ["storing", call.own_seconds - secondsBeforeFal(call)],
  ];
  const known = parts.filter(([, seconds]) => seconds !== null && seconds > 0);
  const whole = known.reduce((sum, [, seconds]) => sum + seconds, 0);
  const text = known.map(([name, seconds]) => `${name} ${formatDuration(seconds)}`).join(", ");
  const segments = known.map(([name, seconds]) => {
    const element = el("span", { className: `part-${name}` });
    element.style.width = `${(100 * seconds) / whole}%`;
    return element;
  });
  return el(
    "p",
    { className: "parts" },
    el("span", { className: "call-bar", "aria-hidden": "true" }, ...segments),
    el("span", { className: "small" }, text === "" ? "The parts are not known." : text),
  );
}

function fact(name, value) {
  return value === null || value === "" ? [] : [el("dt", {}, name), el("dd", {}, value)];
}

function idFact(name, id) {
  if (id === null) {
    return fact(name, NONE);
  }
  const button = el(
    "button",
    {
      type: "button",
      className: "button small-button",
      "aria-label": `Copy the ${name}`,
      onclick: async () => {
        button.textContent = (await copy(id)) ? "Copied" : "Not copied";
        setTimeout(() => (button.textContent = "Copy"), COPIED_TIME);
      },
    },
    "Copy",
  );
  return [el("dt", {}, name), el("dd", {}, el("span", { className: "mono" }, id), " ", button)];
}

/** Return whether the text was copied; browsers allow it on https and localhost only. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
