/** The tiles with the totals, and the charts over time. */
import { byId } from "../dom.js";
import { Chart } from "./chart.js";
import { saveCsv } from "./csv.js";
import {
  formatCount,
  formatDuration,
  formatPercent,
  formatQuantity,
  formatShortCount,
  formatUsd,
} from "./format.js";

const CHART_SPECS = {
  "calls-chart": {
    title: "Calls",
    description: "All model calls, and those that failed.",
    isWhole: true,
    format: formatShortCount,
    lines: [
      { name: "calls", kind: "area", className: "is-calls", value: (row) => row.calls },
      { name: "errors", kind: "line", className: "is-errors", value: (row) => row.errors },
    ],
    extra: (row) => (row.hit_rate === null ? "" : `hit rate ${formatPercent(row.hit_rate)}`),
  },
  "cost-chart": {
    title: "Cost",
    description: "USD spent, and USD saved by results from the cache.",
    format: formatUsd,
    lines: [
      { name: "spent", kind: "bar", className: "is-spent", value: (row) => row.spent },
      { name: "saved", kind: "bar", className: "is-saved", value: (row) => row.saved },
    ],
    extra: (row) =>
      row.unpriced ? `${formatQuantity(row.unpriced, "call")} of unknown price` : "",
  },
};
const PERFORMANCE_SPECS = {
  "duration-chart": {
    title: "Duration",
    description:
      "As the caller waits: until the end of a queued job, or the response of another call.",
    format: formatDuration,
    lines: [
      { name: "p50", kind: "area", className: "is-p50", value: (row) => row.p50 },
      { name: "p95", kind: "line", className: "is-p95", value: (row) => row.p95 },
      { name: "p99", kind: "line", className: "is-p99", value: (row) => row.p99 },
    ],
  },
  "parts-chart": {
    title: "Parts of the duration",
    description:
      "On average: in fal’s queue, running at fal, and in falproxy. A call that is not queued runs only.",
    format: formatDuration,
    lines: [
      { name: "queue", kind: "bar", className: "is-queue", value: (row) => row.queue_seconds },
      { name: "run", kind: "bar", className: "is-run", value: (row) => row.run_seconds },
      { name: "falproxy", kind: "bar", className: "is-own", value: (row) => row.own_seconds },
    ],
  },
  "errors-chart": {
    title: "Errors",
    description: "Failed calls by their status.",
    isWhole: true,
    format: formatShortCount,
    lines: [
      {
        name: "5xx failed",
        kind: "bar",
        className: "is-server-error",
        value: (row) => failures(row, 500, 599),
      },
      {
        name: "429 and 402 limited",
        kind: "bar",
        className: "is-limited",
        value: (row) => failures(row, 429, 429) + failures(row, 402, 402),
      },
      {
        name: "499 cancelled",
        kind: "bar",
        className: "is-cancelled",
        value: (row) => failures(row, 499, 499),
      },
      { name: "other 4xx", kind: "bar", className: "is-client-error", value: otherFailures },
    ],
  },
};

function failures(row, lowest, highest) {
  const matching = Object.entries(row.failures).filter(
    ([status]) => status >= lowest && status <= highest,
  );
  return matching.reduce((sum, [, count]) => sum + count, 0);
}

function otherFailures(row) {
  const counted =
    failures(row, 500, 599) +
    failures(row, 429, 429) +
    failures(row, 402, 402) +
    failures(row, 499, 499);
  return failures(row, 0, 999) - counted;
}

const charts = new Map();
let starts = []; // of processes, in the period that is shown

/** @param {object} usage document of `api/usage` @param {object | null} previous of the period before */
export function showTilesAndCharts(usage, previous) {
  showTiles(usage.totals, previous?.totals ?? null);
  starts = usage.starts ?? [];
  byId("starts-note").hidden = starts.length === 0;
  for (const [id, spec] of Object.entries(CHART_SPECS)) {
    showChart(id, spec, usage.series, usage.step);
  }
}

/**
 * @param {object} performance document of `api/usage/performance`
 * @param {object | null} previous of the period before
 */
