/** The dashboard: asks `api/usage` for what is shown, every ten seconds while somebody looks. */
import { loadAbout, reached, watchStates } from "../proxy_status.js";
import { fetchHere, knownKey } from "../access_key.js";
import { el, find } from "../dom.js";
import { showFigures } from "./tiles_and_charts.js";
import { showTables } from "./tables.js";
import { clock, plural } from "./format.js";

const EVERY = 10_000;
const SINCE = { hour: "1h", day: "24h", week: "7d", month: "30d" };

let range = new URLSearchParams(location.search).get("range");
let timer = null;
let asking = null;
let isPaused = false;
let isRefused = false; // nobody is asked for a key again and again
let updated = null;

start();

function start() {
  range = Object.hasOwn(SINCE, range) ? range : "day";
  find("ranges").querySelector(`[value="${range}"]`).checked = true;
  find("ranges").addEventListener("change", (event) => {
    range = event.target.value;
    const address = new URL(location);
    address.searchParams.set("range", range);
    history.replaceState(null, "", address);
    refresh(true);
  });
  find("pause").addEventListener("click", () => {
    isPaused = !isPaused;
    find("pause").setAttribute("aria-pressed", String(isPaused));
    plan();
    showUpdated();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      clearTimeout(timer);
    } else {
      plan();
    }
  });
  window.addEventListener("falproxy:key", () => {
    if (knownKey() === null) {
      location.reload(); // what was shown is nobody else's
    } else if (isRefused) {
      refresh(true);
    }
  });
  window.addEventListener("falproxy:wake", () => refresh());
  watchStates();
  loadAbout();
  refresh();
}

/** Has the numbers asked for again when their time has come. */
function plan() {
  clearTimeout(timer);
  if (!isPaused && !isRefused && !document.hidden) {
    const age = updated === null ? 0 : Date.now() - updated.getTime();
    timer = setTimeout(refresh, Math.max(0, EVERY - age));
  }
}

/** @param {boolean} [isWished] whether the person asked for it, and is told */
async function refresh(isWished = false) {
  clearTimeout(timer);
  asking?.abort();
  const mine = new AbortController();
  asking = mine;
  try {
    const response = await fetchHere(`api/usage?since=${SINCE[range]}`, { signal: mine.signal });
    if (mine !== asking) {
      return;
    }
    reached(true);
    isRefused = response.status === 401 || response.status === 403;
    if (response.ok) {
      show(await response.json(), isWished);
    } else {
      await complain(response);
    }
  } catch (error) {
    if (mine === asking && error.name !== "AbortError") {
      reached(false);
      notice("bad", `The proxy does not answer.${stale()}`);
    }
  }
  if (mine === asking) {
    updated ??= new Date();
    plan();
  }
}

function show(usage, isWished) {
  updated = new Date();
  find("notices").replaceChildren();
  find("empty").hidden = usage.totals.calls > 0;
  find("whose").textContent =
    usage.principal === null ? "Everybody’s calls" : `Your calls, ${usage.principal}`;
  showFigures(usage);
  showTables(usage);
  showUpdated();
  document.documentElement.dataset.shown = range;
  if (isWished) {
    find("announcer").textContent = `The last ${range}: ${plural(usage.totals.calls, "call")}.`;
  }
}

function showUpdated() {
  const every = isPaused ? "updates are paused" : "every 10 s";
  find("updated").textContent = updated === null ? "\u00a0" : `${clock(updated)}, ${every}`;
}

async function complain(response) {
  if (response.status === 401) {
    const again = el("button", { type: "button", className: "button", onclick: () => refresh(true) }, "Enter a key");
    notice("warn", "The numbers are for those who have an access key. ", again);
    return;
  }
  const document = await response.json().catch(() => null);
  const message = document?.error?.message ?? `The proxy answered ${response.status}.`;
  notice("bad", `${message}${stale()}`);
}

function stale() {
  const shown = globalThis.document.documentElement.dataset.shown;
  return shown === undefined ? "" : ` What is shown is from ${clock(updated)}.`;
}

function notice(look, ...content) {
  find("notices").replaceChildren(el("p", { className: `notice ${look}` }, ...content));
}
