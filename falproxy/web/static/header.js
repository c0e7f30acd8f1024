/**
 * The header of all pages: brand, tasks, pages and the state of the proxy. A page has an empty
 * `<header class="header" id="header">`, whose height is reserved by base.css.
 */
import { byId, el } from "./dom.js";

const PAGES = [
  ["dashboard", "Dashboard"],
  ["docs", "API"],
];

/** Tasks of the page at `/`, in their order. */
export const TASKS = { create: "Create", edit: "Edit", animate: "Animate", speak: "Speak" };

/**
 * Render the header.
 *
 * @param {"page" | "dashboard" | "docs"} current the page that is shown
 */
export function renderHeader(current) {
  const base = current === "page" ? "" : "./";
  const icon = new URL("icon.svg", import.meta.url).href;
  byId("header").replaceChildren(
    el(
      "a",
      { className: "brand", href: "./", "aria-label": "falproxy" },
      el("img", { src: icon, alt: "", width: 24, height: 24 }),
      el("span", {}, "falproxy"),
    ),
    el(
      "nav",
      { className: "tasks", "aria-label": "Tasks" },
      ...Object.entries(TASKS).map(([task, label]) =>
        taskLink(`${base}#task=${task}`, task, label),
      ),
    ),
    el(
      "nav",
      { className: "pages", "aria-label": "Pages" },
      ...PAGES.map(([page, label]) => {
        const link = el("a", { href: page }, label);
        if (page === current) {
          link.setAttribute("aria-current", "page");
        }
        return link;
      }),
    ),
    el("div", { className: "status-chips", id: "proxy-status", role: "status" }),
  );
}

function taskLink(href, task, label) {
  const link = el("a", { href }, label);
  link.dataset.task = task;
  return link;
}

/** Show the tasks that the proxy allows, and mark the current one. */
export function renderTasks(allowed, current) {
  for (const link of document.querySelectorAll(".tasks a")) {
    link.hidden = !allowed.includes(link.dataset.task);
    if (link.dataset.task === current) {
      link.setAttribute("aria-current", "true");
    } else {
      link.removeAttribute("aria-current");
    }
  }
}
