/** Fields of the form: label, hint and problem. */
import { el } from "./dom.js";

/** Create a field: label, input, hint and problem. @param {import("./model_schema.js").Field} field */
export function createField(field, id, input, hint = "") {
  const problem = el("p", { className: "problem", id: `${id}-problem` });
  input.setAttribute("aria-describedby", `${id}-hint ${id}-problem`);
  return el(
    "div",
    { className: "field" },
    el("label", { for: id }, inputLabel(field.name)),
    input,
    el("span", { className: "hint", id: `${id}-hint` }, hint),
    problem,
  );
}

/** Show a problem beside an input, or remove it if the text is empty. Return the text. */
export function showFieldProblem(element, input, text) {
  element.querySelector(".problem").textContent = text;
  input.setAttribute("aria-invalid", String(text !== ""));
  return text;
}

/** Return the range of a number as a sentence, or an empty string. */
export function rangeHint({ low, high }) {
  return low !== null && high !== null
    ? `From ${low} to ${high}.`
    : low !== null
      ? `${low} or more.`
      : "";
}

/**
 * Return the label of an enum value: `landscape_4_3` is "Landscape 4:3", and 5 is "5 s" for a duration.
 *
 * @param {string} value @param {string} [name] of the field
 */
export function choiceLabel(value, name) {
  if (name === "duration" && /^\d+$/.test(value)) {
    return `${value} s`;
  }
  if (/^(jpe?g|png|webp|hd)$/.test(value)) {
    return value.toUpperCase();
  }
  return /^[a-z]/.test(value)
    ? value.charAt(0).toUpperCase() +
        value
          .slice(1)
          .replace(/_hd$/, " HD")
          .replace(/_(\d+)_(\d+)$/, " $1:$2")
          .replaceAll("_", " ")
    : value;
}

const INPUT_LABELS = {
  num_images: "Number of images",
  image_url: "Image",
  image_urls: "Input images",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  image_size: "Size",
  cfg_scale: "Guidance",
  output_format: "Format",
  loras: "LoRA styles",
  base_image_url: "Image whose face is replaced",
  swap_image_url: "Image with the new face",
};

/** Return the label of a model input: `mask_url` is "Mask". */
export function inputLabel(name) {
  if (Object.hasOwn(INPUT_LABELS, name)) {
    return INPUT_LABELS[name];
  }
  const words = name.replace(/_urls?$/, "").replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}
