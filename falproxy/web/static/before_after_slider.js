/**
 * The images before and after, on top of each other, with a slider that moves the dividing line.
 */
import { el } from "./dom.js";

/**
 * @param {string} beforeUrl
 * @param {HTMLImageElement} afterImage
 * @returns {HTMLElement}
 */
export function beforeAfterSlider(beforeUrl, afterImage) {
  const slider = el("input", {
    type: "range",
    min: 0,
    max: 100,
    step: 1,
    value: 50,
    "aria-label": "Visible part of the image before the edit",
  });
  const frame = el(
    "div",
    { className: "compare" },
    afterImage,
    el("img", { className: "before", src: beforeUrl, alt: "Image before", draggable: false }),
    el("span", { className: "tag left", "aria-hidden": "true" }, "Before"),
    el("span", { className: "tag right", "aria-hidden": "true" }, "After"),
    el("span", { className: "divider", "aria-hidden": "true" }),
    slider,
  );
  const update = () => {
    frame.style.setProperty("--divider", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % before`);
  };
  slider.addEventListener("input", update);
  update();
  return frame;
}
