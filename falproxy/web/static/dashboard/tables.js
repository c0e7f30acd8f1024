/** The tables: totals by endpoint, route, caller and user, and the latency percentiles. */
import { byId, el } from "../dom.js";
import { showApiCalls } from "./api_calls.js";
import { budgetCell, budgetName, loadSpending } from "./budgets.js";
import { addExportButton } from "./csv.js";
import { formatCount, formatDuration, formatPercent, formatUsd, NONE } from "./format.js";
import { replaceContent } from "./replace_content.js";

const TOTALS = [
  ["Errors", (row) => formatCount(row.errors)],
  ["Hit rate", (row) => formatPercent(row.hit_rate)],
  ["Spent", (row) => formatUsd(row.spent) + (row.unpriced && row.spent !== null ? " +" : "")],
  ["Saved", (row) => formatUsd(row.saved)],
  ["fal.ai", (row) => formatDuration(row.upstream_seconds)],
  ["falproxy", (row) => formatDuration(row.own_seconds)],
];
const OPERATION_NAMES = { "": "all", none: "without a call to fal", other: "other calls" };
const PERCENTILES = [
  ["50 %", "p50"],
  ["95 %", "p95"],
  ["99 %", "p99"],
];

/** @param {object} usage document of `api/usage` */
export function showTables(usage) {
  shown = usage;
  showTotals("endpoints", "Endpoint", usage.endpoints, "no endpoint");
  showTotals("routes", "Route", usage.routes, "unknown");
  byId("principals-panel").hidden = usage.principals === null;
  byId("users-panel").hidden = usage.users.every((row) => row.name === "");
  showSpenders();
  showLatency(usage.live);
  showApiCalls();
  if (!hasExports) {
    hasExports = true;
    for (const name of ["endpoints", "routes", "principals", "users"]) {
      addExportButton(byId(name).closest("section"), name, () => exportedRows(shown[name] ?? []));
    }
    addExportButton(byId("live-panel"), "latency", exportedLatency);
  }
}

function showSpenders() {
  const { principals, users, principal } = shown;
  showTotals("principals", "Caller", principals ?? [], "without a key", { ...budgets.principals });
  showTotals("users", "User", users, "no user", {
    hasCallers: principal === null,
    ...budgets.users,
  });
}

/**
 * Show the used part of the budgets of callers and users.
 *
 * @param {{principal: string | null, user: string | null}} limits of `api/usage/state`
 * @param {AbortSignal} signal
 */
export async function showBudgets(limits, signal) {
  const [principals, users] = await Promise.all([
    loadSpending("principal", [limits.principal], signal),
    loadSpending("user", [limits.user], signal),
  ]);
  budgets = {
    principals: { budget: limits.principal, spending: principals },
    users: { budget: limits.user, spending: users },
  };
  showSpenders();
}

let budgets = {};
let shown = null;
let hasExports = false;
const EXPORTED = [
  "name",
  "principal",
  "calls",
  "errors",
  "hits",
  "misses",
  "spent",
  "saved",
  "unpriced",
  "upstream_seconds",
  "own_seconds",
];

function exportedRows(rows) {
  return [EXPORTED, ...rows.map((row) => EXPORTED.map((name) => row[name] ?? null))];
}

/**
 * @param {object} [options] hasCallers: show the caller who named the user of each row. budget: that
 *   each row has, with the `spending` in its window.
 */
function showTotals(id, title, rows, emptyName, options = {}) {
  const { hasCallers = false, budget = null, spending } = options;
  const maxCalls = Math.max(1, ...rows.map((row) => row.calls));
  const lines = rows.map((row) => [
    el("th", { scope: "row" }, row.name || emptyName),
    ...(hasCallers ? [el("td", { className: "text" }, row.principal || NONE)] : []),
    el(
      "td",
      { className: "bar-cell" },
      callBar(row, maxCalls),
      el("span", {}, formatCount(row.calls)),
    ),
    ...TOTALS.map(([, text]) => el("td", {}, text(row))),
    ...(budget
      ? [el("td", {}, row.name ? budgetCell(budget, budgetName(row), spending) : NONE)]
      : []),
  ]);
  const first = [title, ...(hasCallers ? ["Caller"] : []), "Calls"];
  const headings = [...first, ...TOTALS.map(([name]) => name), ...(budget ? ["Budget"] : [])];
  setTable(id, headings, lines, hasCallers ? [1] : []);
}

/** A bar of the succeeded and the failed calls, relative to the row with the most calls. */
function callBar(row, maxCalls) {
  const segment = (value, className) => {
    const element = el("span", { className });
    element.style.width = `${(100 * value) / maxCalls}%`;
    return element;
  };
  return el(
    "span",
    { className: "call-bar", "aria-hidden": "true" },
    segment(row.calls - row.errors, "succeeded"),
    segment(row.errors, "failed"),
  );
}

function showLatency(live) {
  byId("live-panel").hidden = live === null;
  if (live === null) {
    return;
  }
  const since = live.since === null ? "the start" : new Date(live.since).toLocaleString();
  byId("live-description").textContent =
    `${formatCount(live.requests)} requests since ${since}, ${formatCount(live.in_progress)} in ` +
    "progress, including polls. The percentiles are estimates from histograms.";
  const upstream = new Map(live.upstream_seconds.map((row) => [row.operation, row]));
  const lines = live.own_seconds.map((own) => {
    const fal = upstream.get(own.operation);
    return [
      el("th", { scope: "row" }, OPERATION_NAMES[own.operation] ?? own.operation.replace("_", " ")),
      el("td", {}, formatCount(own.count)),
      ...PERCENTILES.map(([, name]) => el("td", {}, fal ? formatDuration(fal[name]) : NONE)),
      ...PERCENTILES.map(([, name]) => el("td", {}, formatDuration(own[name]))),
    ];
  });
  const headings = ["fal.ai", "falproxy"].flatMap((part) =>
    PERCENTILES.map(([name]) => `${part} ${name}`),
  );
  setTable("live", ["Operation", "Requests", ...headings], lines);
}

function exportedLatency() {
  const names = PERCENTILES.map(([, name]) => name);
  const rows = ["upstream_seconds", "own_seconds"].flatMap((part) =>
    (shown.live?.[part] ?? []).map((row) => [
      part,
      row.operation,
      row.count,
      ...names.map((name) => row[name]),
    ]),
  );
  return [["part", "operation", "requests", ...names], ...rows];
}

/**
 * Replace a table, as `replaceContent` does.
 *
 * textColumns: indexes of the columns that are aligned left, besides the first.
 */
export function setTable(id, headings, lines, textColumns = [], emptyText = "Nothing yet.") {
  const head = headings.map((name, n) =>
    el("th", { scope: "col", className: n === 0 || textColumns.includes(n) ? "text" : "" }, name),
  );
  const container = byId(id);
  if (lines.length === 0) {
    replaceContent(container, () => el("p", { className: "muted" }, emptyText));
    return;
  }
  const rows = lines.map((cells) => el("tr", {}, ...cells));
  const body = el("tbody", {}, ...rows);
  replaceContent(container, () => el("table", {}, el("thead", {}, el("tr", {}, ...head)), body));
}
