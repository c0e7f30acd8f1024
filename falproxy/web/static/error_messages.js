/** What went wrong, in words, and what to do about it. */
import { Refusal, Silence } from "./fal_client.js";

// By fal's type of an error (docs.fal.ai/errors): what a person can do.
const BY_TYPE = {
  content_policy_violation: [
    "The model's safety checker refused this",
    "Say it in another way, or try another picture.",
  ],
  no_media_generated: ["The model made no picture", "Say more plainly what should be seen."],
  image_load_error: [
    "The picture could not be read",
    "Try another one, or save it as JPEG or PNG first.",
  ],
  unsupported_image_format: [
    "The model cannot read this kind of picture",
    "Save it as JPEG or PNG, and try again.",
  ],
  file_download_error: [
    "fal could not fetch the picture",
    "Check that its address opens for everybody, or upload the file instead.",
  ],
  file_too_large: ["The picture is too large", "Make it smaller, and try again."],
  image_too_large: ["The picture has too many pixels", "Make it smaller, and try again."],
  image_too_small: ["The picture has too few pixels", "Try a larger one."],
  face_detection_error: [
    "No face was found in the picture",
    "Try one that shows a face from the front.",
  ],
  upstream_unreachable: ["fal cannot be reached", "Nothing was bought. Try again in a minute."],
  request_timeout: ["fal took too long", "Try again in a few minutes."],
  startup_timeout: ["fal had no machine free in time", "Try again in a few minutes."],
  generation_timeout: [
    "The model took too long",
    "Try again, with fewer steps or pictures perhaps.",
  ],
  client_cancelled: ["Cancelled", "Nothing more happens with this job."],
};
const BY_STATUS = {
  401: ["The proxy wants an access key", "Whoever runs the proxy has one for you."],
  402: ["The budget for today is used up", "Ask whoever runs the proxy, or come back tomorrow."],
  403: ["The proxy does not allow this", "Choose another model, or ask whoever runs the proxy."],
  404: ["fal does not know this", "The job may be too old, or the model may be gone."],
  413: ["That is too much at once", "Use smaller pictures, or fewer."],
  422: ["The model does not take this input", "Change what it names, and try again."],
  429: ["Too many calls at once", "Wait a moment, and try again."],
  500: ["fal has a problem", "It is not your doing. Try again in a minute."],
};

/**
 * @param {unknown} error a Refusal, a Silence, or anything
 * @returns {{title: string, action: string, detail: string, fields: string[], status: number | null}}
 *   detail: what fal or the proxy said; fields: the inputs that it is about
 */
export function explain(error) {
  if (error instanceof Silence) {
    const title = "The proxy does not answer";
    return {
      title,
      action: "Is it running, and are you online?",
      detail: "",
      fields: [],
      status: null,
    };
  }
  if (!(error instanceof Refusal)) {
    const detail = error instanceof Error ? error.message : String(error);
    return { title: "That did not work", action: "Try again.", detail, fields: [], status: null };
  }
  const entries = Array.isArray(error.document?.detail) ? error.document.detail : [];
  const type = entries[0]?.type ?? error.document?.error_type ?? error.type;
  const status = BY_STATUS[error.status] ?? BY_STATUS[error.status >= 500 ? 500 : 422];
  const [title, action] =
    (typeof type === "string" && Object.hasOwn(BY_TYPE, type) && BY_TYPE[type]) || status;
  const fields = entries.map(fieldOf).filter(Boolean);
  return {
    title,
    action: patience(error, action),
    detail: said(error, entries),
    fields,
    status: error.status,
  };
}

function patience(error, action) {
  if (error.status === 429 && error.retryAfter !== null) {
    return `Try again in ${Math.ceil(error.retryAfter)} s.`;
  }
  return action;
}

function said(error, entries) {
  if (entries.length > 0) {
    return entries
      .map((entry) => [nice(fieldOf(entry)), textOf(entry.msg)].filter(Boolean).join(": "))
      .join(" ");
  }
  const document = error.document ?? {};
  return textOf(document.detail) || textOf(document.message) || textOf(document.error?.message);
}

function fieldOf(entry) {
  const last = Array.isArray(entry?.loc)
    ? entry.loc.filter((part) => typeof part === "string").at(-1)
    : null;
  return typeof last === "string" && last !== "body" ? last : "";
}

function textOf(value) {
  return typeof value === "string" ? value.slice(0, 600) : "";
}

/** An input's name as people write it: `image_url` is "Image", `num_images` is "Pictures". */
export function nice(name) {
  const known = {
    num_images: "Pictures",
    image_url: "Picture",
    image_urls: "Pictures",
    num_inference_steps: "Steps",
    guidance_scale: "Guidance",
    image_size: "Size",
    output_format: "Format",
    loras: "LoRA styles",
  };
  if (Object.hasOwn(known, name)) {
    return known[name];
  }
  const words = name.replace(/_urls?$/, "").replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}
