/** Entry point of the dashboard: polls `api/usage` every ten seconds while the tab is visible. */
import { fetchFromProxy, getAccessKey } from "../access_key.js";
import { byId, el } from "../dom.js";
import { renderHeader } from "../header.js";
import { loadProxyInfo, setReachable, startStatusChips } from "../proxy_status.js";
import { formatQuantity, formatTime } from "./format.js";
import { showKeys } from "./keys.js";
import { showTables } from "./tables.js";
import { showTilesAndCharts } from "./tiles_and_charts.js";

const POLL_INTERVAL = 10_000; // ms
const SINCE = { hour: "1h", day: "24h", week: "7d", month: "30d" };

let range = new URLSearchParams(location.search).get("range");
let pollTimer = null;
let currentRequest = null; // AbortController
let isPaused = false;
let isUnauthorized = false; // polling stops, so that the key dialog does not open again and again
let updatedAt = null;
let infoLoaded = null; // promise

start();

function start() {
  renderHeader("dashboard");
  range = Object.hasOwn(SINCE, range) ? range : "day";
  byId("ranges").querySelector(`[value="${range}"]`).checked = true;
  byId("ranges").addEventListener("change", (event) => {
    range = event.target.value;
    const url = new URL(location);
    url.searchParams.set("range", range);
    history.replaceState(null, "", url);
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
    if (getAccessKey() === null) {
      location.reload(); // remove the numbers that the forgotten key gave access to
    } else if (isUnauthorized) {
      refresh(true);
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
    const path = `api/usage?since=${SINCE[range]}`;
    const response = await fetchFromProxy(path, { signal: controller.signal });
    if (controller !== currentRequest) {
      return;
    }
    setReachable(true);
    isUnauthorized = response.status === 401 || response.status === 403;
    if (response.ok) {
      showUsage(await response.json(), isByUser);
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

function showUsage(usage, isByUser) {
  updatedAt = new Date();
  byId("notices").replaceChildren();
  byId("no-calls").hidden = usage.totals.calls > 0;
  byId("scope").textContent =
    usage.principal === null ? "Calls of all callers" : `Your calls, ${usage.principal}`;
  showTilesAndCharts(usage);
  showTables(usage);
  infoLoaded.then(() => showKeys(usage));
  showUpdateTime();
  document.documentElement.dataset.range = range;
  if (isByUser) {
    const calls = formatQuantity(usage.totals.calls, "call");
    byId("announcer").textContent = `The last ${range}: ${calls}.`;
  }
}

function showUpdateTime() {
  const interval = isPaused ? "updates are paused" : "every 10 s";
  byId("updated").textContent =
    updatedAt === null ? "\u00a0" : `${formatTime(updatedAt)}, ${interval}`;
}

async function showResponseError(response) {
  if (response.status === 401) {
    const props = { type: "button", className: "button", onclick: () => refresh(true) };
    const enterKey = el("button", props, "Enter a key");
    showNotice("warn", "The numbers require an access key. ", enterKey);
    return;
  }
  const document = await response.json().catch(() => null);
  const message =
    document?.error?.message ?? `The proxy responded with status ${response.status}.`;
  showNotice("bad", `${message}${staleNote()}`);
}

/** Return a sentence with the time of the numbers that are shown, if there are any. */
function staleNote() {
  const hasUsage = globalThis.document.documentElement.dataset.range !== undefined;
  return hasUsage ? ` The numbers shown are from ${formatTime(updatedAt)}.` : "";
}

function showNotice(className, ...content) {
  byId("notices").replaceChildren(el("p", { className: `notice ${className}` }, ...content));
}
