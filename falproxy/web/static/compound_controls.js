/** The options that are more than one value: a size in pixels, and trained styles (LoRA). */
import { el, newName } from "./dom.js";
import { icon } from "./icons.js";
import { bounds, complain, labelled, spoken } from "./field.js";
import { nice } from "./error_messages.js";

const OWN = "own";

/** A preset, or a width and a height. @returns {import("./option_controls.js").Control} */
export function size(field, id) {
  const options = [...field.choices.map((word) => [word, spoken(word)]), [OWN, "Own size"]];
  const none = field.choices.includes(field.preset) ? [] : [["", "Automatic"]];
  const select = el(
    "select",
    { id },
    ...[...none, ...options].map(([value, word]) => el("option", { value }, word)),
  );
  const sides = ["Width", "Height"].map((label) =>
    el("input", {
      type: "number",
      min: field.low,
      max: field.high,
      step: 1,
      value: 1024,
      "aria-label": `${label} in pixels`,
    }),
  );
  const own = el("div", { className: "sides", hidden: true }, sides[0], "×", sides[1]);
  const element = labelled(field, id, select);
  select.after(own);
  select.onchange = () => (own.hidden = select.value !== OWN);
  const set = (value) => {
    const isOwn = typeof value === "object" && value !== null;
    select.value = isOwn ? OWN : (value ?? (none.length > 0 ? "" : field.preset));
    sides.forEach(
      (side, index) => (side.value = (isOwn && [value.width, value.height][index]) || 1024),
    );
    select.onchange();
  };
  set(field.preset);
  const problem = () => {
    const isWrong = !own.hidden && !sides.every((side) => side.value !== "" && side.validity.valid);
    return complain(
      element,
      select,
      isWrong ? `Give whole numbers of pixels. ${bounds(field)}` : "",
    );
  };
  const value = () => {
    if (select.value === OWN) {
      return { width: Number(sides[0].value), height: Number(sides[1].value) };
    }
    return select.value === "" || select.value === field.preset ? undefined : select.value;
  };
  return { element, set, problem, value };
}

/** Any number of styles, each with its scale. @returns {import("./option_controls.js").Control} */
export function loras(field, id) {
  const list = el("div", { className: "loras" });
  const element = el(
    "div",
    { className: "field wide", role: "group", "aria-label": nice(field.name) },
    el("span", { className: "label" }, nice(field.name)),
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
          onclick: () => add().querySelector("input").focus(),
        },
        icon("plus"),
        "Add a style",
      ),
    ),
  );
  function add({ path = "", scale = 1 } = {}) {
    const key = newName();
    const remove = {
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
        id: key,
        value: path,
        placeholder: "https://….safetensors",
        "aria-label": "Address of the style",
      }),
      el("input", {
        type: "number",
        value: scale,
        min: 0,
        max: 4,
        step: 0.05,
        "aria-label": "Scale of the style",
      }),
      el("button", remove, icon("close")),
    );
    list.append(row);
    return row;
  }
  const values = () =>
    [...list.children]
      .map((row) => [...row.querySelectorAll("input")])
      .filter(([path]) => path.value.trim() !== "");
  return {
    element,
    set: (value) => {
      list.replaceChildren();
      (Array.isArray(value) ? value : []).forEach(add);
    },
    problem: () => {
      const isWrong = !values().every(([, scale]) => scale.value !== "" && scale.validity.valid);
      const text = isWrong ? "A style's scale is a number from 0 to 4." : "";
      element.querySelector(".problem").textContent = text;
      return text;
    },
    value: () => {
      const found = values().map(([path, scale]) => ({
        path: path.value.trim(),
        scale: Number(scale.value),
      }));
      return found.length > 0 ? found : undefined;
    },
  };
}
