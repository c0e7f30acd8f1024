/** Controls for options with several values: the image size in pixels, and LoRA styles. */
import { el, randomId } from "./dom.js";
import { choiceLabel, inputLabel, rangeHint } from "./field.js";
import { icon } from "./icons.js";
import { shapeRadios } from "./special_controls.js";

const CUSTOM = "custom";

/** A preset, or a width and a height. @returns {import("./option_controls.js").Control} */
export function imageSizeControl(field, id) {
  const automatic = field.choices.includes(field.preset) ? [] : [["", "Auto"]];
  const choices = [
    ...automatic,
    ...field.choices.map((value) => [value, choiceLabel(value)]),
    [CUSTOM, "Custom size"],
  ];
  const renderCustom = () => (customSize.hidden = radios.value !== CUSTOM);
  const radios = shapeRadios(id, inputLabel(field.name), choices, renderCustom);
  const sideInputs = ["Width", "Height"].map((label) =>
    el("input", {
      type: "number",
      min: field.low,
      max: field.high,
      step: 1,
      value: 1024,
      "aria-label": `${label} in pixels`,
    }),
  );
  const customSize = el("div", { className: "custom-size" }, sideInputs[0], "×", sideInputs[1]);
  const problem = el("p", { className: "problem" });
  const label = el("span", { className: "label", "aria-hidden": "true" }, inputLabel(field.name));
  const element = el("div", { className: "field wide" }, label, radios.group, customSize, problem);
  const set = (value) => {
    const isCustom = typeof value === "object" && value !== null;
    radios.value = isCustom ? CUSTOM : (value ?? (automatic.length > 0 ? "" : field.preset));
    sideInputs.forEach(
      (input, index) => (input.value = (isCustom && [value.width, value.height][index]) || 1024),
    );
    renderCustom();
  };
  set(field.preset);
  const validate = () => {
    const isInvalid =
      !customSize.hidden &&
      !sideInputs.every((input) => input.value !== "" && input.validity.valid);
    problem.textContent = isInvalid ? `Enter whole numbers of pixels. ${rangeHint(field)}` : "";
    sideInputs.forEach((input) => input.setAttribute("aria-invalid", String(isInvalid)));
    return problem.textContent;
  };
  const value = () => {
    if (radios.value === CUSTOM) {
      return { width: Number(sideInputs[0].value), height: Number(sideInputs[1].value) };
    }
    return radios.value === "" || radios.value === field.preset ? undefined : radios.value;
  };
  return { element, set, validate, value };
}

/** LoRA styles, each with a URL and a scale. @returns {import("./option_controls.js").Control} */
export function lorasControl(field, id) {
  const list = el("div", { className: "loras" });
  const element = el(
    "div",
    { className: "field wide", role: "group", "aria-label": inputLabel(field.name) },
    el("span", { className: "label" }, inputLabel(field.name)),
    list,
    el("p", { className: "problem", id: `${id}-problem` }),
    el(
      "div",
      { className: "row" },
      el(
        "button",
        {
          type: "button",
          className: "button quiet",
          onclick: () => addRow().querySelector("input").focus(),
        },
        icon("plus"),
        "Add a style",
      ),
    ),
  );
  function addRow({ path = "", scale = 1 } = {}) {
    const removeProps = {
      type: "button",
      className: "button quiet square",
      "aria-label": "Remove this style",
      onclick: () => row.remove(),
    };
    const row = el(
      "div",
      { className: "lora" },
      el("input", {
        type: "url",
        id: randomId(),
        value: path,
        placeholder: "https://….safetensors",
        "aria-label": "URL of the style",
      }),
      el("input", {
        type: "number",
        value: scale,
        min: 0,
        max: 4,
        step: 0.05,
        "aria-label": "Scale of the style",
      }),
      el("button", removeProps, icon("close")),
    );
    list.append(row);
    return row;
  }
  const filledRows = () =>
    [...list.children]
      .map((row) => [...row.querySelectorAll("input")])
      .filter(([path]) => path.value.trim() !== "");
  return {
    element,
    set: (value) => {
      list.replaceChildren();
      (Array.isArray(value) ? value : []).forEach(addRow);
    },
    validate: () => {
      const isInvalid = !filledRows().every(
        ([, scale]) => scale.value !== "" && scale.validity.valid,
      );
      const text = isInvalid ? "A style's scale is a number from 0 to 4." : "";
      element.querySelector(".problem").textContent = text;
      return text;
    },
    value: () => {
      const loras = filledRows().map(([path, scale]) => ({
        path: path.value.trim(),
        scale: Number(scale.value),
      }));
      return loras.length > 0 ? loras : undefined;
    },
  };
}
