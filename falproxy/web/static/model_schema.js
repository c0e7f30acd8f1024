/** Form inputs from fal's OpenAPI document of an endpoint. */

/**
 * @typedef {object} Field
 * @property {string} name
 * @property {"range" | "number" | "choice" | "flag" | "size" | "loras" | "text" | "json"} kind
 * @property {boolean} isRequired
 * @property {unknown} preset the model's default; null if it has none
 * @property {number | null} [low] inclusive
 * @property {number | null} [high] inclusive
 * @property {number | "any"} [step]
 * @property {string[]} [choices]
 * @property {string} hint the first sentence of fal's description
 *
 * @typedef {object} Inputs
 * @property {{name: string, isMany: boolean, isRequired: boolean, hint: string}[]} images required ones first
 * @property {Field[]} fields
 * @property {string} promptName `prompt`, or `text` for speech
 * @property {boolean} hasPrompt
 * @property {boolean} isPromptRequired
 */

const IMAGE_URL = /(^|_)(image|mask)_url(s?)$/;
// Inputs without a control: the prompt has its own field, sync_mode would return data URIs.
const HIDDEN = new Set(["sync_mode", "request_id"]);
const FIRST_FIELDS = [
  "aspect_ratio",
  "image_size",
  "num_images",
  "duration",
  "voice",
  "resolution",
  "resolution_mode",
  "seed",
  "strength",
  "guidance_scale",
  "num_inference_steps",
  "output_format",
  "format",
];
const HINT_MAX = 120; // characters
const SLIDER_MAX = 100; // a number with a wider range gets a text input

/**
 * @param {unknown} document
 * @returns {Inputs}
 */
export function parseInputs(document) {
  const schemas = document?.components?.schemas ?? {};
  const input = inputSchema(document, schemas);
  const properties = input.properties ?? {};
  const required = Array.isArray(input.required) ? input.required : [];
  const images = [];
  const fields = [];
  const promptName = Object.hasOwn(properties, "prompt") ? "prompt" : "text";
  for (const [name, property] of Object.entries(properties)) {
    const isRequired = required.includes(name);
    const hint = firstSentence(property?.description);
    if (IMAGE_URL.test(name)) {
      images.push({ name, isMany: name.endsWith("s"), isRequired, hint });
      continue;
    }
    const isHidden = HIDDEN.has(name) || name === promptName;
    const field = isHidden ? null : parseField(property, schemas);
    if (field !== null) {
      fields.push({ name, isRequired, preset: null, hint, ...field });
    }
  }
  fields.sort((one, other) => fieldRank(one.name) - fieldRank(other.name));
  images.sort((one, other) => Number(other.isRequired) - Number(one.isRequired));
  return {
    images,
    fields,
    promptName,
    hasPrompt: Object.hasOwn(properties, promptName),
    isPromptRequired: required.includes(promptName),
  };
}

function firstSentence(description) {
  const text = typeof description === "string" ? description.trim() : "";
  const sentence = /^.*?[.!?](?=\s|$)/s.exec(text)?.[0] ?? text;
  return sentence.length <= HINT_MAX ? sentence : `${sentence.slice(0, HINT_MAX)}…`;
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
        : { kind: "json", preset: null };
    case "object":
      return { kind: "json", preset: null };
    default:
      return schema.properties ? { kind: "json", preset: null } : null;
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
