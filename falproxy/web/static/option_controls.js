/** The options of a model as controls: each appears only where the model takes it. */
import { el } from "./dom.js";
import { bounds, complain, labelled, spoken } from "./field.js";
import { loras, size } from "./compound_controls.js";
import { nice } from "./error_messages.js";

/**
 * A control for one option.
 *
 * @typedef {object} Control
 * @property {string} name
 * @property {HTMLElement} element
 * @property {() => unknown} value undefined where the model's own default will do
 * @property {(value: unknown) => void} set
 * @property {() => string} problem empty for none
 */

/**
 * @param {import("./model_schema.js").Field} field
 * @returns {Control}
 */
export function controlOf(field) {
  const make = { range, number, choice, flag, size, loras, text }[field.kind];
  return { name: field.name, ...make(field, `option-${field.name}`) };
}

function range(field, id) {
  const input = el("input", {
    type: "range",
    id,
    min: field.low,
    max: field.high,
    step: field.step,
  });
  const output = el("output", { for: id, className: "small mono" });
  const show = () => (output.textContent = input.value);
  const set = (value) => {
    input.value = value ?? field.preset;
    show();
  };
  input.oninput = show;
  set(field.preset);
  const label = el("label", { for: id }, nice(field.name));
  const element = el(
    "div",
    { className: "field" },
    el("div", { className: "between" }, label, output),
    input,
  );
  return {
    element,
    set,
    problem: () => "",
    value: () => (Number(input.value) === field.preset ? undefined : Number(input.value)),
  };
}

function number(field, id) {
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
  const hint = field.name === "seed" ? "The same seed makes the same picture." : bounds(field);
  const element = labelled(field, id, input, hint);
  const problem = () => {
    const { badInput, rangeOverflow, rangeUnderflow, stepMismatch } = input.validity;
    const isWrong = badInput || rangeOverflow || rangeUnderflow || stepMismatch;
    return complain(
      element,
      input,
      isWrong ? `Give a ${field.step === 1 ? "whole " : ""}number. ${bounds(field)}` : "",
    );
  };
  input.onchange = problem;
  return {
    element,
    problem,
    set: (value) => (input.value = value ?? ""),
    value: () => (input.value === "" ? undefined : Number(input.value)),
  };
}

function choice(field, id) {
  const none = field.preset === null ? [["", "Automatic"]] : [];
  const options = [...none, ...field.choices.map((word) => [word, spoken(word)])];
  const input = el(
    "select",
    { id },
    ...options.map(([value, word]) => el("option", { value }, word)),
  );
  const set = (value) => {
    input.value =
      value === undefined || value === null ? String(field.preset ?? "") : String(value);
  };
  set(field.preset);
  const element = labelled(field, id, input);
  return {
    element,
    set,
    problem: () => "",
    value: () => (input.value === String(field.preset ?? "") ? undefined : input.value),
  };
}

function flag(field, id) {
  const input = el("input", { type: "checkbox", id, checked: Boolean(field.preset) });
  const element = el("label", { className: "check", for: id }, input, nice(field.name));
  return {
    element,
    problem: () => "",
    set: (value) => (input.checked = Boolean(value ?? field.preset)),
    value: () => (input.checked === Boolean(field.preset) ? undefined : input.checked),
  };
}

function text(field, id) {
  const input = el("input", {
    type: "text",
    id,
    placeholder: typeof field.preset === "string" ? field.preset : "",
  });
  const element = labelled(field, id, input);
  return {
    element,
    problem: () => "",
    set: (value) => (input.value = value ?? ""),
    value: () => input.value.trim() || undefined,
  };
}
