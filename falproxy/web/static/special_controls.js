/** Controls for well-known options: shapes of images, a number of images, the seed, and JSON. */
import { el } from "./dom.js";
import { choiceLabel, createField, inputLabel, rangeHint, showFieldProblem } from "./field.js";
import { icon } from "./icons.js";

const ROLLED_SEED_MAX = 2 ** 31 - 1; // fal's own seeds can be larger
const SHAPE_SIDE = 18; // pixels of the longer side
const SVG = "http://www.w3.org/2000/svg";
const SIZE_RATIOS = { square_hd: [1, 1], square: [1, 1] };

/** Return width and height of a shape such as `16:9` or `portrait_4_3`; null for other values. */
export function ratioOf(value) {
  if (Object.hasOwn(SIZE_RATIOS, value)) {
    return SIZE_RATIOS[value];
  }
  const plain = /^(\d+):(\d+)$/.exec(value);
  if (plain !== null) {
    return [Number(plain[1]), Number(plain[2])];
  }
  const named = /^(portrait|landscape)_(\d+)_(\d+)$/.exec(value);
  if (named === null) {
    return null;
  }
  const sides = [Number(named[2]), Number(named[3])].sort((one, other) => one - other);
  return named[1] === "portrait" ? sides : sides.reverse();
}

function shape(value) {
  const ratio = ratioOf(value);
  const svg = document.createElementNS(SVG, "svg");
  const rect = document.createElementNS(SVG, "rect");
  const scale = SHAPE_SIDE / Math.max(...(ratio ?? [1, 1]));
  const [width, height] = (ratio ?? [1, 1]).map((side) => side * scale);
  const attributes = { x: 10 - width / 2, y: 10 - height / 2, width, height, rx: 1.5 };
  Object.entries(attributes).forEach(([name, number]) =>
    rect.setAttribute(name, number.toFixed(1)),
  );
  if (ratio === null) {
    rect.setAttribute("stroke-dasharray", "3 2");
  }
  const props = {
    viewBox: "0 0 20 20",
    width: 20,
    height: 20,
    class: "icon",
    "aria-hidden": "true",
  };
  Object.entries(props).forEach(([name, text]) => svg.setAttribute(name, text));
  svg.append(rect);
  return svg;
}

/**
 * Create radio buttons with a drawn shape each.
 *
 * @param {string} id
 * @param {string} label
 * @param {[string, string][]} choices value and label
 * @param {() => void} [onchange]
 */
export function shapeRadios(id, label, choices, onchange = () => {}) {
  const inputs = choices.map(([value]) =>
    el("input", { type: "radio", name: id, value, className: "shape-input", onchange }),
  );
  const group = el(
    "div",
    { className: "shapes", role: "radiogroup", "aria-label": label },
    ...choices.map(([value, text], index) =>
      el(
        "label",
        { className: "shape", title: text },
        inputs[index],
        shape(value),
        el("span", {}, text),
      ),
    ),
  );
  return {
    group,
    get value() {
      return inputs.find(({ checked }) => checked)?.value ?? "";
    },
    set value(value) {
      inputs.forEach((input) => (input.checked = input.value === value));
    },
  };
}

/** A choice among ratios of width and height. @returns {import("./option_controls.js").Control} */
export function shapeControl(field, id) {
  const automatic = field.preset === null ? [["", "Auto"]] : [];
  const choices = [...automatic, ...field.choices.map((value) => [value, choiceLabel(value)])];
  const radios = shapeRadios(id, inputLabel(field.name), choices);
  const set = (value) => (radios.value = String(value ?? field.preset ?? ""));
  set(field.preset);
  const label = el("span", { className: "label", "aria-hidden": "true" }, inputLabel(field.name));
  return {
    element: el("div", { className: "field wide" }, label, radios.group),
    set,
    validate: () => "",
    value: () => (radios.value === String(field.preset ?? "") ? undefined : radios.value),
  };
}

