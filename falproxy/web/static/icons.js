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
  minus: "M4.5 10h11",
  key: "M12.5 11a3.5 3.5 0 1 0-3.3-2.3L4 14v2.5h2.5V15H8v-1.5h1.5l1.2-1.2M13.2 7.2v.1",
  chevron: "M5.5 8l4.5 4.5L14.5 8",
  play: "M7 4.5v11l8.5-5.5z",
  code: "M7 6l-4 4 4 4m6-8l4 4-4 4",
  share: "M10 12V3.5m0 0L7 6.5m3-3l3 3M5 10v6.5h10V10",
  dice: "M4.5 4.5h11v11h-11zM7.5 7.5v.1m5 0v.1m-2.5 2.3v.1m-2.5 2.4v.1m5-.1v.1",
  lock: "M5.5 9h9v7.5h-9zM7.5 9V6.5a2.5 2.5 0 0 1 5 0V9",
  unlock: "M5.5 9h9v7.5h-9zM7.5 9V6a2.5 2.5 0 0 1 4.8-1",
  more: "M4 10a1 1 0 1 0 2 0 1 1 0 1 0-2 0m5 0a1 1 0 1 0 2 0 1 1 0 1 0-2 0m5 0a1 1 0 1 0 2 0 1 1 0 1 0-2 0",
  search: "M9 4a5 5 0 1 1 0 10A5 5 0 0 1 9 4zm3.8 8.8L16.5 16.5",
  brush: "M16 4l-6.5 6.5m-1 1.5a2.5 2.5 0 0 0-3 2.5c0 1-.5 1.5-1.5 1.5 2.5 1.5 6 .5 6-2.5z",
  undo: "M7.5 5L4 8.5 7.5 12M4 8.5h7.5a4 4 0 0 1 0 8H9",
  grid: "M4 4h5v5H4zm7 0h5v5h-5zM4 11h5v5H4zm7 0h5v5h-5z",
  variation:
    "M4 6h2.5l7 8H16m-12 0h2.5l2-2.3m3-3.4l2-2.3H16m-2-2.5L16.5 6 14 8.5m0 3l2.5 2.5L14 16.5",
  left: "M12 5l-5 5 5 5",
  right: "M8 5l5 5-5 5",
  image: "M4 4.5h12v11H4zm0 8.5l3.5-3.5 3 3 2-2L16 13.5M12.5 7.5v.1",
  film: "M4 5h12v10H4zm3.5 0v10m5-10v10M4 10h12",
  sound: "M4 8v4h2.5L10 15V5L6.5 8zm8.5-.5a3.5 3.5 0 0 1 0 5m2-7a6 6 0 0 1 0 9",
  sparkle: "M10 3.5l1.6 4.400 4.400 1.6-4.400 1.6L10 15.5l-1.6-4.400L4 9.5l4.400-1.6z",
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
