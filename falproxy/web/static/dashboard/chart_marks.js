/** Marks of deploys and restarts in a chart: the starts of processes. */
import { svg } from "./chart_legend.js";
import { formatMinute, formatQuantity } from "./format.js";

const TEXTS_MAX = 3; // starts of one interval that are listed
const DISTANCE_MIN = 3; // pixels between two marks

/**
 * @typedef {object} Start
 * @property {string} at
 * @property {string} version
 * @property {number} processes
 * @property {number} hosts
 * @property {boolean} is_new_version
 */

/**
 * Return the starts of each row, with their place in it.
 *
 * @param {{at: string}[]} rows oldest first @param {Start[]} starts oldest first
 * @returns {{start: Start, part: number}[][]} part: of the interval that has passed, from 0 to 1
 */
export function startsOfRows(rows, starts) {
  const times = rows.map(({ at }) => Date.parse(at));
  const length = times.length > 1 ? times[1] - times[0] : Infinity;
  const found = rows.map(() => []);
  for (const start of starts) {
    const at = Date.parse(start.at);
    const n = times.findLastIndex((time) => time <= at);
    if (n >= 0 && at < times[n] + length) {
      found[n].push({ start, part: length === Infinity ? 0.5 : (at - times[n]) / length });
    }
  }
  return found;
}

/** Return the starts of an interval as a text, such as `1.4.0 started on 2 processes, 14:03`; empty without starts. */
export function describeStarts(starts) {
  const texts = starts.slice(0, TEXTS_MAX).map(({ start }) => {
    const hosts = start.hosts > 1 ? ` of ${start.hosts} hosts` : "";
    const processes = formatQuantity(start.processes, "process", "processes");
    const kind = start.is_new_version ? "new version " : "";
    const when = formatMinute(new Date(start.at));
    return `${kind}${start.version} started on ${processes}${hosts}, ${when}`;
  });
  const others = starts.slice(TEXTS_MAX).reduce((sum, { start }) => sum + start.processes, 0);
  return [...texts, ...(others ? [`${formatQuantity(others, "more start")}`] : [])].join("; ");
}

/**
 * Return thin vertical lines: solid for a new version, dashed for a restart.
 *
 * @param {{start: Start, part: number}[][]} startsByRow
 * @param {(n: number, part: number) => number} x @param {number} top @param {number} bottom
 */
export function createStartLines(startsByRow, x, top, bottom) {
  const group = svg("g", { class: "starts" });
  let previous = -Infinity;
  for (const [n, starts] of startsByRow.entries()) {
    for (const { start, part } of starts) {
      // Inside the interval, so that the tooltip at the line has the text of the start.
      const sharp = Math.floor(x(n, part)) + 0.5;
      const left = Math.min(Math.max(sharp, x(n, 0) + 1), x(n, 1) - 1);
      if (left - previous >= DISTANCE_MIN || start.is_new_version) {
        const className = start.is_new_version ? "deploy" : "restart";
        group.append(svg("path", { d: `M${left} ${top}V${bottom}`, class: className }));
        previous = left;
      }
    }
  }
  return group;
}
