/** The dialog with the code for a request. */
import { createSnippets, fileMark } from "./code_snippets.js";
import { el } from "./dom.js";
import { icon } from "./icons.js";
import { copyText } from "./image_actions.js";
import { announce } from "./job_rows.js";
import { proxyInfo } from "./proxy_status.js";
import { readStored, writeStored } from "./stored_values.js";

/**
 * @param {{endpoint: string, task: string | null, prompt: string, promptName: string, options: object,
 *   imageInputs: {name: string, isMany: boolean, images: object[]}[], output?: object | null}} request
 */
export function openCodeDialog({
  endpoint,
  task,
  prompt,
  promptName,
  options,
  imageInputs,
  output = null,
}) {
  const { input, files } = describeImages(imageInputs);
  const snippets = createSnippets({
    endpoint,
    task: task ?? "",
    input: { ...(prompt && { [promptName]: prompt }), ...options, ...input },
    files,
    base: new URL(".", document.baseURI).href,
    isLocked: proxyInfo.isLocked,
    output,
  });
  const code = el("pre", {
    className: "code mono small",
    tabIndex: 0,
    id: "code-panel",
    role: "tabpanel",
  });
  const tabs = snippets.map(({ id, label }, index) =>
    el(
      "button",
      {
        type: "button",
        role: "tab",
        id: `code-tab-${id}`,
        "aria-controls": "code-panel",
        onclick: () => show(index),
      },
      label,
    ),
  );
  const copyLabel = el("span", {}, "Copy");
  const copy = el(
    "button",
    { type: "button", className: "button primary", onclick: copyCode },
    icon("paste"),
    copyLabel,
  );
  const close = () => dialog.close();
  const dialog = el(
    "dialog",
    { className: "code-dialog", "aria-labelledby": "code-title" },
    el(
      "div",
      { className: "dialog-head" },
      el("h2", { id: "code-title" }, "Copy code"),
      el(
        "button",
        { type: "button", className: "button quiet square", "aria-label": "Close", onclick: close },
        icon("close"),
      ),
    ),
    el(
      "div",
      { className: "tabs", role: "tablist", "aria-label": "Language", onkeydown: moveTab },
      ...tabs,
    ),
    code,
    el(
      "div",
      { className: "row dialog-bar" },
      Object.keys(files).length > 0 &&
        el("p", { className: "small muted" }, "The files are read from the current directory."),
      el("span", { className: "spacer" }),
      copy,
    ),
  );
  let current = Math.max(
    0,
    snippets.findIndex(({ id }) => id === readStored("code")),
  );

  function show(index) {
    current = index;
    writeStored("code", snippets[index].id);
    tabs.forEach((tab, position) => {
      tab.setAttribute("aria-selected", String(position === index));
      tab.tabIndex = position === index ? 0 : -1;
    });
    code.textContent = snippets[index].code;
    code.setAttribute("aria-labelledby", tabs[index].id);
    copyLabel.textContent = "Copy";
  }

  function moveTab(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step !== undefined) {
      show((current + step + tabs.length) % tabs.length);
      tabs[current].focus();
    }
  }

  async function copyCode() {
    const isCopied = await copyText(snippets[current].code);
    copyLabel.textContent = isCopied ? "Copied" : "Not copied";
    announce(
      isCopied
        ? "The code is in the clipboard."
        : "The browser does not allow the page to use the clipboard.",
    );
  }

  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  show(current);
  dialog.showModal();
  tabs[current].focus();
}

/** Return the image inputs with URLs, and marks in place of files and data URIs. */
function describeImages(imageInputs) {
  const input = {};
  const files = {};
  const used = new Set();
  for (const { name, isMany, images } of imageInputs) {
    const values = images.map(({ file, url }) => {
      if (url !== undefined && !url.startsWith("data:")) {
        return url;
      }
      const fileName = uniqueName(file?.name || "image.png", used);
      (files[name] ??= []).push(fileName);
      return fileMark(fileName);
    });
    if (values.length > 0) {
      input[name] = isMany ? values : values[0];
    }
  }
  return { input, files };
}

function uniqueName(name, used) {
  let unique = name;
  for (let number = 2; used.has(unique); number += 1) {
    unique = name.replace(/(\.\w+)?$/, `-${number}$1`);
  }
  used.add(unique);
  return unique;
}
