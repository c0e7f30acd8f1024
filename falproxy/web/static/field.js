/** What the controls of options have in common: a label, a hint, a complaint. */
import { el } from "./dom.js";
import { nice } from "./error_messages.js";

/** An input with its label. @param {import("./model_schema.js").Field} field */
export function labelled(field, id, input, hint = "") {
  const problem = el("p", { className: "problem", id: `${id}-problem` });
  input.setAttribute("aria-describedby", `${id}-hint ${id}-problem`);
  return el(
    "div",
    { className: "field" },
    el("label", { for: id }, nice(field.name)),
    input,
    el("span", { className: "hint", id: `${id}-hint` }, hint),
    problem,
  );
}

/** Says what is wrong beside an input; an empty text is nothing. */
export function complain(element, input, text) {
  element.querySelector(".problem").textContent = text;
  input.setAttribute("aria-invalid", String(text !== ""));
  return text;
}

/** What a number may be, in words. */
export function bounds({ low, high }) {
  return low !== null && high !== null
    ? `From ${low} to ${high}.`
    : low !== null
      ? `${low} or more.`
      : "";
}

/** A choice as people write it: `landscape_4_3` is "Landscape 4:3". @param {string} word */
export function spoken(word) {
  if (/^(jpe?g|png|webp|hd)$/.test(word)) {
    return word.toUpperCase();
  }
  return /^[a-z]/.test(word)
    ? word.charAt(0).toUpperCase() +
        word
          .slice(1)
          .replace(/_(\d+)_(\d+)$/, " $1:$2")
          .replaceAll("_", " ")
    : word;
}
