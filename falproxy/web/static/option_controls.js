/** Form controls for the options of a model. */
import { imageSizeControl, lorasControl } from "./compound_controls.js";
import { el } from "./dom.js";
import { choiceLabel, createField, inputLabel, rangeHint, showFieldProblem } from "./field.js";
import {
  jsonControl,
  ratioOf,
  seedControl,
  shapeControl,
  stepperControl,
} from "./special_controls.js";

/**
 * @typedef {object} Control
 * @property {string} name
 * @property {HTMLElement} element
 * @property {() => unknown} value undefined for the model's default
 * @property {(value: unknown) => void} set
 * @property {() => string} validate shows the problem beside the input and returns it; empty if valid
 */

const CONTROLS = {
  range: rangeControl,
  number: numberControl,
  choice: choiceControl,
  flag: flagControl,
  size: imageSizeControl,
  loras: lorasControl,
  text: textControl,
  json: jsonControl,
};
const STEPPER_MAX = 10; // of a number of images
// Shown at once; the others are under "More options".
const MAIN_FIELDS = new Set(["aspect_ratio", "image_size", "num_images", "duration", "voice"]);

/** Whether a field is shown at once. @param {import("./model_schema.js").Field} field */
export const isMainField = ({ name, isRequired }) => isRequired || MAIN_FIELDS.has(name);

/**
 * @param {import("./model_schema.js").Field} field
 * @returns {Control}
 */
export function createControl(field) {
  return { name: field.name, field, ...builderOf(field)(field, `option-${field.name}`) };
}

/** Set a control to a value of another model or of a link; to the default if it does not take that. */
export function setIfValid(control, value) {
  control.set(value);
  const isTaken = JSON.stringify(control.value() ?? control.field.preset) === JSON.stringify(value);
  if (value !== undefined && !isTaken) {
    control.set(undefined);
  }
}

function builderOf(field) {
  if (field.name === "seed" && field.kind === "number") {
    return seedControl;
  }
  if (field.kind === "choice" && field.choices.filter(ratioOf).length > 1) {
    return shapeControl;
  }
  const isCount = field.name === "num_images" && field.low !== null && field.high <= STEPPER_MAX;
  return isCount && typeof field.preset === "number" ? stepperControl : CONTROLS[field.kind];
}

function rangeControl(field, id) {
  const input = el("input", {
    type: "range",
    id,
    min: field.low,
    max: field.high,
    step: field.step,
  });
  const output = el("output", { for: id, className: "small mono" });
  const renderValue = () => (output.textContent = input.value);
  const set = (value) => {
    input.value = value ?? field.preset;
    renderValue();
  };
  input.oninput = renderValue;
  set(field.preset);
  const label = el("label", { for: id }, inputLabel(field.name));
  const element = el(
    "div",
    { className: "field" },
    el("div", { className: "label-row" }, label, output),
    input,
  );
  return {
    element,
    set,
    validate: () => "",
    value: () => (Number(input.value) === field.preset ? undefined : Number(input.value)),
  };
}

function numberControl(field, id) {
  const input = el("input", {
    type: "number",
    id,
    step: field.step,
    inputMode: field.step === 1 ? "numeric" : "decimal",
    placeholder: String(field.preset ?? "Any"),
  });
  if (field.low !== null) {
    input.min = field.low;
  }
  if (field.high !== null) {
    input.max = field.high;
  }
  const hint = rangeHint(field);
  const element = createField(field, id, input, hint);
  const validate = () => {
    const { badInput, rangeOverflow, rangeUnderflow, stepMismatch } = input.validity;
    const isInvalid = badInput || rangeOverflow || rangeUnderflow || stepMismatch;
    const isMissing = field.isRequired && field.preset === null && input.value === "";
    return showFieldProblem(
      element,
      input,
      isInvalid || isMissing
        ? `Enter a ${field.step === 1 ? "whole " : ""}number. ${rangeHint(field)}`
        : "",
    );
  };
  input.onchange = validate;
  return {
    element,
    validate,
    set: (value) => (input.value = value ?? ""),
    value: () => (input.value === "" ? undefined : Number(input.value)),
  };
}

function choiceControl(field, id) {
  const automatic = field.preset === null ? [["", "Automatic"]] : [];
  const options = [
    ...automatic,
    ...field.choices.map((value) => [value, choiceLabel(value, field.name)]),
  ];
  const input = el(
    "select",
    { id },
    ...options.map(([value, label]) => el("option", { value }, label)),
  );
  const set = (value) => {
    input.value =
      value === undefined || value === null ? String(field.preset ?? "") : String(value);
  };
  set(field.preset);
  const element = createField(field, id, input);
  return {
    element,
    set,
    validate: () => "",
    value: () => (input.value === String(field.preset ?? "") ? undefined : input.value),
  };
}

function flagControl(field, id) {
  const input = el("input", { type: "checkbox", id, checked: Boolean(field.preset) });
  const element = el("label", { className: "check", for: id }, input, inputLabel(field.name));
  return {
    element,
    validate: () => "",
    set: (value) => (input.checked = Boolean(value ?? field.preset)),
    value: () => (input.checked === Boolean(field.preset) ? undefined : input.checked),
  };
}

function textControl(field, id) {
  const input = el("input", {
    type: "text",
    id,
    placeholder: typeof field.preset === "string" ? field.preset : "",
  });
  const element = createField(field, id, input);
  element.classList.add("wide");
  const isMissing = () => field.isRequired && field.preset === null && input.value.trim() === "";
  return {
    element,
    validate: () =>
      showFieldProblem(element, input, isMissing() ? "This model needs a value here." : ""),
    set: (value) => (input.value = value ?? ""),
    value: () => input.value.trim() || undefined,
  };
}
