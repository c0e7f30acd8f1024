/**
 * A chart over time as SVG, which is drawn anew when its numbers or its width change. It is a slider over
 * its points, so that a keyboard and a screen reader get at every value; a table of all of them is there
 * too, out of sight.
 */
import { el } from "../dom.js";
import { labelled, ticks } from "./axes.js";
import { moment, tick } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 220;
const TOP = 12;
const BOTTOM = 26;
const RIGHT = 8;
const LABEL = 72; // pixels that a time takes
const CHARACTER = 7;

/**
 * @typedef {object} Line
 * @property {string} name
 * @property {string} kind area, line or bar; bars stand on each other
 * @property {string} look a class of dashboard.css
 * @property {(row: object) => number | null} value null: nothing is known
 */

/**
 * @typedef {object} Picture
 * @property {string} title
 * @property {string} about
 * @property {Line[]} lines
 * @property {(value: number | null) => string} format
 * @property {boolean} [isWhole]
 * @property {(row: object) => string} [more] what else is said of a point
 */

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, String(value));
  }
  element.append(...children);
  return element;
}

export class Chart {
  /** @param {HTMLElement} figure @param {Picture} picture */
  constructor(figure, picture) {
    this.picture = picture;
    this.rows = [];
    this.step = "hour";
    this.chosen = null;
    const id = `${figure.id}-title`;
    this.drawing = svg("svg", { "aria-hidden": "true", height: HEIGHT });
    this.readout = el("p", { className: "readout small", hidden: true, "aria-hidden": "true" });
    this.plot = el(
      "div",
      { className: "plot", role: "slider", tabIndex: 0, "aria-labelledby": id, "aria-valuemin": 0 },
      this.drawing,
      this.readout,
    );
    this.table = el("div", { className: "visually-hidden" });
    figure.append(
      el("figcaption", { id }, el("span", { className: "title" }, picture.title), this.legend()),
      el("p", { className: "muted small" }, picture.about),
      this.plot,
      this.table,
    );
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  legend() {
    if (this.picture.lines.length < 2) {
      return null;
    }
    const entries = this.picture.lines.map(({ name, kind, look }) => {
      const mark = svg("svg", { width: 22, height: 12, "aria-hidden": "true" });
      mark.append(
        kind === "line"
          ? svg("path", { d: "M1 6H21", class: `stroke ${look}` })
          : svg("rect", { x: 4, y: 0, width: 12, height: 12, rx: 2, class: `fill ${look}` }),
      );
      return el("span", { className: "key" }, mark, name);
    });
    return el("span", { className: "legend small" }, ...entries);
  }

  /** @param {object[]} rows with `at`, the oldest first @param {string} step */
  show(rows, step) {
    const at = this.chosen === null ? null : this.rows[this.chosen]?.at;
    this.rows = rows;
    this.step = step;
    const found = rows.findIndex((row) => row.at === at);
    this.chosen = found < 0 ? null : found;
    this.fillTable();
    this.draw();
  }

  listen() {
    const keys = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
    this.plot.addEventListener("keydown", (event) => {
      const last = this.rows.length - 1;
      const now = this.chosen ?? last;
      const to = { Home: 0, End: last, Escape: null }[event.key];
      if (event.key in keys) {
        this.choose(Math.min(last, Math.max(0, now + keys[event.key])));
      } else if (to !== undefined) {
        this.choose(to);
      } else {
        return;
      }
      event.preventDefault();
    });
    this.plot.addEventListener("focus", () => this.choose(this.chosen ?? this.rows.length - 1));
    this.plot.addEventListener("blur", () => this.choose(null));
    const point = (event) => {
      const x = event.clientX - this.drawing.getBoundingClientRect().left - this.left;
      const n = Math.floor((x / this.wide) * this.rows.length);
      this.choose(Math.min(this.rows.length - 1, Math.max(0, n)));
    };
    this.plot.addEventListener("pointermove", point);
    this.plot.addEventListener("pointerdown", point);
    this.plot.addEventListener("pointerleave", () => {
      this.choose(document.activeElement === this.plot ? this.rows.length - 1 : null);
    });
  }

  choose(n) {
    this.chosen = this.rows.length > 0 ? n : null;
    this.mark();
  }

  /** What a point says. */
  words(n) {
    const row = this.rows[n];
    const { lines, format, more } = this.picture;
    const values = lines.map(({ name, value }) => `${name} ${format(value(row))}`);
    const soFar = n === this.rows.length - 1 ? " (so far)" : "";
    const rest = more?.(row);
    return `${moment(new Date(row.at), this.step)}${soFar}: ${[...values, ...(rest ? [rest] : [])].join(", ")}`;
  }

  x(n) {
    return this.left + ((n + 0.5) / this.rows.length) * this.wide;
  }

  y(value) {
    return HEIGHT - BOTTOM - (value / this.ends.at(-1)) * (HEIGHT - BOTTOM - TOP);
  }

  draw() {
    const width = this.plot.clientWidth;
    if (width === 0 || this.rows.length === 0) {
      return;
    }
    const { lines, format, isWhole } = this.picture;
    const bars = lines.filter(({ kind }) => kind === "bar");
    const tops = this.rows.map((row) => Math.max(sum(bars, row), ...lines.map(({ value }) => value(row) ?? 0)));
    this.ends = ticks(Math.max(...tops), isWhole);
    this.left = Math.max(...this.ends.map((end) => format(end).length)) * CHARACTER + 10;
    this.wide = Math.max(width - this.left - RIGHT, 1);
    this.cursor = svg("g", { class: "cursor" });
    this.drawing.setAttribute("width", width);
    this.drawing.replaceChildren(this.axes(), ...lines.map((line) => this.line(line, bars)), this.cursor);
    this.plot.setAttribute("aria-valuemax", this.rows.length - 1);
    this.mark();
  }

  axes() {
    const { format } = this.picture;
    const group = svg("g", { class: "axes" });
    for (const value of this.ends) {
      const y = this.y(value);
      group.append(
        svg("path", { d: `M${this.left} ${y}H${this.left + this.wide}`, class: value === 0 ? "base" : "" }),
        svg("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" }, format(value)),
      );
    }
    const span = new Date(this.rows.at(-1).at) - new Date(this.rows[0].at);
    let end = -Infinity;
    for (const n of labelled(this.rows.length, Math.max(1, this.wide / LABEL))) {
      const label = tick(new Date(this.rows[n].at), this.step, span);
      const half = (label.length * CHARACTER) / 2;
      const x = Math.min(Math.max(this.x(n), this.left + half), this.left + this.wide - half + RIGHT);
      if (x - half < end) {
        continue; // it would stand in the one before it
      }
      end = x + half + CHARACTER;
      group.append(
        svg("path", { d: `M${this.x(n)} ${HEIGHT - BOTTOM}v4`, class: "base" }),
        svg("text", { x, y: HEIGHT - 7, "text-anchor": "middle" }, label),
      );
    }
    return group;
  }

