/** Form inputs from fal's OpenAPI document of an endpoint. */

/**
 * @typedef {object} Field
 * @property {string} name
 * @property {"range" | "number" | "choice" | "flag" | "size" | "loras" | "text"} kind
 * @property {boolean} isRequired
 * @property {unknown} preset the model's default; null if it has none
 * @property {number | null} [low] inclusive
 * @property {number | null} [high] inclusive
 * @property {number | "any"} [step]
 * @property {string[]} [choices]
 *
 * @typedef {object} Inputs
 * @property {{name: string, isMany: boolean, isRequired: boolean}[]} images required ones first
 * @property {Field[]} fields
 * @property {boolean} hasPrompt
 * @property {boolean} isPromptRequired
 */

const IMAGE_URL = /(^|_)(image|mask)_url(s?)$/;
// Inputs without a control: the prompt has its own field, sync_mode would return data URIs.
const HIDDEN = new Set([
  "prompt",
  "sync_mode",
  "request_id",
  "embeddings",
  "ip_adapters",
  "controlnets",
]);
const FIRST_FIELDS = [
  "num_images",
  "aspect_ratio",
  "image_size",
  "resolution_mode",
  "seed",
  "strength",
  "guidance_scale",
  "num_inference_steps",
  "output_format",
  "format",
];
const SLIDER_MAX = 100; // a number with a wider range gets a text input

/**
 * @param {unknown} document
 * @returns {Inputs}
 */
export function parseInputs(document) {
  const schemas = document?.components?.schemas ?? {};
  const input = inputSchema(document, schemas);
  const required = Array.isArray(input.required) ? input.required : [];
  const images = [];
  const fields = [];
  for (const [name, property] of Object.entries(input.properties ?? {})) {
    const isRequired = required.includes(name);
    if (IMAGE_URL.test(name)) {
      images.push({ name, isMany: name.endsWith("s"), isRequired });
      continue;
    }
    const field = HIDDEN.has(name) ? null : parseField(property, schemas);
    if (field !== null) {
      fields.push({ name, isRequired, preset: null, ...field });
    }
  }
  fields.sort((one, other) => fieldRank(one.name) - fieldRank(other.name));
  const hasPrompt = Object.hasOwn(input.properties ?? {}, "prompt");
  images.sort((one, other) => Number(other.isRequired) - Number(one.isRequired));
  return { images, fields, hasPrompt, isPromptRequired: required.includes("prompt") };
}

function fieldRank(name) {
  const index = FIRST_FIELDS.indexOf(name);
  return index < 0 ? FIRST_FIELDS.length : index;
}

/** Return the schema of the request body of the first POST operation. */
function inputSchema(document, schemas) {
  const posts = Object.values(document?.paths ?? {})
    .map((path) => path?.post)
    .filter(Boolean);
  const reference = posts[0]?.requestBody?.content?.["application/json"]?.schema;
  const schema = resolveReference(reference, schemas);
  if (typeof schema?.properties !== "object") {
    throw new Error("the schema has no inputs");
  }
  return schema;
}

function resolveReference(schema, schemas) {
  const name = typeof schema?.$ref === "string" ? schema.$ref.split("/").at(-1) : null;
  return name === null ? schema : Object.hasOwn(schemas, name) ? schemas[name] : {};
}

function parseField(property, schemas) {
  const options = (property?.anyOf ?? property?.oneOf ?? [property])
    .map((option) => resolveReference(option, schemas))
    .filter((option) => option && option.type !== "null");
  const preset = property?.default ?? null;
  const size = options.find((option) => option.properties?.width && option.properties?.height);
  const choice = options.find((option) => Array.isArray(option.enum));
  if (size !== undefined) {
    const { width } = size.properties;
    const high = width.maximum ?? (width.exclusiveMaximum ? width.exclusiveMaximum - 1 : 14142);
    return {
      kind: "size",
      choices: (choice?.enum ?? []).map(String),
      low: width.minimum ?? 1,
      high,
      preset,
    };
  }
  if (choice !== undefined) {
    return { kind: "choice", choices: choice.enum.map(String), preset };
  }
  return parseSimpleField(options[0] ?? {}, preset, schemas);
}

function parseSimpleField(schema, preset, schemas) {
  switch (schema.type) {
    case "boolean":
      return { kind: "flag", preset: preset ?? false };
    case "integer":
    case "number":
      return parseNumber(schema, preset);
    case "string":
      return { kind: "text", preset };
    case "array":
      return resolveReference(schema.items, schemas)?.properties?.path
        ? { kind: "loras", preset: [] }
        : null;
    default:
      return null;
  }
}

function parseNumber(schema, preset) {
  const low = schema.minimum ?? schema.exclusiveMinimum ?? null;
  const high = schema.maximum ?? schema.exclusiveMaximum ?? null;
  const isWhole = schema.type === "integer";
  const isSlider =
    low !== null && high !== null && high - low <= SLIDER_MAX && typeof preset === "number";
  const step = isWhole ? 1 : isSlider ? (high - low <= 2 ? 0.01 : 0.1) : "any";
  return { kind: isSlider ? "range" : "number", low, high, step, preset };
}
