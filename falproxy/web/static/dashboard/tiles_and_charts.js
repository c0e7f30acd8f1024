/** The sums and the charts. */
import { find } from "../dom.js";
import { Chart } from "./chart.js";
import { count, dollars, duration, plural, share, shortCount } from "./format.js";

const PICTURES = {
  "calls-chart": {
    title: "Calls",
    about: "All model calls, and those that failed.",
    isWhole: true,
    format: shortCount,
    lines: [
      { name: "calls", kind: "area", look: "is-calls", value: (row) => row.calls },
      { name: "errors", kind: "line", look: "is-errors", value: (row) => row.errors },
    ],
    more: (row) => (row.hit_rate === null ? "" : `hit rate ${share(row.hit_rate)}`),
  },
  "money-chart": {
    title: "Money",
    about: "USD spent, and what results that were there already would have cost.",
    format: dollars,
    lines: [
      { name: "spent", kind: "bar", look: "is-spent", value: (row) => row.spent },
      { name: "saved", kind: "bar", look: "is-saved", value: (row) => row.saved },
    ],
    more: (row) => (row.unpriced ? `${plural(row.unpriced, "call")} of unknown price` : ""),
  },
  "upstream-chart": {
    title: "fal.ai’s share of a call",
    about: "On average, until its answer began; a queued call’s is that of its submit.",
    format: duration,
    lines: [{ name: "fal.ai", kind: "line", look: "is-upstream", value: (row) => row.upstream_seconds }],
  },
  "own-chart": {
    title: "falproxy’s share of a call",
    about: "On average; waiting for an equal call that is under way counts here.",
    format: duration,
    lines: [{ name: "falproxy", kind: "area", look: "is-own", value: (row) => row.own_seconds }],
  },
};

const charts = new Map();

/** @param {object} usage as `api/usage` tells it */
export function showFigures(usage) {
  showTiles(usage.totals);
  for (const [id, picture] of Object.entries(PICTURES)) {
    if (!charts.has(id)) {
      charts.set(id, new Chart(find(id), picture));
    }
    charts.get(id).show(usage.series, usage.step);
  }
}

function showTiles(totals) {
  const { calls, errors, hits, misses, unpriced } = totals;
  const more = unpriced ? `and ${plural(unpriced, "call")} of unknown price` : "where the price is known";
  tile("calls", count(calls), calls ? `${count(calls - errors)} went well` : "");
  tile("errors", count(errors), calls ? `${share(errors / calls)} of all calls` : "");
  tile("hits", share(totals.hit_rate), `${plural(hits, "hit")}, ${plural(misses, "miss", "misses")}`);
  tile("spent", dollars(totals.spent), more);
  tile("saved", dollars(totals.saved), `by ${plural(hits, "hit")}`);
  const times = [totals.upstream_seconds, totals.own_seconds];
  tile("latency", calls ? times.map(duration).join(" / ") : "–", "of a call, on average");
}

function tile(id, value, more) {
  const [shown, rest] = find(id).querySelectorAll("dd");
  shown.textContent = value;
  rest.textContent = more || "\u00a0";
}
