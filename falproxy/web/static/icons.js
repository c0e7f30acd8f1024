/** Icons for buttons: 20 x 20 pixels, in the color of the text. */

const PATHS = {
  upload: "M10 13V4m0 0L6.5 7.5M10 4l3.5 3.5M4 13v2.5h12V13",
  paste: "M7.5 4H5v12.5h10V4h-2.5M7.5 3h5v2.5h-5z",
  link: "M8.5 11.5l3-3M9 6.5l1.3-1.3a3.2 3.2 0 0 1 4.5 4.5L13.5 11M6.5 9L5.2 10.3a3.2 3.2 0 0 0 4.5 4.5L11 13.5",
  close: "M5 5l10 10M15 5L5 15",
  download: "M10 4v8.5m0 0l-3.5-3.5m3.5 3.5l3.5-3.5M4 16h12",
  zoom: "M9 4.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9zm3.3 7.8L16 16M9 7v4M7 9h4",
  compare: "M10 3v14M4 5h4v10H4zm8 0h4v10h-4z",
  reuse: "M4 10a6 6 0 0 1 10.5-4M14.5 3v3.2h-3.2M16 10a6 6 0 0 1-10.5 4m0 3v-3.2h3.2",
  edit: "M4 16l.8-3.2L13 4.5l2.5 2.5-8.3 8.2zM11.5 6l2.5 2.5",
  trash: "M4.5 6h11M8 6V4h4v2M6 6l.7 10h6.6L14 6",
  plus: "M10 4.5v11M4.5 10h11",
};
const SVG = "http://www.w3.org/2000/svg";

/**
 * Create an icon. It is hidden from screen readers: the button has a text or a label.
 *
 * @param {keyof typeof PATHS} name
 * @returns {SVGElement}
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  for (const [key, value] of Object.entries({
    viewBox: "0 0 20 20",
    width: "18",
    height: "18",
    "aria-hidden": "true",
    class: "icon",
  })) {
    svg.setAttribute(key, value);
  }
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}
