/** The models of the proxy and of fal, their tasks, and the inputs of each. */
import { allowPrompt, fetchFromProxy } from "./access_key.js";
import { fetchSchema } from "./fal_client.js";
import { parseInputs } from "./model_schema.js";

/**
 * @typedef {object} Model
 * @property {string} name
 * @property {string} title
 * @property {string} endpoint
 * @property {string} description
 * @property {string} summary the description without the title and hints for the API, else the endpoint id
 * @property {"create" | "edit" | "animate" | "speak" | null} task null: unknown
 * @property {number | null} price USD for one unit
 * @property {string} unit
 * @property {string[]} required
 * @property {string[]} optional
 * @property {Record<string, unknown>} defaults
 */

const MODEL_LIST = "api/images/models";
const TITLE_MAX = 40; // characters
const ENDPOINT_ID = /^[\w-][\w.-]*(\/[\w-][\w.-]*){1,6}$/;
// Preferred models, by task; otherwise the first one is.
export const DEFAULT_ENDPOINTS = {
  create: "fal-ai/flux/schnell", // the first image is there within seconds
  edit: "fal-ai/flux-pro/kontext",
  animate: "fal-ai/kling-video/v2.5-turbo/pro/text-to-video",
  speak: "fal-ai/kokoro/american-english",
};
const EDIT_OPTIONS = ["num_images", "seed", "guidance_scale", "output_format", "aspect_ratio"];
// Used if the proxy has no model list.
const KONTEXT_MODELS = [
  [
    "kontext",
    "fal-ai/flux-pro/kontext",
    "FLUX.1 Kontext [pro]: edits an image from a prompt.",
    0.04,
    "image",
  ],
  [
    "kontext-max",
    "fal-ai/flux-pro/kontext/max",
    "FLUX.1 Kontext [max]: with better typography.",
    0.08,
    "image",
  ],
  [
    "kontext-dev",
    "fal-ai/flux-kontext/dev",
    "FLUX.1 Kontext [dev]: with open weights.",
    0.025,
    "megapixel",
  ],
].map(([name, endpoint, description, price, unit]) => {
  const required = ["prompt", "image_url"];
  return { name, endpoint, description, required, optional: EDIT_OPTIONS, price, unit };
});
const inputsByEndpoint = new Map(); // endpoint → promise of its inputs

/** Load the proxy's models; the kontext models if it has no list. @returns {Promise<Model[]>} */
export async function loadModels() {
  try {
    const response = await fetchFromProxy(MODEL_LIST);
    const models = response.ok ? (await response.json()).models : null;
    const isList = Array.isArray(models) && models.length > 0;
    return (isList ? models : KONTEXT_MODELS).map(toModel);
  } catch {
    return KONTEXT_MODELS.map(toModel);
  }
}

/**
 * Search all models of fal that the proxy allows.
 *
 * @param {string} text
 * @param {{cursor?: string | null, signal?: AbortSignal}} [options]
 * @returns {Promise<{models: Model[], nextCursor: string | null}>}
 */
export async function searchModels(text, { cursor = null, signal } = {}) {
  allowPrompt();
  const query = new URLSearchParams({ search: text, limit: "30", ...(cursor && { cursor }) });
  const response = await fetchFromProxy(`${MODEL_LIST}?${query}`, { signal });
  if (!response.ok) {
    throw new Error(`status ${response.status}`);
  }
  const { models, nextCursor } = await response.json();
  return { models: models.map(toModel), nextCursor: nextCursor ?? null };
}

/** Complete a model whose price is unknown. @param {Model} model @returns {Promise<void>} */
export async function loadPrice(model) {
  if (model.price !== null || model.isPriceLoaded) {
    return;
  }
  model.isPriceLoaded = true;
  try {
    const headers = { "content-type": "application/json" };
    const body = JSON.stringify({ endpoint: model.endpoint });
    const response = await fetchFromProxy("api/estimate", { method: "POST", headers, body });
    const { price, unit } = response.ok ? await response.json() : {};
    if (typeof price === "number") {
      Object.assign(model, { price, unit: singular(unit) });
    }
  } catch {
    // It stays unknown.
  }
}

const singular = (unit) => unit.replace(/^(image|megapixel|second|video)s$/, "$1");

/** Return whether a text can be an endpoint id, such as `fal-ai/flux/dev`. @param {string} text */
export const isEndpointId = (text) => ENDPOINT_ID.test(text);

/** Return a model of which only the endpoint is known. @returns {Model} */
export function modelOfEndpoint(endpoint, { title = endpoint, price = null, unit = "image" } = {}) {
  return toModel({ name: endpoint, endpoint, title, price, unit });
}

function toModel(entry) {
  const model = {
    description: "",
    required: [],
    optional: [],
    price: null,
    ...entry,
    unit: singular(entry.unit ?? "image"),
    defaults: entry.defaults ?? {},
  };
  model.title = entry.title ?? titleOf(model);
  const rest = model.description.startsWith(`${model.title}: `)
    ? model.description.slice(model.title.length + 2)
    : model.description;
  const [sentence] = rest.replace(/ \(\w+_url\)/g, "").split("; with ");
  const { title, endpoint } = model;
  model.summary =
    sentence.charAt(0).toUpperCase() + sentence.slice(1) || (title === endpoint ? "" : endpoint);
  model.task = entry.category === undefined ? taskOf(model) : taskOfCategory(entry.category);
  return model;
}

/** The description of a registry's model begins with its title. */
function titleOf({ name, description }) {
  const [title, rest] = description.split(/[:,] /, 2);
  return rest !== undefined && title.length <= TITLE_MAX ? title : name;
}

function taskOf({ kind = "image", name, endpoint, required, optional }) {
  if (name === endpoint && required.length === 0 && optional.length === 0) {
    return taskOfCategory(endpoint);
  }
  if (kind !== "image") {
    return kind === "video" ? "animate" : "speak";
  }
  return required.some((input) => /image_urls?$/.test(input)) ? "edit" : "create";
}

function taskOfCategory(category) {
  if (/video/.test(category)) {
    return "animate";
  }
  if (/audio|speech|music|tts|voice/.test(category)) {
    return "speak";
  }
  return /image-to-image|\/edit|inpaint|kontext$/.test(category)
    ? "edit"
    : /text-to-image/.test(category)
      ? "create"
      : null;
}

/**
 * Load the inputs of a model from fal's schema. Fall back to the model list if that fails.
 *
 * @param {Model} model
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
  const promptName = names.includes("prompt") || !names.includes("text") ? "prompt" : "text";
  const images = names
    .filter((name) => /(^|_)(image|mask)_urls?$/.test(name))
    .map((name) => ({
      name,
      isMany: name.endsWith("s"),
      isRequired: model.required.includes(name),
      hint: "",
    }));
  const fields = Object.entries(FALLBACK_FIELDS)
    .filter(([name]) => names.includes(name))
    .map(([name, field]) => ({ name, isRequired: false, hint: "", ...field }));
  return {
    images,
    fields,
    promptName,
    hasPrompt: names.length === 0 || names.includes(promptName),
    isPromptRequired: model.required.includes(promptName),
  };
}
