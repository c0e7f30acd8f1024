/** The tables: by endpoint, way in and caller, the percentiles, and the latest calls. */
import { el, find } from "../dom.js";
import { clock, count, dollars, duration, NONE, share } from "./format.js";

const SUMS = [
  ["Errors", (row) => count(row.errors)],
  ["Hit rate", (row) => share(row.hit_rate)],
  ["Spent", (row) => dollars(row.spent) + (row.unpriced && row.spent !== null ? " +" : "")],
  ["Saved", (row) => dollars(row.saved)],
  ["fal.ai", (row) => duration(row.upstream_seconds)],
  ["falproxy", (row) => duration(row.own_seconds)],
];
const PERCENTILES = [
  ["50 %", "p50"],
  ["95 %", "p95"],
  ["99 %", "p99"],
];

/** @param {object} usage as `api/usage` tells it */
export function showTables(usage) {
  showSums("endpoints", "Endpoint", usage.endpoints, "no endpoint");
  showSums("routes", "Way in", usage.routes, "unknown");
  find("principals-part").hidden = usage.principals === null;
  showSums("principals", "Caller", usage.principals ?? [], "without a key");
  showLive(usage.live);
  showLatest(usage.latest);
}

function showSums(id, title, rows, nameless) {
  const most = Math.max(1, ...rows.map((row) => row.calls));
  const lines = rows.map((row) => [
    el("th", { scope: "row" }, row.name || nameless),
    el("td", { className: "bar-cell" }, bar(row, most), el("span", {}, count(row.calls))),
    ...SUMS.map(([, text]) => el("td", {}, text(row))),
  ]);
  fill(id, [title, "Calls", ...SUMS.map(([name]) => name)], lines);
}

/** How many calls, and how many of them failed, beside the most of all. */
function bar(row, most) {
  const part = (value, look) => {
    const element = el("span", { className: look });
    element.style.width = `${(100 * value) / most}%`;
    return element;
  };
  return el(
    "span",
    { className: "bar", "aria-hidden": "true" },
    part(row.calls - row.errors, "well"),
    part(row.errors, "failed"),
  );
}

function showLive(live) {
  find("live-part").hidden = live === null;
  if (live === null) {
    return;
  }
  const since = live.since === null ? "the start" : new Date(live.since).toLocaleString();
  find("live-says").textContent =
    `${count(live.requests)} requests since ${since}, ${count(live.in_progress)} under way; polls count too. ` +
    "Estimated from histograms, and so near the truth only.";
  const upstream = new Map(live.upstream_seconds.map((each) => [each.operation, each]));
  const lines = live.own_seconds.map((own) => {
    const theirs = upstream.get(own.operation);
    return [
      el("th", { scope: "row" }, own.operation.replace("_", " ") || "all"),
      el("td", {}, count(own.count)),
      ...PERCENTILES.map(([, name]) => el("td", {}, theirs ? duration(theirs[name]) : NONE)),
      ...PERCENTILES.map(([, name]) => el("td", {}, duration(own[name]))),
    ];
  });
  const heads = ["fal.ai", "falproxy"].flatMap((who) => PERCENTILES.map(([name]) => `${who} ${name}`));
  fill("live", ["Operation", "Requests", ...heads], lines);
}

function showLatest(calls) {
  const lines = calls.map((call) => [
    el("th", { scope: "row" }, clock(new Date(call.at))),
    el("td", { className: "text" }, call.endpoint ?? NONE),
    el("td", { className: "text" }, result(call)),
    el("td", { className: "text" }, call.cache ?? NONE),
    el("td", {}, dollars(call.spent)),
    el("td", {}, duration(call.seconds)),
    el("td", { className: "text" }, call.principal ?? NONE),
    el("td", { className: "text mono" }, call.request_id ?? NONE),
  ]);
  const heads = ["Time", "Endpoint", "Answer", "Cache", "Cost", "Took", "Caller", "Request id"];
  fill("latest", heads, lines, [1, 2, 3, 6, 7]);
}

function result(call) {
  const failed = call.status >= 400 || call.error !== null;
  const text = call.error ? `${call.status} ${call.error}` : String(call.status);
  return el("span", { className: failed ? "chip bad" : "chip good" }, text);
}

function fill(id, heads, lines, text = []) {
  const head = heads.map((name, n) =>
    el("th", { scope: "col", className: n === 0 || text.includes(n) ? "text" : "" }, name),
  );
  const place = find(id);
  if (lines.length === 0) {
    place.replaceChildren(el("p", { className: "muted" }, "Nothing yet."));
    return;
  }
  const rows = lines.map((cells) => el("tr", {}, ...cells));
  place.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
}