/** A small whole number with buttons. @returns {import("./option_controls.js").Control} */
export function stepperControl(field, id) {
  const input = el("input", {
    type: "number",
    id,
    min: field.low,
    max: field.high,
    step: 1,
    inputMode: "numeric",
  });
  const element = createField(field, id, input);
  const step = (direction) => {
    const value = (Number(input.value) || field.preset) + direction;
    input.value = Math.min(field.high, Math.max(field.low, value));
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const button = (name, label, direction) =>
    el(
      "button",
      {
        type: "button",
        className: "button square",
        "aria-label": label,
        onclick: () => step(direction),
      },
      icon(name),
    );
  const row = el("div", { className: "stepper" }, button("minus", "Fewer", -1));
  input.replaceWith(row);
  row.append(input, button("plus", "More", 1));
  const set = (value) => (input.value = value ?? field.preset);
  set(field.preset);
  return {
    element,
    set,
    validate: () =>
      showFieldProblem(
        element,
        input,
        input.value === "" || !input.validity.valid
          ? `Enter a number from ${field.low} to ${field.high}.`
          : "",
      ),
    value: () =>
      input.value === "" || Number(input.value) === field.preset ? undefined : Number(input.value),
  };
}

/**
 * The seed: empty for a random one with each run. Buttons roll a number, and lock it or unlock it.
 *
 * @returns {import("./option_controls.js").Control}
 */
export function seedControl(field, id) {
  const high = field.high ?? Number.MAX_SAFE_INTEGER;
  const input = el("input", {
    type: "number",
    id,
    min: field.low ?? 0,
    max: high,
    step: 1,
    inputMode: "numeric",
    placeholder: "Random",
  });
  const element = createField(field, id, input, "The same seed gives the same result.");
  element.classList.add("wide");
  const roll = () => set(Math.floor(Math.random() * Math.min(high, ROLLED_SEED_MAX)));
  const changed = () => input.dispatchEvent(new Event("input", { bubbles: true }));
  const buttonProps = { type: "button", className: "button square" };
  const dice = el(
    "button",
    {
      ...buttonProps,
      "aria-label": "Roll a seed",
      title: "Roll a seed",
      onclick: () => (roll(), changed()),
    },
    icon("dice"),
  );
  const lock = el("button", {
    ...buttonProps,
    "aria-label": "Lock the seed",
    title: "Lock the seed",
    onclick: () => {
      if (input.value === "") {
        roll();
      } else {
        set(undefined);
      }
      changed();
    },
  });
  const renderLock = () => {
    lock.setAttribute("aria-pressed", String(input.value !== ""));
    lock.replaceChildren(icon(input.value === "" ? "unlock" : "lock"));
  };
  const set = (value) => {
    input.value = value ?? "";
    renderLock();
  };
  input.addEventListener("input", renderLock);
  const row = el("div", { className: "stepper" });
  input.replaceWith(row);
  row.append(input, dice, lock);
  renderLock();
  return {
    element,
    set,
    validate: () =>
      showFieldProblem(
        element,
        input,
        input.validity.valid ? "" : `Enter a whole number. ${rangeHint(field)}`,
      ),
    value: () => (input.value === "" ? undefined : Number(input.value)),
  };
}

/** An object or a list, as JSON. @returns {import("./option_controls.js").Control} */
export function jsonControl(field, id) {
  const input = el("textarea", {
    id,
    rows: 2,
    className: "mono",
    spellcheck: false,
    placeholder: "JSON",
  });
  const element = createField(field, id, input, field.hint);
  element.classList.add("wide");
  const parse = () => {
    try {
      const value = JSON.parse(input.value);
      return typeof value === "object" && value !== null ? value : null;
    } catch {
      return null;
    }
  };
  return {
    element,
    set: (value) =>
      (input.value = value === undefined || value === null ? "" : JSON.stringify(value)),
    validate: () =>
      showFieldProblem(
        element,
        input,
        input.value.trim() !== "" && parse() === null ? "Enter a JSON object or list." : "",
      ),
    value: () => (input.value.trim() === "" ? undefined : (parse() ?? undefined)),
  };
}
