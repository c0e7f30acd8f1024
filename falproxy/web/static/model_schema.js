/** fal's OpenAPI document of an endpoint as inputs that a form can show. Nothing is assumed of it. */

/**
 * @typedef {object} Field
 * @property {string} name
 * @property {"range" | "number" | "choice" | "flag" | "size" | "loras" | "text"} kind
 * @property {boolean} isRequired
 * @property {unknown} preset what the model takes when it is left out; null for none
 * @property {number | null} [low] inclusive
 * @property {number | null} [high] inclusive
 * @property {number | "any"} [step]
 * @property {string[]} [choices]
 *
 * @typedef {object} Inputs
 * @property {{name: string, isMany: boolean, isRequired: boolean}[]} pictures
 * @property {Field[]} fields
 * @property {boolean} hasPrompt
 * @property {boolean} isPromptRequired
 */

const PICTURE = /(^|_)(image|mask)_url(s?)$/;
// What a page has no use for: it shows pictures by their addresses, and takes one at a time.
const HIDDEN = new Set([
  "prompt",
  "sync_mode",
  "request_id",
  "embeddings",
  "ip_adapters",
  "controlnets",
]);
const FIRST = [
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
const SLIDER_MAX = 100; // a range wider than this is typed

/**
 * @param {unknown} document
 * @returns {Inputs}
 */
export function fieldsOf(document) {
  const schemas = document?.components?.schemas ?? {};
  const input = inputSchema(document, schemas);
  const required = Array.isArray(input.required) ? input.required : [];
  const pictures = [];
  const fields = [];
  for (const [name, property] of Object.entries(input.properties ?? {})) {
    const isRequired = required.includes(name);
    if (PICTURE.test(name)) {
      pictures.push({ name, isMany: name.endsWith("s"), isRequired });
      continue;
    }
    const field = HIDDEN.has(name) ? null : fieldOf(property, schemas);
    if (field !== null) {
      fields.push({ name, isRequired, preset: null, ...field });
    }
  }
  fields.sort((one, other) => rank(one.name) - rank(other.name));
  const hasPrompt = Object.hasOwn(input.properties ?? {}, "prompt");
  pictures.sort((one, other) => Number(other.isRequired) - Number(one.isRequired));
  return { pictures, fields, hasPrompt, isPromptRequired: required.includes("prompt") };
}

function rank(name) {
  const place = FIRST.indexOf(name);
  return place < 0 ? FIRST.length : place;
}

/** The schema of the body of the one POST. */
function inputSchema(document, schemas) {
  const posts = Object.values(document?.paths ?? {})
    .map((path) => path?.post)
    .filter(Boolean);
  const schema = posts[0]?.requestBody?.content?.["application/json"]?.schema;
  const found = resolved(schema, schemas);
  if (typeof found?.properties !== "object") {
    throw new Error("the schema has no inputs");
  }
  return found;
}

function resolved(schema, schemas) {
  const name = typeof schema?.$ref === "string" ? schema.$ref.split("/").at(-1) : null;
  return name === null ? schema : Object.hasOwn(schemas, name) ? schemas[name] : {};
}

function fieldOf(property, schemas) {
  const options = (property?.anyOf ?? property?.oneOf ?? [property])
    .map((option) => resolved(option, schemas))
    .filter((option) => option && option.type !== "null");
  const preset = property?.default ?? null;
  const size = options.find((option) => option.properties?.width && option.properties?.height);
  const choice = options.find((option) => Array.isArray(option.enum));
  if (size !== undefined) {
    const bound = size.properties.width;
    const high = bound.maximum ?? (bound.exclusiveMaximum ? bound.exclusiveMaximum - 1 : 14142);
    return {
      kind: "size",
      choices: (choice?.enum ?? []).map(String),
      low: bound.minimum ?? 1,
      high,
      preset,
    };
  }
  if (choice !== undefined) {
    return { kind: "choice", choices: choice.enum.map(String), preset };
  }
  return plain(options[0] ?? {}, preset, schemas);
}

function plain(schema, preset, schemas) {
  switch (schema.type) {
    case "boolean":
      return { kind: "flag", preset: preset ?? false };
    case "integer":
    case "number":
      return number(schema, preset);
    case "string":
      return { kind: "text", preset };
    case "array":
      return resolved(schema.items, schemas)?.properties?.path
        ? { kind: "loras", preset: [] }
        : null;
    default:
      return null;
  }
}

function number(schema, preset) {
  const low = schema.minimum ?? schema.exclusiveMinimum ?? null;
  const high = schema.maximum ?? schema.exclusiveMaximum ?? null;
  const isWhole = schema.type === "integer";
  const isSlider =
    low !== null && high !== null && high - low <= SLIDER_MAX && typeof preset === "number";
  const step = isWhole ? 1 : isSlider ? (high - low <= 2 ? 0.01 : 0.1) : "any";
  return { kind: isSlider ? "range" : "number", low, high, step, preset };
}
