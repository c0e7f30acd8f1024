/** Comparison of a result with its input image, or with any other result: side by side, slider, hold. */
import { el, safeUrl } from "./dom.js";
import { icon } from "./icons.js";
import { isImage } from "./media.js";
import { readStored, writeStored } from "./stored_values.js";

const MODES = { slider: "Slider", sides: "Side by side", hold: "Hold" };
const OTHERS_MAX = 100; // results to choose from

/**
 * @param {import("./jobs.js").Job} job
 * @param {number} index
 * @param {import("./jobs.js").Job[]} jobs all jobs, newest first
 */
export function openCompareDialog(job, index, jobs) {
  const before = job.before instanceof Blob ? URL.createObjectURL(job.before) : safeUrl(job.before);
  const results = jobs
    .filter(({ state, images }) => state === "done" && images.length > 0 && isImage(images[0]))
    .slice(0, OTHERS_MAX)
    .flatMap((other) => other.images.map((image, position) => ({ job: other, image, position })))
    .filter((choice) => choice.job.id !== job.id || choice.position !== index);
  const choices = [
    ...(before ? [{ label: "Input image", tag: "Before", url: before }] : []),
    ...results.map(({ job: other, image, position }) => ({
      label: labelOf(other, position),
      tag: other.model,
      url: image.url,
    })),
  ];
  const stage = el("div", { className: "compare-stage" });
  const select = el(
    "select",
    { id: "compare-with", "aria-label": "Compare with" },
    ...choices.map(({ label }, position) => el("option", { value: position }, label)),
  );
  const isKnown = Object.hasOwn(MODES, readStored("compare"));
  const radios = Object.entries(MODES).map(([mode, label]) => {
    const props = { type: "radio", name: "compare-mode", value: mode, onchange: () => render() };
    const input = el("input", {
      ...props,
      checked: mode === (isKnown ? readStored("compare") : "slider"),
    });
    return el("label", { className: "row small" }, input, label);
  });
  const bar = el(
    "div",
    { className: "row dialog-bar" },
    el("div", { className: "row", role: "radiogroup", "aria-label": "Mode" }, ...radios),
    el(
      "label",
      { className: "row small compare-with", for: "compare-with" },
      "Compare with",
      select,
    ),
  );
  const close = () => dialog.close();
  const dialog = el(
    "dialog",
    { className: "wide-dialog", "aria-labelledby": "compare-title" },
    el(
      "div",
      { className: "dialog-head" },
      el("h2", { id: "compare-title" }, "Compare"),
      el(
        "button",
        { type: "button", className: "button quiet square", "aria-label": "Close", onclick: close },
        icon("close"),
      ),
    ),
    stage,
    bar,
  );
  function render() {
    const mode = radios.map((label) => label.firstChild).find(({ checked }) => checked).value;
    writeStored("compare", mode);
    const other = choices[Number(select.value)];
    bar.hidden = other === undefined;
    if (other === undefined) {
      stage.replaceChildren(
        el(
          "p",
          { className: "muted" },
          "There is nothing to compare with yet: create another image.",
        ),
      );
      return;
    }
    const image = job.images[index];
    const frame = { slider: sliderFrame, sides: sidesFrame, hold: holdFrame }[mode](
      ...withTags(other, { url: image.url, tag: job.model }),
    );
    frame.style.setProperty("--ratio", String((image.width ?? 4) / (image.height ?? 3)));
    stage.replaceChildren(frame);
  }
  select.onchange = render;
  render();
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (before?.startsWith("blob:")) {
      URL.revokeObjectURL(before);
    }
  });
  document.body.append(dialog);
  dialog.showModal();
}

/** Return both images with tags that differ: their models, or which one it is. */
function withTags(other, shown) {
  if (other.tag === "Before") {
    return [other, { ...shown, tag: "After" }];
  }
  return other.tag === shown.tag
    ? [
        { ...other, tag: "Other" },
        { ...shown, tag: "This result" },
      ]
    : [other, shown];
}

function labelOf({ prompt, model, images, created }, position) {
  const time = new Date(created).toLocaleTimeString([], { timeStyle: "short" });
  const number = images.length > 1 ? ` (${position + 1})` : "";
  return `${(prompt || model).slice(0, 60)}${number} · ${model} · ${time}`;
}

const imageOf = (className, { url, tag }) =>
  el("img", { className, src: url, alt: tag, draggable: false });
const tagOf = (side, { tag }) =>
  el("span", { className: `tag ${side}`, "aria-hidden": "true" }, tag);

/** Both images on top of each other, with a slider that moves the dividing line. */
function sliderFrame(before, after) {
  const slider = el("input", {
    type: "range",
    min: 0,
    max: 100,
    step: 1,
    value: 50,
    "aria-label": `Visible part of: ${before.tag}`,
  });
  const divider = el("span", { className: "divider", "aria-hidden": "true" });
  const [left, right] = [tagOf("left", before), tagOf("right", after)];
  const frame = el(
    "div",
    { className: "compare" },
    imageOf("after", after),
    imageOf("before", before),
    left,
    right,
    divider,
    slider,
  );
  const update = () => {
    frame.style.setProperty("--divider", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} %`);
    left.hidden = Number(slider.value) < 8;
    right.hidden = Number(slider.value) > 92;
  };
  slider.addEventListener("input", update);
  update();
  return frame;
}

function sidesFrame(before, after) {
  const figure = (side) =>
    el("figure", {}, imageOf("", side), el("figcaption", { className: "small muted" }, side.tag));
  return el("div", { className: "compare-sides" }, figure(before), figure(after));
}

/** The result; the other image while a button is held. */
function holdFrame(before, after) {
  const tag = tagOf("left", after);
  const frame = el(
    "div",
    { className: "compare is-holding" },
    imageOf("after", after),
    imageOf("before", before),
    tag,
  );
  const show = (isBefore) => {
    frame.style.setProperty("--divider", isBefore ? "100%" : "0%");
    tag.textContent = (isBefore ? before : after).tag;
  };
  const button = el(
    "button",
    { type: "button", className: "button hold-button" },
    "Hold to see the other",
  );
  for (const target of [frame, button]) {
    target.addEventListener("pointerdown", () => show(true));
    target.addEventListener("pointerup", () => show(false));
    target.addEventListener("pointerleave", () => show(false));
  }
  button.addEventListener("keydown", ({ key }) => [" ", "Enter"].includes(key) && show(true));
  button.addEventListener("keyup", () => show(false));
  button.addEventListener("blur", () => show(false));
  frame.append(button);
  show(false);
  return frame;
}
