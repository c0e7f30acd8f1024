/** The tiles with the totals, and the charts over time. */
import { byId } from "../dom.js";
import { Chart } from "./chart.js";
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
  "upstream-chart": {
    title: "fal.ai’s share of a call",
    description: "Average time until fal.ai responded. For a queued call: to its submit.",
    format: formatDuration,
    lines: [
      {
        name: "fal.ai",
        kind: "line",
        className: "is-upstream",
        value: (row) => row.upstream_seconds,
      },
    ],
  },
  "own-chart": {
    title: "falproxy’s share of a call",
    description: "Average time. Includes waiting for an identical call in progress.",
    format: formatDuration,
    lines: [
      { name: "falproxy", kind: "area", className: "is-own", value: (row) => row.own_seconds },
    ],
  },
};

const charts = new Map();

/** @param {object} usage document of `api/usage` */
export function showTilesAndCharts(usage) {
  showTiles(usage.totals);
  for (const [id, spec] of Object.entries(CHART_SPECS)) {
    if (!charts.has(id)) {
      charts.set(id, new Chart(byId(id), spec));
    }
    charts.get(id).setRows(usage.series, usage.step);
  }
}

function showTiles(totals) {
  const { calls, errors, hits, misses, unpriced } = totals;
  const note = unpriced
    ? `and ${formatQuantity(unpriced, "call")} of unknown price`
    : "where the price is known";
  setTile("calls", formatCount(calls), calls ? `${formatCount(calls - errors)} succeeded` : "");
  setTile("errors", formatCount(errors), calls ? `${formatPercent(errors / calls)} of all calls` : "");
  const hitsAndMisses = `${formatQuantity(hits, "hit")}, ${formatQuantity(misses, "miss", "misses")}`;
  setTile("hits", formatPercent(totals.hit_rate), hitsAndMisses);
  setTile("spent", formatUsd(totals.spent), note);
  setTile("saved", formatUsd(totals.saved), `by ${formatQuantity(hits, "hit")}`);
  const times = [totals.upstream_seconds, totals.own_seconds];
  setTile("latency", calls ? times.map(formatDuration).join(" / ") : "–", "per call, on average");
}

function setTile(id, value, note) {
  const [valueElement, noteElement] = byId(id).querySelectorAll("dd");
  valueElement.textContent = value;
  noteElement.textContent = note || "\u00a0";
}
