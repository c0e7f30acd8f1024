/**
 * A chart over time as SVG, rendered again when its data or its width changes. For keyboards and
 * screen readers it is a slider over its points, and all values are also in a visually hidden
 * table.
 */
import { el } from "../dom.js";
import { axisTicks, labeledIndexes } from "./axes.js";
import { createLegend, svg } from "./chart_legend.js";
import { createStartLines, describeStarts, startsOfRows } from "./chart_marks.js";
import { createTable } from "./chart_table.js";
import { formatAxisTime, formatIntervalStart } from "./format.js";

const HEIGHT = 220;
const TOP = 12;
const BOTTOM = 26;
const RIGHT = 8;
const LABEL_WIDTH = 72; // pixels of a time label
const CHARACTER_WIDTH = 7;

/**
 * @typedef {object} Line
 * @property {string} name
 * @property {string} kind area, line or bar; bars are stacked
 * @property {string} className of dashboard.css
 * @property {(row: object) => number | null} value null: unknown
 */

/**
 * @typedef {object} ChartSpec
 * @property {string} title
 * @property {string} description
 * @property {Line[]} lines
 * @property {(value: number | null) => string} format
 * @property {boolean} [isWhole] whether the values are whole numbers
 * @property {(row: object) => string} [extra] an additional text for a point
 */

export class Chart {
  /** @param {HTMLElement} figure @param {ChartSpec} spec */
  constructor(figure, spec) {
    this.spec = spec;
    this.rows = [];
    this.startsByRow = [];
    this.step = "hour";
    this.selected = null; // index of a row
    const id = `${figure.id}-title`;
    this.graphic = svg("svg", { "aria-hidden": "true", height: HEIGHT });
    this.tooltip = el("p", { className: "tooltip small", hidden: true, "aria-hidden": "true" });
    this.empty = el(
      "p",
      { className: "muted empty-chart", hidden: true },
      "Nothing in this time range.",
    );
    this.plot = el(
      "div",
      { className: "plot", role: "slider", tabIndex: 0, "aria-labelledby": id, "aria-valuemin": 0 },
      this.graphic,
      this.empty,
      this.tooltip,
    );
    this.table = el("div", { className: "visually-hidden" });
    figure.prepend(
      el(
        "figcaption",
        { id },
        el("span", { className: "title" }, spec.title),
        createLegend(spec.lines),
      ),
      el("p", { className: "muted small" }, spec.description),
      this.plot,
      this.table,
    );
    this.addListeners();
    new ResizeObserver(() => this.render()).observe(this.plot);
  }

  /**
   * @param {object[]} rows with `at`, oldest first @param {string} step
   * @param {object[]} starts of processes, oldest first
   */
  setRows(rows, step, starts) {
    const selectedTime = this.selected === null ? null : this.rows[this.selected]?.at;
    this.rows = rows;
    this.step = step;
    this.startsByRow = startsOfRows(rows, starts);
    const index = rows.findIndex((row) => row.at === selectedTime);
    this.selected = index < 0 ? null : index;
    this.table.replaceChildren(createTable(this));
    this.render();
  }

  addListeners() {
    const moves = {
      ArrowLeft: -1,
      ArrowDown: -1,
      ArrowRight: 1,
      ArrowUp: 1,
      PageDown: -10,
      PageUp: 10,
    };
    this.plot.addEventListener("keydown", (event) => {
      const last = this.rows.length - 1;
      const current = this.selected ?? last;
      const target = { Home: 0, End: last, Escape: null }[event.key];
      if (event.key in moves) {
        this.select(Math.min(last, Math.max(0, current + moves[event.key])));
      } else if (target !== undefined) {
        this.select(target);
      } else {
        return;
      }
      event.preventDefault();
    });
    this.plot.addEventListener("focus", () => this.select(this.selected ?? this.rows.length - 1));
    this.plot.addEventListener("blur", () => this.select(null));
    const selectAtPointer = (event) => {
      const x = event.clientX - this.graphic.getBoundingClientRect().left - this.left;
      const n = Math.floor((x / this.plotWidth) * this.rows.length);
      this.select(Math.min(this.rows.length - 1, Math.max(0, n)));
    };
    this.plot.addEventListener("pointermove", selectAtPointer);
    this.plot.addEventListener("pointerdown", selectAtPointer);
    this.plot.addEventListener("pointerleave", () => {
      this.select(document.activeElement === this.plot ? this.rows.length - 1 : null);
    });
  }

  /** Return the values as rows of a CSV file. */
  exportedRows() {
    const { lines } = this.spec;
    const rows = this.rows.map((row) => [row.at, ...lines.map(({ value }) => value(row))]);
    return [["from", ...lines.map(({ name }) => name)], ...rows];
  }

  select(n) {
    this.selected = this.rows.length > 0 ? n : null;
    this.renderSelection();
  }

  /** Return the time and the values of a point as a text. */
  describePoint(n) {
    const row = this.rows[n];
    const { lines, format, extra } = this.spec;
    const values = lines.map(({ name, value }) => `${name} ${format(value(row))}`);
    const soFar = n === this.rows.length - 1 ? " (so far)" : "";
    const extraText = extra?.(row);
    const start = formatIntervalStart(new Date(row.at), this.step);
    const text = `${start}${soFar}: ${[...values, ...(extraText ? [extraText] : [])].join(", ")}`;
    const starts = describeStarts(this.startsByRow[n]);
    return starts === "" ? text : `${text}. ${starts}`;
  }

  /** part: of the interval, from 0 to 1. */
  x(n, part = 0.5) {
    return this.left + ((n + part) / this.rows.length) * this.plotWidth;
  }

