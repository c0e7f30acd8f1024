/** Files with comma separated values. */
import { el } from "../dom.js";

/** Save a text as a file. @param {string} name @param {Blob} content */
export function saveFile(name, content) {
  const url = URL.createObjectURL(content);
  const link = el("a", { href: url, download: name, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/**
 * Return rows as CSV. A text that a spreadsheet would calculate gets an apostrophe.
 *
 * @param {(string | number | null)[][]} rows
 */
function toCsv(rows) {
  return rows.map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

/** Save rows as a file. @param {string} name of the file, without ending */
export function saveCsv(name, rows) {
  saveFile(`falproxy-${name}.csv`, new Blob([toCsv(rows)], { type: "text/csv" }));
}

function cell(value) {
  if (value === null || value === undefined) {
    return "";
  }
  const text =
    typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/**
 * Add a button to the head of a panel that saves rows as CSV.
 *
 * @param {HTMLElement} panel @param {string} name of the file, without ending
 * @param {() => (string | number | null)[][]} getRows
 */
export function addExportButton(panel, name, getRows) {
  const heading = panel.querySelector("h2");
  let head = heading.parentElement;
  if (!head.classList.contains("panel-head")) {
    head = el("div", { className: "row panel-head" });
    heading.replaceWith(head);
    head.append(heading);
  }
  head.append(
    el(
      "button",
      {
        type: "button",
        className: "button quiet",
        "aria-label": `Export ${heading.textContent} as CSV`,
        onclick: () => saveCsv(name, getRows()),
      },
      "CSV",
    ),
  );
}
