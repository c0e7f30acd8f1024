/** Which models there are, and what their inputs are. */
import { fetchHere } from "./access_key.js";
import { schemaOf } from "./fal_client.js";
import { fieldsOf } from "./model_schema.js";

const CATALOGUE = "api/images/models";
const EDIT = ["num_images", "seed", "guidance_scale", "output_format", "aspect_ratio"];
// What is offered where the proxy has no catalogue.
const KONTEXT = [
  [
    "kontext",
    "fal-ai/flux-pro/kontext",
    "FLUX.1 Kontext [pro]: changes a picture as a text says.",
    0.04,
    "image",
  ],
  [
    "kontext-max",
    "fal-ai/flux-pro/kontext/max",
    "FLUX.1 Kontext [max]: as kontext, with better letters.",
    0.08,
    "image",
  ],
  [
    "kontext-dev",
    "fal-ai/flux-kontext/dev",
    "FLUX.1 Kontext [dev], with open weights.",
    0.025,
    "megapixel",
  ],
].map(([name, endpoint, description, price, unit]) => {
  const required = ["prompt", "image_url"];
  return {
    name,
    endpoint,
    description,
    required,
    optional: EDIT,
    lora: false,
    price,
    unit,
    defaults: {},
  };
});
const known = new Map(); // endpoint → promise of its inputs

/**
 * The models of the proxy's catalogue, or the kontext family without one.
 *
 * @returns {Promise<object[]>} each `{name, endpoint, description, required, optional, price, unit,
 *   defaults}`; price: USD for one unit, or null
 */
export async function loadModels() {
  try {
    const response = await fetchHere(CATALOGUE);
    const models = response.ok ? (await response.json()).models : null;
    return Array.isArray(models) && models.length > 0 ? models : KONTEXT;
  } catch {
    return KONTEXT;
  }
}

/**
 * A model's inputs, by fal's own schema of it; by the catalogue alone where that cannot be had.
 *
 * @param {object} model
 * @returns {Promise<import("./model_schema.js").Inputs>}
 */
export async function inputsOf(model) {
  if (!known.has(model.endpoint)) {
    known.set(model.endpoint, schemaOf(model.endpoint).then(fieldsOf));
  }
  try {
    return await known.get(model.endpoint);
  } catch {
    known.delete(model.endpoint); // it is asked again with the next choice
    return fromCatalogue(model);
  }
}

const PLAIN = {
  num_images: { kind: "range", low: 1, high: 4, step: 1, preset: 1 },
  seed: { kind: "number", low: 0, high: null, step: 1, preset: null },
};

function fromCatalogue(model) {
  const names = [...model.required, ...model.optional];
  const pictures = names
    .filter((name) => /(^|_)image_urls?$/.test(name))
    .map((name) => ({
      name,
      isMany: name.endsWith("s"),
      isRequired: model.required.includes(name),
    }));
  const fields = Object.entries(PLAIN)
    .filter(([name]) => names.includes(name))
    .map(([name, field]) => ({ name, isRequired: false, ...field }));
  return {
    pictures,
    fields,
    hasPrompt: names.includes("prompt"),
    isPromptRequired: model.required.includes("prompt"),
  };
}
