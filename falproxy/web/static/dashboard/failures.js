/** The table of failures by kind. A row's button shows its calls in the list. */
import { byId, el } from "../dom.js";
import { addExportButton } from "./csv.js";
import { formatCount, formatWhen } from "./format.js";
import { setTable } from "./tables.js";

let shown = [];
let isStarted = false;

/**
 * @param {object} performance document of `api/usage/performance`
 * @param {(filters: object) => void} showCalls
 */
export function showFailures(performance, showCalls) {
  if (!isStarted) {
    isStarted = true;
    addExportButton(byId("failures").closest("section"), "failures", () => [
      ["status", "error", "endpoint", "calls", "before", "first", "last"],
      ...shown.map((row) => [
        row.status,
        row.error,
        row.endpoint,
        row.calls,
        row.previous,
        row.first_at,
        row.last_at,
      ]),
    ]);
  }
  shown = performance.failures;
  const lines = shown.map((row) => [
    el(
      "th",
      { scope: "row" },
      el("span", { className: `chip ${statusClass(row.status)}` }, String(row.status)),
    ),
    el(
      "td",
      { className: "text wraps" },
      el("strong", {}, row.error ?? "no type"),
      el("span", { className: "muted small block" }, row.endpoint ?? "no endpoint"),
    ),
    el("td", {}, formatCount(row.calls)),
    el("td", {}, changeText(row.calls, row.previous)),
    el("td", {}, formatWhen(new Date(row.first_at))),
    el("td", {}, formatWhen(new Date(row.last_at))),
    el("td", {}, callsButton(row, showCalls)),
  ]);
  const headings = ["Status", "Error and endpoint", "Calls", "Before", "First", "Last", "List"];
  setTable("failures", headings, lines, [1], "Nothing has failed.");
}

function callsButton(row, showCalls) {
  const name = `Show the calls with ${row.error ?? row.status} of ${row.endpoint ?? "no endpoint"}`;
  const filters = {
    status: String(row.status),
    error: row.error ?? "",
    endpoint: row.endpoint ?? "",
  };
  return el(
    "button",
    {
      type: "button",
      id: `show-${Object.values(filters).join("-")}`,
      className: "button small-button",
      "aria-label": name,
      onclick: () => showCalls(filters),
    },
    "Show",
  );
}

/** Return how a number has changed. @param {number} present @param {number} previous */
export function changeText(present, previous) {
  if (previous === 0) {
    return present === 0 ? "0" : "new";
  }
  const change = Math.round((present / previous - 1) * 100);
  return `${formatCount(previous)} (${change > 0 ? "+" : ""}${formatCount(change)}%)`;
}

export function statusClass(status) {
  return status >= 500 ? "bad" : status >= 400 ? "warn" : "good";
}
