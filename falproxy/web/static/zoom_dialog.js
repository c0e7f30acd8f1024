/**
 * A dialog with an image at full size. Keys: plus and minus zoom, 0 fits the image to the window.
 */
import { el } from "./dom.js";
import { icon } from "./icons.js";

const SCALES = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4];

/** @param {string} url @param {string} alt */
export function openZoomDialog(url, alt) {
  let scale = null; // null: fit to the window
  const image = el("img", { src: url, alt });
  const view = el(
    "div",
    {
      className: "zoom-view",
      tabIndex: 0,
      role: "group",
      "aria-label": "Image, scrolls with the arrow keys",
    },
    image,
  );
  const scaleOutput = el("output", { className: "mono small" });
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
      button("Smaller", () => changeScale(-1), "−"),
      scaleOutput,
      button("Larger", () => changeScale(1), "+"),
      el("button", { type: "button", className: "button", onclick: () => setScale(null) }, "Fit"),
      el(
        "button",
        { type: "button", className: "button last", onclick: () => dialog.close() },
        icon("close"),
        "Close",
      ),
    ),
    view,
  );

  function setScale(newScale) {
    scale = newScale;
    view.classList.toggle("fits", scale === null);
    image.style.width = scale === null ? "" : `${image.naturalWidth * scale}px`;
    scaleOutput.textContent = scale === null ? "Fits" : `${Math.round(scale * 100)} %`;
  }

  function changeScale(direction) {
    const current = scale ?? image.clientWidth / (image.naturalWidth || 1);
    const next =
      direction > 0
        ? SCALES.find((step) => step > current + 0.01)
        : SCALES.findLast((step) => step < current - 0.01);
    setScale(next ?? current);
  }

  dialog.addEventListener("keydown", ({ key }) => {
    const action = {
      "+": () => changeScale(1),
      "=": () => changeScale(1),
      "-": () => changeScale(-1),
      0: () => setScale(null),
    }[key];
    action?.();
  });
  dialog.addEventListener("close", () => dialog.remove());
  image.addEventListener("click", () => setScale(scale === null ? 1 : null));
  document.body.append(dialog);
  setScale(null);
  dialog.showModal();
  view.focus();
}
