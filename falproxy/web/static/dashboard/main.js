/** Entry point of the dashboard: polls the usage every ten seconds while the tab is visible. */
import { allowPrompt, fetchFromProxy, getAccessKey } from "../access_key.js";
import { byId, el } from "../dom.js";
import { renderHeader } from "../header.js";
import { loadProxyInfo, setReachable, startStatusChips } from "../proxy_status.js";
import { suggestErrors, suggestNames } from "./call_filters.js";
import { refreshCallList, reload, showCalls, startCallList } from "./call_list.js";
import { showFailures } from "./failures.js";
import { formatQuantity, formatTime } from "./format.js";
import { showKeys } from "./keys.js";
import { showState } from "./state.js";
import { showTables } from "./tables.js";
import { showPerformance, showTilesAndCharts, startFigures } from "./tiles_and_charts.js";
import { previousQuery, rangeName, rangePhrase, rangeQuery, startTimeRange } from "./time_range.js";

const POLL_INTERVAL = 10_000; // ms
const PREVIOUS_INTERVAL = 120_000; // ms between two requests for the period before

let pollTimer = null;
let currentRequest = null; // AbortController
let isPaused = false;
let isUnauthorized = false; // polling stops, so that the key dialog does not open again and again
let hasNumbers = false;
let updatedAt = null;
let infoLoaded = null; // promise
let previous = { usage: null, performance: null, at: -Infinity };

start();

function start() {
  renderHeader("dashboard");
  startFigures();
  startCallList();
  startTimeRange(() => {
    previous = { usage: null, performance: null, at: -Infinity };
    refresh(true);
  });
  byId("pause").addEventListener("click", () => {
    isPaused = !isPaused;
    byId("pause").setAttribute("aria-pressed", String(isPaused));
    scheduleRefresh();
    showUpdateTime();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      clearTimeout(pollTimer);
    } else {
      scheduleRefresh();
    }
  });
  window.addEventListener("falproxy:key", () => {
    if (getAccessKey() !== null && isUnauthorized) {
      refresh(true);
    } else if (getAccessKey() === null && hasNumbers) {
      location.reload(); // remove the numbers that the forgotten key gave access to
    }
  });
  window.addEventListener("falproxy:wake", () => refresh());
  startStatusChips();
  infoLoaded = loadProxyInfo();
  refresh();
}

function scheduleRefresh() {
  clearTimeout(pollTimer);
  if (!isPaused && !isUnauthorized && !document.hidden) {
    const age = updatedAt === null ? 0 : Date.now() - updatedAt.getTime();
    pollTimer = setTimeout(refresh, Math.max(0, POLL_INTERVAL - age));
  }
}

/** @param {boolean} [isByUser] whether the user caused it: the new total is announced */
async function refresh(isByUser = false) {
  clearTimeout(pollTimer);
  currentRequest?.abort();
  const controller = new AbortController();
  currentRequest = controller;
  try {
    const signal = controller.signal;
    const response = await fetchFromProxy(`api/usage?${rangeQuery()}`, { signal });
    if (controller !== currentRequest) {
      return;
    }
    setReachable(true);
    isUnauthorized = response.status === 401 || response.status === 403;
    if (response.ok) {
      const usage = await response.json();
      showUsage(usage, isByUser);
      await showDetails(usage, signal, isByUser);
      document.documentElement.dataset.range = rangeName(); // all parts show it
    } else {
      await showResponseError(response);
    }
  } catch (error) {
    if (controller === currentRequest && error.name !== "AbortError") {
      setReachable(false);
      showNotice("bad", `The proxy does not respond.${staleNote()}`);
    }
  }
  if (controller === currentRequest) {
    updatedAt ??= new Date();
    scheduleRefresh();
  }
}

/** Load what the other parts of the dashboard show. One that fails leaves the others. */
async function showDetails(usage, signal, isByUser) {
  const results = await Promise.allSettled([
    loadPerformance(usage, signal),
    showState(usage.principal === null, signal),
    isByUser ? reload() : refreshCallList(),
    infoLoaded.then(() => showKeys(usage)),
  ]);
  const failed = results.find(({ reason }) => reason !== undefined);
  if (failed !== undefined) {
    throw failed.reason;
  }
}

async function loadPerformance(usage, signal) {
  const performance = await fetchDocument(`api/usage/performance?${rangeQuery()}`, signal);
  if (performance !== null) {
    showPerformance(performance, previous.performance);
    showFailures(performance, showCalls);
    suggestErrors(performance);
  }
  if (await loadPrevious(signal)) {
    showTilesAndCharts(usage, previous.usage);
    if (performance !== null) {
      showPerformance(performance, previous.performance);
    }
  }
}

/** Load the numbers of the period before, which change rarely. Return whether they were loaded. */
async function loadPrevious(signal) {
  if (Date.now() - previous.at < PREVIOUS_INTERVAL) {
    return false;
  }
  const query = previousQuery();
  const [usage, performance] = await Promise.all([
    fetchDocument(`api/usage?by=route&${query}`, signal),
    fetchDocument(`api/usage/performance?${query}`, signal),
  ]);
  previous = { usage, performance, at: Date.now() };
  return true;
}

/** Return a document; null if the proxy refuses it, such as a period that is too long. */
async function fetchDocument(path, signal) {
  const response = await fetchFromProxy(path, { signal });
  return response.ok ? response.json() : null;
}

function showUsage(usage, isByUser) {
  updatedAt = new Date();
  hasNumbers = true;
  byId("notices").replaceChildren();
  document.documentElement.classList.remove("has-no-numbers");
  byId("no-calls").hidden = usage.totals.calls > 0;
  byId("scope").textContent =
    usage.principal === null ? "Calls of all callers" : `Your calls, ${usage.principal}`;
  showTilesAndCharts(usage, previous.usage);
  showTables(usage);
  suggestNames(usage);
  showUpdateTime();
  if (isByUser) {
    const calls = formatQuantity(usage.totals.calls, "call");
    byId("announcer").textContent = `${rangePhrase()}: ${calls}.`;
  }
}

function showUpdateTime() {
  const interval = isPaused ? "updates are paused" : "every 10 s";
  byId("updated").textContent =
    updatedAt === null ? "\u00a0" : `${formatTime(updatedAt)}, ${interval}`;
}

async function showResponseError(response) {
  document.documentElement.classList.toggle("has-no-numbers", !hasNumbers);
  if (response.status === 401) {
    const onclick = () => {
      allowPrompt();
      refresh(true);
    };
    const props = { type: "button", className: "button", onclick };
    const enterKey = el("button", props, "Enter a key");
    showNotice("warn", "The numbers require an access key. ", enterKey);
    return;
  }
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The proxy responded with status ${response.status}.`;
  showNotice("bad", `${message}${staleNote()}`);
}

/** Return a sentence with the time of the numbers that are shown, if there are any. */
function staleNote() {
  return hasNumbers ? ` The numbers shown are from ${formatTime(updatedAt)}.` : "";
}

function showNotice(className, ...content) {
  byId("notices").replaceChildren(el("p", { className: `notice ${className}` }, ...content));
}
