/** All values of a chart as a table, which is visually hidden. */
import { el } from "../dom.js";
import { describeStarts } from "./chart_marks.js";
import { formatIntervalStart } from "./format.js";

/** @param {object} chart @returns {HTMLTableElement} */
export function createTable({ spec, rows, step, startsByRow }) {
  const { title, lines, format } = spec;
  const hasStarts = startsByRow.some(({ length }) => length > 0);
  const bodyRows = rows.map((row, n) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, formatIntervalStart(new Date(row.at), step)),
      ...lines.map(({ value }) => el("td", {}, format(value(row)))),
      ...(hasStarts ? [el("td", {}, describeStarts(startsByRow[n]))] : []),
    ),
  );
  const names = ["From", ...lines.map(({ name }) => name), ...(hasStarts ? ["starts"] : [])];
  const cells = names.map((name) => el("th", { scope: "col" }, name));
  const head = el("thead", {}, el("tr", {}, ...cells));
  return el("table", {}, el("caption", {}, title), head, el("tbody", {}, ...bodyRows));
}
