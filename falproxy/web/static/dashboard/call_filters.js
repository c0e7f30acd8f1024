/** The filters of the list of calls, which are part of the URL. */
import { byId, el } from "../dom.js";

const APPLY_DELAY = 400; // ms after the last change of a text
const STATUSES = [
  "failed",
  "ok",
  "running",
  "4xx",
  "5xx",
  "422",
  "429",
  "499",
  "500",
  "503",
  "504",
];
const CACHE = ["hit", "miss", "collapsed", "bypass", "replayed"];
const FIELDS = [
  { name: "status", label: "Status", placeholder: "failed, 5xx", options: STATUSES },
  { name: "error", label: "Error", placeholder: "rate_limited", options: [] },
  { name: "endpoint", label: "Endpoint", placeholder: "fal-ai/flux/dev", options: [] },
  { name: "principal", label: "Caller", isForAll: true, options: [] },
  { name: "user", label: "User", options: [] },
  { name: "cache", label: "Cache", placeholder: "hit", options: CACHE },
  { name: "min_seconds", label: "Seconds, at least", inputMode: "decimal", className: "short" },
  { name: "min_cost", label: "Cost in USD, at least", inputMode: "decimal", className: "short" },
  { name: "request_id", label: "Request id", placeholder: "falproxy or fal" },
];

let applied = {};
let timer = null;
let notify = () => {};

/** @param {() => void} onChange called when the filters have changed */
export function startFilters(onChange) {
  notify = onChange;
  const query = new URLSearchParams(location.search);
  const form = byId("filters");
  form.append(...FIELDS.map(field));
  form.append(
    el(
      "button",
      {
        type: "button",
        className: "button quiet",
        id: "clear-filters",
        onclick: () => setFilters({}),
      },
      "Clear filters",
    ),
  );
  for (const { name } of FIELDS) {
    input(name).value = query.get(name) ?? "";
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    apply();
  });
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(apply, APPLY_DELAY);
  });
  applied = readInputs();
  byId("clear-filters").hidden = Object.keys(applied).length === 0;
}

/** Return the filters by name, without empty ones. */
export function filterQuery() {
  return applied;
}

/** Replace the filters. @param {Record<string, string>} filters */
export function setFilters(filters) {
  for (const { name } of FIELDS) {
    input(name).value = filters[name] ?? "";
  }
  apply();
}

/** Show the names of a period as suggestions. @param {object} usage document of `api/usage` */
export function suggestNames(usage) {
  suggest("endpoint", usage.endpoints);
  suggest("user", usage.users);
  suggest("principal", usage.principals ?? []);
  byId("filter-principal").closest(".field").hidden = usage.principals === null;
}

/** Show the errors of a period as suggestions. @param {object} performance */
export function suggestErrors(performance) {
  suggest(
    "error",
    performance.failures.map(({ error }) => ({ name: error })),
  );
}

function suggest(name, rows) {
  const names = [...new Set(rows.map((row) => row.name).filter(Boolean))].slice(0, 100);
  byId(`options-${name}`).replaceChildren(...names.map((value) => el("option", { value })));
}

function apply() {
  clearTimeout(timer);
  const next = readInputs();
  if (JSON.stringify(next) === JSON.stringify(applied)) {
    return;
  }
  applied = next;
  byId("clear-filters").hidden = Object.keys(applied).length === 0;
  const url = new URL(location);
  for (const { name } of FIELDS) {
    if (name in applied) {
      url.searchParams.set(name, applied[name]);
    } else {
      url.searchParams.delete(name);
    }
  }
  history.replaceState(null, "", url);
  notify();
}

function readInputs() {
  const values = FIELDS.map(({ name }) => [name, input(name).value.trim()]);
  return Object.fromEntries(values.filter(([, value]) => value !== ""));
}

function input(name) {
  return byId(`filter-${name}`);
}

function field({ name, label, placeholder, options, inputMode, className = "" }) {
  const id = `filter-${name}`;
  const list = options ? `options-${name}` : null;
  const control = el("input", {
    id,
    placeholder: placeholder ?? "",
    autocomplete: "off",
    spellcheck: false,
    inputMode: inputMode ?? "text",
  });
  if (list !== null) {
    control.setAttribute("list", list);
  }
  return el(
    "div",
    { className: `field ${className}` },
    el("label", { for: id, className: "small" }, label),
    control,
    list !== null &&
      el("datalist", { id: list }, ...options.map((value) => el("option", { value }))),
  );
}