  line(line, bars) {
    if (line.kind === "bar") {
      return this.bars(line, bars.slice(0, bars.indexOf(line)));
    }
    const group = svg("g");
    for (const run of runs(this.rows.map(line.value))) {
      const points = run.map(([n, value]) => `${this.x(n)} ${this.y(value)}`);
      const path = `M${points.join("L")}`;
      if (line.kind === "area") {
        const [first, last] = [run[0][0], run.at(-1)[0]];
        const base = this.y(0);
        const closed = `${path}L${this.x(last)} ${base}L${this.x(first)} ${base}Z`;
        group.append(svg("path", { d: closed, class: `area ${line.look}` }));
      }
      group.append(svg("path", { d: path, class: `stroke ${line.look}` }));
      if (run.length === 1) {
        const [n, value] = run[0];
        group.append(svg("circle", { cx: this.x(n), cy: this.y(value), r: 3, class: `fill ${line.look}` }));
      }
    }
    return group;
  }

  bars(line, below) {
    const group = svg("g");
    const thick = Math.max(1, Math.min((this.wide / this.rows.length) * 0.72, 36));
    for (const [n, row] of this.rows.entries()) {
      const value = line.value(row);
      if (value) {
        const low = this.y(sum(below, row));
        const high = this.y(sum(below, row) + value);
        const height = Math.max(low - high, 1);
        group.append(
          svg("rect", { x: this.x(n) - thick / 2, y: low - height, width: thick, height, class: `fill ${line.look}` }),
        );
      }
    }
    return group;
  }

  mark() {
    const n = this.chosen;
    const now = n ?? this.rows.length - 1;
    if (now >= 0) {
      this.plot.setAttribute("aria-valuenow", now);
      this.plot.setAttribute("aria-valuetext", this.words(now));
    }
    this.readout.hidden = n === null;
    if (n === null || this.cursor === undefined) {
      this.cursor?.replaceChildren();
      return;
    }
    this.readout.textContent = this.words(n);
    this.readout.classList.toggle("left", this.x(n) > this.left + this.wide / 2);
    this.cursor.replaceChildren(svg("path", { d: `M${this.x(n)} ${TOP}V${HEIGHT - BOTTOM}` }));
  }

  fillTable() {
    const { title, lines, format } = this.picture;
    const rows = this.rows.map((row) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, moment(new Date(row.at), this.step)),
        ...lines.map(({ value }) => el("td", {}, format(value(row)))),
      ),
    );
    const heads = ["From", ...lines.map(({ name }) => name)];
    this.table.replaceChildren(
      el(
        "table",
        {},
        el("caption", {}, title),
        el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
        el("tbody", {}, ...rows),
      ),
    );
  }
}

function sum(lines, row) {
  return lines.reduce((all, { value }) => all + (value(row) ?? 0), 0);
}

/** Stretches of known values, each as [position, value]. */
function runs(values) {
  const found = [];
  let run = [];
  for (const [n, value] of values.entries()) {
    if (value === null) {
      run = [];
    } else {
      if (run.length === 0) {
        found.push(run);
      }
      run.push([n, value]);
    }
  }
  return found;
}
