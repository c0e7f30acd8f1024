/** The buttons for a result. Those that have no room are in a menu. */
import { el } from "./dom.js";
import { icon } from "./icons.js";
import { copyText, downloadAll, downloadImage } from "./image_actions.js";
import { announce } from "./job_rows.js";
import { isImage } from "./media.js";
import { onlyOnce } from "./repeat_filter.js";

/**
 * @typedef {object} ResultActions
 * @property {(job: object) => void} onReuse fill the form with the inputs and the seed
 * @property {(job: object) => void} onVariation run the same inputs with another seed
 * @property {(job: object) => void} onLockSeed
 * @property {(job: object, index: number) => void} onInput use the image as an input
 * @property {(job: object, index: number) => void} onCompare
 * @property {(job: object) => void} onCode
 * @property {(job: object) => void} onShare
 * @property {() => void} [onGrid] show all images of the result again
 */

/**
 * @param {import("./jobs.js").Job} job
 * @param {number | null} index of the shown file; null: all are shown
 * @param {ResultActions} actions
 */
export function createToolbar(job, index, actions) {
  const file = job.images[index ?? 0];
  const isStill = isImage(file);
  const isNarrow = window.matchMedia("(max-width: 767px)").matches;
  const download =
    index === null
      ? action("download", "Download all", () => downloadAll(job))
      : action("download", "Download", () => downloadImage(job, index));
  download.className = "button primary";
  const grid = actions.onGrid && action("grid", "All images", actions.onGrid);
  const others = [
    action(
      "variation",
      "New variation",
      onlyOnce(() => actions.onVariation(job)),
    ),
    isStill && index !== null && action("edit", "Use as input", () => actions.onInput(job, index)),
    isStill && action("compare", "Compare", () => actions.onCompare(job, index ?? 0)),
    action("code", "Copy code", () => actions.onCode(job)),
    action("share", "Share", () => actions.onShare(job)),
  ];
  const rest = [
    index !== null && action("link", "Copy URL", (event) => copyUrl(event.currentTarget, file.url)),
    job.seed !== null && action("lock", "Lock seed", () => actions.onLockSeed(job)),
  ];
  const reuse = action("reuse", "Edit and rerun", () => actions.onReuse(job));
  const [second, ...more] = [grid, reuse, ...others].filter(Boolean);
  const [shown, hidden] = isNarrow
    ? [
        [download, second],
        [...more, ...rest],
      ]
    : [[download, second, ...more], rest];
  const inMenu = hidden.filter(Boolean);
  return el(
    "div",
    {
      className: `row toolbar ${grid ? "has-grid" : ""}`,
      role: "group",
      "aria-label": "Actions for this result",
    },
    ...shown,
    inMenu.length > 0 && createMenu(inMenu),
  );
}

function action(name, label, onclick) {
  return el(
    "button",
    { type: "button", className: "button quiet", title: label, onclick },
    icon(name),
    el("span", {}, label),
  );
}

function createMenu(items) {
  const summary = el(
    "summary",
    { className: "button quiet square", title: "More actions", "aria-label": "More actions" },
    icon("more"),
  );
  return el(
    "details",
    { className: "menu" },
    summary,
    el("div", { className: "menu-items" }, ...items),
  );
}

async function copyUrl(button, url) {
  const label = button.lastChild;
  const isCopied = await copyText(url);
  label.textContent = isCopied ? "Copied" : "Not copied";
  announce(
    isCopied
      ? "The URL is in the clipboard."
      : "The browser does not allow the page to use the clipboard.",
  );
  setTimeout(() => (label.textContent = "Copy URL"), 2500);
}
