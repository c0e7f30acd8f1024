/** The model list and the inputs of each model. */
import { fetchFromProxy } from "./access_key.js";
import { fetchSchema } from "./fal_client.js";
import { parseInputs } from "./model_schema.js";

const MODEL_LIST = "api/images/models";
const EDIT_OPTIONS = ["num_images", "seed", "guidance_scale", "output_format", "aspect_ratio"];
// Used if the proxy has no model list.
const KONTEXT_MODELS = [
  [
    "kontext",
    "fal-ai/flux-pro/kontext",
    "FLUX.1 Kontext [pro]: edits an image as a text describes.",
    0.04,
    "image",
  ],
  [
    "kontext-max",
    "fal-ai/flux-pro/kontext/max",
    "FLUX.1 Kontext [max]: like kontext, with better typography.",
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
    optional: EDIT_OPTIONS,
    lora: false,
    price,
    unit,
    defaults: {},
  };
});
const inputsByEndpoint = new Map(); // endpoint → promise of its inputs

/**
 * Load the proxy's model list. Return the kontext models if there is none.
 *
 * @returns {Promise<object[]>} each `{name, endpoint, description, required, optional, price, unit,
 *   defaults}`; price: USD for one unit, or null
 */
export async function loadModels() {
  try {
    const response = await fetchFromProxy(MODEL_LIST);
    const models = response.ok ? (await response.json()).models : null;
    return Array.isArray(models) && models.length > 0 ? models : KONTEXT_MODELS;
  } catch {
    return KONTEXT_MODELS;
  }
}

/**
 * Load the inputs of a model from fal's schema. Fall back to the model list if that fails.
 *
 * @param {object} model
 * @returns {Promise<import("./model_schema.js").Inputs>}
 */
export async function loadInputs(model) {
  if (!inputsByEndpoint.has(model.endpoint)) {
    inputsByEndpoint.set(model.endpoint, fetchSchema(model.endpoint).then(parseInputs));
  }
  try {
    return await inputsByEndpoint.get(model.endpoint);
  } catch {
    inputsByEndpoint.delete(model.endpoint); // retry the next time the model is selected
    return inputsFromModelList(model);
  }
}

const FALLBACK_FIELDS = {
  num_images: { kind: "range", low: 1, high: 4, step: 1, preset: 1 },
  seed: { kind: "number", low: 0, high: null, step: 1, preset: null },
};

function inputsFromModelList(model) {
  const names = [...model.required, ...model.optional];
  const images = names
    .filter((name) => /(^|_)image_urls?$/.test(name))
    .map((name) => ({
      name,
      isMany: name.endsWith("s"),
      isRequired: model.required.includes(name),
    }));
  const fields = Object.entries(FALLBACK_FIELDS)
    .filter(([name]) => names.includes(name))
    .map(([name, field]) => ({ name, isRequired: false, ...field }));
  return {
    images,
    fields,
    hasPrompt: names.includes("prompt"),
    isPromptRequired: model.required.includes("prompt"),
  };
}
