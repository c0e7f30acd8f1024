/** A picture as large as it is, in a dialog. Keys: plus, minus, 0 for all of it. */
import { el } from "./dom.js";
import { icon } from "./icons.js";

const STEPS = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4];

/** @param {string} url @param {string} alt */
export function zoom(url, alt) {
  let scale = null; // null fits the window
  const image = el("img", { src: url, alt });
  const view = el(
    "div",
    {
      className: "zoom-view",
      tabIndex: 0,
      role: "group",
      "aria-label": "Picture, scrolls with the arrow keys",
    },
    image,
  );
  const says = el("output", { className: "mono small" });
  const button = (label, onclick, ...content) =>
    el(
      "button",
      { type: "button", className: "button square", "aria-label": label, onclick },
      ...content,
    );
  const dialog = el(
    "dialog",
    { className: "zoom", "aria-label": "Zoom" },
    el(
      "div",
      { className: "zoom-bar row" },
      button("Smaller", () => step(-1), "−"),
      says,
      button("Larger", () => step(1), "+"),
      el("button", { type: "button", className: "button", onclick: () => show(null) }, "Fit"),
      el(
        "button",
        { type: "button", className: "button last", onclick: () => dialog.close() },
        icon("close"),
        "Close",
      ),
    ),
    view,
  );

  function show(next) {
    scale = next;
    view.classList.toggle("fits", scale === null);
    image.style.width = scale === null ? "" : `${image.naturalWidth * scale}px`;
    says.textContent = scale === null ? "Fits" : `${Math.round(scale * 100)} %`;
  }

  function step(direction) {
    const now = scale ?? image.clientWidth / (image.naturalWidth || 1);
    const next =
      direction > 0
        ? STEPS.find((one) => one > now + 0.01)
        : STEPS.findLast((one) => one < now - 0.01);
    show(next ?? now);
  }

  dialog.addEventListener("keydown", ({ key }) => {
    const does = {
      "+": () => step(1),
      "=": () => step(1),
      "-": () => step(-1),
      0: () => show(null),
    }[key];
    does?.();
  });
  dialog.addEventListener("close", () => dialog.remove());
  image.addEventListener("click", () => show(scale === null ? 1 : null));
  document.body.append(dialog);
  show(null);
  dialog.showModal();
  view.focus();
}
