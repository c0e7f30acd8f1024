/** The keys of callers, for admins of a proxy that requires authentication. */
import { fetchFromProxy } from "../access_key.js";
import { byId, el } from "../dom.js";
import { proxyInfo } from "../proxy_status.js";
import { errorMessage } from "./form_dialog.js";
import { formatUsd, NONE } from "./format.js";
import { KEYS_PATH, openCreateDialog, openRevokeDialog, openRotateDialog } from "./key_dialogs.js";
import { setTable } from "./tables.js";

const STATE_CLASSES = { active: "good", expired: "warn", revoked: "bad" };

let isLoading = false;
let isStarted = false;

/** Load the keys and show them, if the caller may see them. @param {object} usage document of `api/usage` */
export async function showKeys(usage) {
  if (!proxyInfo.isLocked || usage.principal !== null || isLoading) {
    return;
  }
  if (!isStarted) {
    isStarted = true;
    byId("create-key").addEventListener("click", () => openCreateDialog(refreshKeys));
  }
  await refreshKeys();
}

async function refreshKeys() {
  isLoading = true;
  try {
    const response = await fetchFromProxy(KEYS_PATH);
    byId("keys-panel").hidden = !response.ok && response.status !== 503;
    if (response.ok) {
      const { keys } = await response.json();
      renderKeys(keys, await loadSpending(keys));
      showProblem("");
    } else if (response.status === 503) {
      showProblem(await errorMessage(response));
    }
  } catch {
    showProblem("The keys could not be loaded.");
  } finally {
    isLoading = false;
  }
}

function renderKeys(keys, spending) {
  const lines = keys.map((key) => [
    el("th", { scope: "row" }, key.name),
    el(
      "td",
      { className: "text" },
      el("span", { className: `chip ${STATE_CLASSES[key.state]}` }, key.state),
    ),
    el("td", {}, key.rate ?? NONE),
    el("td", {}, key.concurrency === null ? NONE : String(key.concurrency)),
    el("td", { className: "budget" }, budgetCell(key, spending)),
    el("td", { className: "text wraps" }, key.endpoints.join(", ") || "all"),
    el("td", {}, formatDate(key.expires_at, "never")),
    el("td", {}, formatDate(key.last_used_at, "never")),
    el("td", {}, actions(key)),
  ]);
  const headings = [
    "Name",
    "State",
    "Rate",
    "Concurrency",
    "Budget",
    "Endpoints",
    "Expires",
    "Last used",
    "Actions",
  ];
  keepFocus(() => setTable("keys", headings, lines, [1, 5]));
}

/** Return the bar of the used part of a budget. */
function budgetCell(key, spending) {
  if (key.budget === null) {
    return NONE;
  }
  const [amount, period] = key.budget.split("/");
  const limit = Number(amount);
  const spent = spending.get(period)?.get(key.name) ?? (spending.has(period) ? 0 : null);
  const label = el("span", {}, `$${key.budget}`);
  if (spent === null || !(limit > 0)) {
    return label;
  }
  const share = Math.min(1, spent / limit);
  const bar = el("span", {
    className: share >= 1 ? "failed" : share >= 0.8 ? "nearly" : "succeeded",
  });
  bar.style.width = `${share * 100}%`;
  return el(
    "span",
    { className: "budget-cell" },
    label,
    el("span", { className: "call-bar", "aria-hidden": "true" }, bar),
    el("span", { className: "small muted" }, `${formatUsd(spent)} spent`),
  );
}

/** Return the spending of each caller in the current window of each budget, by window. */
async function loadSpending(keys) {
  const periods = new Set(
    keys.filter(({ budget }) => budget !== null).map(({ budget }) => budget.split("/")[1]),
  );
  const spending = new Map();
  for (const period of periods) {
    const since = windowStart(period, new Date());
    const response =
      since && (await fetchFromProxy(`api/usage?by=principal&since=${since.toISOString()}`));
    if (response?.ok) {
      const { rows } = await response.json();
      spending.set(period, new Map(rows.map(({ name, spent }) => [name, spent ?? 0])));
    }
  }
  return spending;
}

const UNITS = { s: 1, m: 60, h: 3600, d: 86_400 };
const NAMED = { second: 1, minute: 60, hour: 3600, day: 86_400, week: 604_800 };

const MONDAY_OFFSET = 4 * 86_400; // seconds: 1970-01-01 was a Thursday

/** Return the start of the current window, in UTC; null for one that is not known. */
function windowStart(period, now) {
  if (period === "month") {
    return new Date(Date.UTC(now.getUTCFullYear(), now.getUTCMonth(), 1));
  }
  const match = /^(\d+)([smhd])$/.exec(period);
  const seconds = NAMED[period] ?? (match ? Number(match[1]) * UNITS[match[2]] : null);
  if (seconds === null) {
    return null;
  }
  const offset = seconds % NAMED.week === 0 ? MONDAY_OFFSET : 0;
  return new Date(
    (Math.floor((now.getTime() / 1000 - offset) / seconds) * seconds + offset) * 1000,
  );
}

/** Run `render`, which replaces the buttons of the table, and focus the same button again. */
function keepFocus(render) {
  const id = byId("keys").contains(document.activeElement) ? document.activeElement.id : "";
  render();
  if (id) {
    byId(id)?.focus();
  }
}

function actions(key) {
  const button = (name, className, onclick, isEnabled) =>
    el(
      "button",
      {
        type: "button",
        id: `${name.toLowerCase()}-${key.id}`,
        className: `button ${className}`,
        "aria-label": `${name} the key ${key.name}`,
        disabled: !isEnabled,
        onclick,
      },
      name,
    );
  return el(
    "span",
    { className: "key-actions" },
    button("Rotate", "", () => openRotateDialog(key, refreshKeys), key.state === "active"),
    button("Revoke", "danger", () => openRevokeDialog(key, refreshKeys), key.state !== "revoked"),
  );
}

function formatDate(text, none) {
  return text === null
    ? none
    : new Date(text).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

function showProblem(text) {
  byId("keys-problem").textContent = text;
}
