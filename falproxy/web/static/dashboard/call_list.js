/** The list of calls with its filters and pages. A row expands to the detail of the call. */
import { fetchFromProxy } from "../access_key.js";
import { byId, el } from "../dom.js";
import { showApiCall } from "./api_calls.js";
import { callDetail } from "./call_detail.js";
import { filterQuery, setFilters, startFilters } from "./call_filters.js";
import { saveFile } from "./csv.js";
import { statusClass } from "./failures.js";
import { errorMessage } from "./form_dialog.js";
import { formatDuration, formatUsd, formatWhen, NONE } from "./format.js";
import { replaceContent } from "./replace_content.js";
import { rangeQuery } from "./time_range.js";

const PATH = "api/usage/calls";
const PAGE = 50;
const SEARCHES_MAX = 40; // requests for one page: rare calls are searched in several steps
const COLUMNS_KEY = "falproxy.dashboard.columns";
const COLUMNS = [
  { name: "endpoint", label: "Endpoint", isText: true, cell: (call) => call.endpoint ?? NONE },
  { name: "status", label: "Status", isText: true, cell: statusChip },
  { name: "cache", label: "Cache", isText: true, cell: (call) => call.cache ?? NONE },
  { name: "cost", label: "Cost", cell: (call) => formatUsd(call.spent) },
  { name: "duration", label: "Duration", cell: (call) => formatDuration(call.total_seconds) },
  {
    name: "queue",
    label: "In queue",
    isOptional: true,
    cell: (call) => formatDuration(call.queue_seconds),
  },
  {
    name: "run",
    label: "Running",
    isOptional: true,
    cell: (call) => formatDuration(call.run_seconds),
  },
  {
    name: "own",
    label: "falproxy",
    isOptional: true,
    cell: (call) => formatDuration(call.own_seconds),
  },
  { name: "caller", label: "Caller", isText: true, cell: (call) => call.principal ?? NONE },
  { name: "user", label: "User", isText: true, cell: (call) => call.user ?? NONE },
  { name: "route", label: "Through", isText: true, isOptional: true, cell: (call) => call.route },
  {
    name: "request",
    label: "Request id",
    isText: true,
    cell: (call) => el("span", { className: "mono" }, call.proxy_request_id ?? NONE),
  },
];

let calls = [];
let next = null; // cursor of the next page
let expanded = new Set(); // ids
let chosen = readColumns();
let currentRequest = null; // AbortController
let isLoaded = false;

export function startCallList() {
  startFilters(() => reload());
  byId("more-calls").addEventListener("click", () => load(next));
  byId("export-calls").addEventListener("click", exportCalls);
  byId("columns")
    .querySelector("fieldset")
    .append(...COLUMNS.map(columnCheckbox));
  byId("columns").addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      byId("columns").open = false;
      byId("columns").querySelector("summary").focus();
    }
  });
}

/** Load the newest calls again, unless the user reads older ones or a detail. */
export function refreshCallList() {
  if (!isLoaded || (calls.length <= PAGE && expanded.size === 0)) {
    return reload();
  }
  return Promise.resolve();
}

/** Load the first page of another time range or with other filters. */
export function reload() {
  expanded = new Set();
  return load(null);
}

/** Show the calls that match these filters. @param {Record<string, string>} filters */
export function showCalls(filters) {
  setFilters(filters);
  byId("calls-panel").scrollIntoView();
  byId("latest").focus({ preventScroll: true });
}

/** @param {string | null} after cursor */
async function load(after) {
  currentRequest?.abort();
  const controller = new AbortController();
  currentRequest = controller;
  byId("latest").setAttribute("aria-busy", "true");
  showApiCall("calls-foot", PATH, callsQuery());
  let found = [];
  let cursor = after;
  for (let n = 0; n < SEARCHES_MAX; n += 1) {
    const page = await fetchPage(cursor, PAGE - found.length, controller.signal);
    if (controller !== currentRequest) {
      return;
    }
    if (page === null) {
      break;
    }
    found = [...found, ...page.calls];
    cursor = page.next;
    calls =
      after === null
        ? found
        : [...calls.filter(({ id }) => !found.some((call) => call.id === id)), ...found];
    next = cursor;
    isLoaded = true;
    render(page);
    if (cursor === null || found.length >= PAGE) {
      break;
    }
  }
  byId("latest").removeAttribute("aria-busy");
}

/** Return a page; null, with a message for the user, if it could not be loaded. */
async function fetchPage(cursor, limit, signal) {
  const query = callsQuery();
  query.set("limit", String(limit));
  if (cursor !== null) {
    query.set("after", cursor);
  }
  try {
    const response = await fetchFromProxy(`${PATH}?${query}`, { signal });
    byId("calls-problem").textContent = response.ok ? "" : await errorMessage(response);
    return response.ok ? await response.json() : null;
  } catch (error) {
    if (error.name !== "AbortError") {
      byId("calls-problem").textContent = "The calls could not be loaded.";
    }
    return null;
  }
}