  y(value) {
    return HEIGHT - BOTTOM - (value / this.ticks.at(-1)) * (HEIGHT - BOTTOM - TOP);
  }

  render() {
    const width = this.plot.clientWidth;
    if (width === 0 || this.rows.length === 0) {
      return;
    }
    const { lines, format, isWhole } = this.spec;
    const bars = lines.filter(({ kind }) => kind === "bar");
    const values = (row) => [sumOf(bars, row), ...lines.map(({ value }) => value(row) ?? 0)];
    const max = Math.max(...this.rows.flatMap(values));
    this.empty.hidden = max > 0;
    this.graphic.toggleAttribute("hidden", max === 0); // no axes of nothing
    this.ticks = axisTicks(max, isWhole);
    const tickLength = Math.max(...this.ticks.map((value) => format(value).length));
    this.left = tickLength * CHARACTER_WIDTH + 10;
    this.plotWidth = Math.max(width - this.left - RIGHT, 1);
    this.cursor = svg("g", { class: "cursor" });
    this.graphic.setAttribute("width", width);
    const shapes = lines.map((line) => this.createLine(line, bars));
    const place = (n, part) => this.x(n, part);
    const startLines = createStartLines(this.startsByRow, place, TOP, HEIGHT - BOTTOM);
    this.graphic.replaceChildren(this.createAxes(), ...shapes, startLines, this.cursor);
    this.plot.setAttribute("aria-valuemax", this.rows.length - 1);
    this.renderSelection();
  }

  createAxes() {
    const { format } = this.spec;
    const group = svg("g", { class: "axes" });
    for (const value of this.ticks) {
      const y = this.y(value);
      const d = `M${this.left} ${y}H${this.left + this.plotWidth}`;
      group.append(
        svg("path", { d, class: value === 0 ? "base" : "" }),
        svg("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" }, format(value)),
      );
    }
    const span = new Date(this.rows.at(-1).at) - new Date(this.rows[0].at);
    const maxLabels = Math.max(1, this.plotWidth / LABEL_WIDTH);
    let previousEnd = -Infinity;
    for (const n of labeledIndexes(this.rows.length, maxLabels)) {
      const label = formatAxisTime(new Date(this.rows[n].at), this.step, span);
      const half = (label.length * CHARACTER_WIDTH) / 2;
      const max = this.left + this.plotWidth - half + RIGHT;
      const x = Math.min(Math.max(this.x(n), this.left + half), max);
      if (x - half < previousEnd) {
        continue; // it would overlap the previous label
      }
      previousEnd = x + half + CHARACTER_WIDTH;
      group.append(
        svg("path", { d: `M${this.x(n)} ${HEIGHT - BOTTOM}v4`, class: "base" }),
        svg("text", { x, y: HEIGHT - 7, "text-anchor": "middle" }, label),
      );
    }
    return group;
  }

  createLine(line, bars) {
    if (line.kind === "bar") {
      return this.createBars(line, bars.slice(0, bars.indexOf(line)));
    }
    const { className } = line;
    const group = svg("g");
    for (const segment of knownSegments(this.rows.map(line.value))) {
      const points = segment.map(([n, value]) => `${this.x(n)} ${this.y(value)}`);
      const path = `M${points.join("L")}`;
      if (line.kind === "area") {
        const [first, last] = [segment[0][0], segment.at(-1)[0]];
        const base = this.y(0);
        const closedPath = `${path}L${this.x(last)} ${base}L${this.x(first)} ${base}Z`;
        group.append(svg("path", { d: closedPath, class: `area ${className}` }));
      }
      group.append(svg("path", { d: path, class: `stroke ${className}` }));
      if (segment.length === 1) {
        const [n, value] = segment[0];
        const center = { cx: this.x(n), cy: this.y(value), r: 3 };
        group.append(svg("circle", { ...center, class: `fill ${className}` }));
      }
    }
    return group;
  }

  /** below: the bars that this one is stacked on. */
  createBars(line, below) {
    const group = svg("g");
    const width = Math.max(1, Math.min((this.plotWidth / this.rows.length) * 0.72, 36));
    for (const [n, row] of this.rows.entries()) {
      const value = line.value(row);
      if (value) {
        const bottom = this.y(sumOf(below, row));
        const top = this.y(sumOf(below, row) + value);
        const height = Math.max(bottom - top, 1);
        const box = { x: this.x(n) - width / 2, y: bottom - height, width, height };
        group.append(svg("rect", { ...box, class: `fill ${line.className}` }));
      }
    }
    return group;
  }

  renderSelection() {
    const n = this.selected;
    const current = n ?? this.rows.length - 1;
    if (current >= 0) {
      this.plot.setAttribute("aria-valuenow", current);
      this.plot.setAttribute("aria-valuetext", this.describePoint(current));
    }
    this.tooltip.hidden = n === null;
    if (n === null || this.cursor === undefined) {
      this.cursor?.replaceChildren();
      return;
    }
    this.tooltip.textContent = this.describePoint(n);
    this.tooltip.classList.toggle("left", this.x(n) > this.left + this.plotWidth / 2);
    this.cursor.replaceChildren(svg("path", { d: `M${this.x(n)} ${TOP}V${HEIGHT - BOTTOM}` }));
  }
}

function sumOf(lines, row) {
  return lines.reduce((sum, { value }) => sum + (value(row) ?? 0), 0);
}

/** Split values at the unknown ones. Return lists of [index, value]. */
function knownSegments(values) {
  const segments = [];
  let segment = [];
  for (const [n, value] of values.entries()) {
    if (value === null) {
      segment = [];
    } else {
      if (segment.length === 0) {
        segments.push(segment);
      }
      segment.push([n, value]);
    }
  }
  return segments;
}
