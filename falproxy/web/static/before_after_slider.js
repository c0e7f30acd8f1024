/** Before and after, one over the other, with a slider that says where one ends: mouse, touch, keys. */
import { el } from "./dom.js";

/**
 * @param {string} before address of a picture
 * @param {HTMLImageElement} after
 * @returns {HTMLElement}
 */
export function compare(before, after) {
  const slider = el("input", {
    type: "range",
    min: 0,
    max: 100,
    step: 1,
    value: 50,
    "aria-label": "How much of the picture before is shown",
  });
  const frame = el(
    "div",
    { className: "compare" },
    after,
    el("img", { className: "before", src: before, alt: "The picture before", draggable: false }),
    el("span", { className: "tag left", "aria-hidden": "true" }, "Before"),
    el("span", { className: "tag right", "aria-hidden": "true" }, "After"),
    el("span", { className: "edge", "aria-hidden": "true" }),
    slider,
  );
  const show = () => {
    frame.style.setProperty("--cut", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % before`);
  };
  slider.addEventListener("input", show);
  show();
  return frame;
}