function callsQuery() {
  const query = rangeQuery();
  for (const [name, value] of Object.entries(filterQuery())) {
    query.set(name, value);
  }
  return query;
}

async function exportCalls() {
  const button = byId("export-calls");
  button.disabled = true;
  const query = callsQuery();
  query.set("format", "csv");
  try {
    const response = await fetchFromProxy(`${PATH}?${query}`);
    if (response.ok) {
      saveFile("falproxy-calls.csv", await response.blob());
    } else {
      byId("calls-problem").textContent = await errorMessage(response);
    }
  } catch {
    byId("calls-problem").textContent = "The calls could not be exported.";
  }
  button.disabled = false;
}

function render(page) {
  replaceContent(byId("latest"), createList);
  byId("more-calls").hidden = next === null;
  const searched = formatWhen(new Date(page.searched_until));
  byId("calls-note").textContent =
    next !== null && calls.length < PAGE
      ? `Searched back to ${searched}.`
      : calls.length === 0
        ? ""
        : `${calls.length} calls shown.`;
}

function createList() {
  const columns = COLUMNS.filter(({ name }) => chosen.has(name));
  return calls.length === 0 ? el("p", { className: "muted" }, emptyText()) : table(columns);
}

function emptyText() {
  return Object.keys(filterQuery()).length > 0 ? "No call matches these filters." : "Nothing yet.";
}

function table(columns) {
  const heading = ({ label, isText }) =>
    el("th", { scope: "col", className: isText ? "text" : "" }, label);
  const head = el(
    "tr",
    {},
    el("th", { scope: "col", className: "text" }, "Time"),
    ...columns.map(heading),
  );
  const body = calls.flatMap((call) => rowsOf(call, columns));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
}

function rowsOf(call, columns) {
  const isOpen = expanded.has(call.id);
  const toggle = el(
    "button",
    {
      type: "button",
      id: `call-${call.id}`,
      className: "toggle",
      "aria-expanded": String(isOpen),
      "aria-label": `Details of the call at ${formatWhen(new Date(call.at))}`,
      onclick: () => toggleDetail(call, columns),
    },
    formatWhen(new Date(call.at)),
  );
  const cells = columns.map(({ cell, isText }) =>
    el("td", { className: isText ? "text" : "" }, cell(call)),
  );
  const row = el("tr", {}, el("th", { scope: "row" }, toggle), ...cells);
  return isOpen ? [row, detailRow(call, columns)] : [row];
}

function detailRow(call, columns) {
  const cell = el("td", { className: "text", colSpan: columns.length + 1 }, callDetail(call));
  return el("tr", { className: "detail", id: `detail-${call.id}` }, cell);
}

function toggleDetail(call, columns) {
  const button = byId(`call-${call.id}`);
  const isOpen = !expanded.has(call.id);
  button.setAttribute("aria-expanded", String(isOpen));
  if (isOpen) {
    expanded.add(call.id);
    button.closest("tr").after(detailRow(call, columns));
  } else {
    expanded.delete(call.id);
    byId(`detail-${call.id}`).remove();
  }
}

function statusChip(call) {
  if (call.is_running) {
    return el("span", { className: "chip" }, "running");
  }
  const text = call.error ? `${call.status} ${call.error}` : String(call.status);
  const className = call.error && call.status < 400 ? "bad" : statusClass(call.status);
  return el("span", { className: `chip ${className}` }, text);
}

function columnCheckbox({ name, label }) {
  const onchange = (event) => {
    chosen = new Set(chosen);
    if (event.target.checked) {
      chosen.add(name);
    } else {
      chosen.delete(name);
    }
    storeColumns();
    if (isLoaded) {
      replaceContent(byId("latest"), createList);
    }
  };
  const id = `column-${name}`;
  return el(
    "span",
    { className: "check" },
    el("input", { type: "checkbox", id, checked: chosen.has(name), onchange }),
    el("label", { for: id }, label),
  );
}

function readColumns() {
  const names = COLUMNS.filter(({ isOptional }) => !isOptional).map(({ name }) => name);
  try {
    const stored = JSON.parse(localStorage.getItem(COLUMNS_KEY));
    return new Set(Array.isArray(stored) ? stored : names);
  } catch {
    return new Set(names);
  }
}

function storeColumns() {
  try {
    localStorage.setItem(COLUMNS_KEY, JSON.stringify([...chosen]));
  } catch {
    // Without storage, the choice is kept until the page is closed.
  }
}
