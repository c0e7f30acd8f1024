/** The legend of a chart, and elements of SVG. */
import { el } from "../dom.js";

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, String(value));
  }
  element.append(...children);
  return element;
}

/** Return the legend of several lines; null for a single one. */
export function createLegend(lines) {
  if (lines.length < 2) {
    return null;
  }
  const entries = lines.map(({ name, kind, className }) => {
    const symbol = svg("svg", { width: 22, height: 12, "aria-hidden": "true" });
    symbol.append(
      kind === "line"
        ? svg("path", { d: "M1 6H21", class: `stroke ${className}` })
        : svg("rect", { x: 4, y: 0, width: 12, height: 12, rx: 2, class: `fill ${className}` }),
    );
    return el("span", { className: "legend-entry" }, symbol, name);
  });
  return el("span", { className: "legend small" }, ...entries);
}