export function showPerformance(performance, previous) {
  const { p50, p95, calls } = performance.durations;
  const note = calls === 0 ? "" : `half take at most ${formatDuration(p50)}`;
  setTile("latency", formatDuration(p95), note, change(p95, previous?.durations.p95 ?? null));
  const { step } = performance;
  const name = step < 3600 ? "minute" : step < 86_400 ? "hour" : "day";
  for (const [id, spec] of Object.entries(PERFORMANCE_SPECS)) {
    showChart(id, spec, performance.series, name);
  }
}

function showChart(id, spec, rows, step) {
  if (!charts.has(id)) {
    charts.set(id, new Chart(byId(id), spec));
  }
  charts.get(id).setRows(rows, step, starts);
}

/** Show the chart that is chosen, which is part of the URL: `?figure=errors`. */
export function startFigures() {
  const choices = byId("figures");
  const chosen = `${new URLSearchParams(location.search).get("figure")}-chart`;
  const inputs = [...choices.querySelectorAll("input")];
  const selected = inputs.find(({ value }) => value === chosen) ?? inputs[0];
  selected.checked = true;
  const show = (id) => inputs.forEach(({ value }) => (byId(value).hidden = value !== id));
  show(selected.value);
  byId("export-chart").addEventListener("click", () => {
    const id = choices.querySelector("input:checked").value;
    saveCsv(id, charts.get(id)?.exportedRows() ?? []);
  });
  choices.addEventListener("change", (event) => {
    show(event.target.value);
    const url = new URL(location);
    url.searchParams.set("figure", event.target.value.replace("-chart", ""));
    history.replaceState(null, "", url);
  });
}

function showTiles(totals, previous) {
  const { calls, errors, hits, misses, unpriced } = totals;
  const note = unpriced
    ? `and ${formatQuantity(unpriced, "call")} of unknown price`
    : perCall(totals);
  const compare = (name) => change(totals[name], previous === null ? null : previous[name]);
  setTile(
    "calls",
    formatCount(calls),
    calls ? `${formatCount(calls - errors)} succeeded` : "",
    compare("calls"),
  );
  setTile(
    "errors",
    formatCount(errors),
    calls ? `${formatPercent(errors / calls)} of all calls` : "",
    rateBefore(previous, errorRate) || compare("errors"),
  );
  const hitsAndMisses = `${formatQuantity(hits, "hit")}, ${formatQuantity(misses, "miss", "misses")}`;
  const hitsBefore = rateBefore(previous, (before) => before.hit_rate);
  setTile("hits", formatPercent(totals.hit_rate), hitsAndMisses, hitsBefore);
  setTile("spent", formatUsd(totals.spent), note, compare("spent"));
  setTile("saved", formatUsd(totals.saved), `by ${formatQuantity(hits, "hit")}`, compare("saved"));
}

function errorRate({ calls, errors }) {
  return calls ? errors / calls : null;
}

/** Return a rate in the period before; empty if it had none. */
function rateBefore(previous, rate) {
  const value = previous === null ? null : rate(previous);
  return value === null ? "" : `${formatPercent(value)} before`;
}

function perCall({ calls, spent }) {
  return calls && spent ? `${formatUsd(Number((spent / calls).toPrecision(2)))} per call` : "";
}

/** Return how a value has changed since the period before; empty if that is not known. */
function change(value, previous) {
  if (value === null || previous === null || value === undefined || previous === undefined) {
    return "";
  }
  if (previous === 0) {
    return value === 0 ? "" : "none before";
  }
  if (value >= 10 * previous) {
    return `${formatCount(Math.round(value / previous))} times as much as before`;
  }
  const percent = Math.round((value / previous - 1) * 100);
  if (percent === 0) {
    return "as before";
  }
  return `${formatCount(Math.abs(percent))}% ${percent > 0 ? "more" : "less"} than before`;
}

/** @param {string} id @param {string} value @param {string} note @param {string} [changeText] */
export function setTile(id, value, note, changeText = "") {
  const [valueElement, noteElement, changeElement] = byId(id).querySelectorAll("dd");
  valueElement.textContent = value;
  noteElement.textContent = note || "\u00a0";
  changeElement.textContent = changeText || "\u00a0";
}
