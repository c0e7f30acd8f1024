/** Controls for options with several values: the image size in pixels, and LoRA styles. */
import { el, randomId } from "./dom.js";
import { choiceLabel, createField, inputLabel, rangeHint, showFieldProblem } from "./field.js";
import { icon } from "./icons.js";

const CUSTOM = "custom";

/** A preset, or a width and a height. @returns {import("./option_controls.js").Control} */
export function imageSizeControl(field, id) {
  const options = [
    ...field.choices.map((value) => [value, choiceLabel(value)]),
    [CUSTOM, "Custom size"],
  ];
  const automatic = field.choices.includes(field.preset) ? [] : [["", "Automatic"]];
  const select = el(
    "select",
    { id },
    ...[...automatic, ...options].map(([value, label]) => el("option", { value }, label)),
  );
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
  const customSize = el(
    "div",
    { className: "custom-size", hidden: true },
    sideInputs[0],
    "×",
    sideInputs[1],
  );
  const element = createField(field, id, select);
  select.after(customSize);
  select.onchange = () => (customSize.hidden = select.value !== CUSTOM);
  const set = (value) => {
    const isCustom = typeof value === "object" && value !== null;
    select.value = isCustom ? CUSTOM : (value ?? (automatic.length > 0 ? "" : field.preset));
    sideInputs.forEach(
      (input, index) => (input.value = (isCustom && [value.width, value.height][index]) || 1024),
    );
    select.onchange();
  };
  set(field.preset);
  const validate = () => {
    const isInvalid =
      !customSize.hidden &&
      !sideInputs.every((input) => input.value !== "" && input.validity.valid);
    return showFieldProblem(
      element,
      select,
      isInvalid ? `Enter whole numbers of pixels. ${rangeHint(field)}` : "",
    );
  };
  const value = () => {
    if (select.value === CUSTOM) {
      return { width: Number(sideInputs[0].value), height: Number(sideInputs[1].value) };
    }
    return select.value === "" || select.value === field.preset ? undefined : select.value;
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
