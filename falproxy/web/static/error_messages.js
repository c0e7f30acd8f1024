/** Error messages for the user: what went wrong and what to do about it. */
import { NoResponseError, ResponseError } from "./fal_client.js";
import { inputLabel } from "./field.js";

// Title and action by fal's error type (docs.fal.ai/errors).
const BY_TYPE = {
  content_policy_violation: [
    "The model's safety checker refused this",
    "Change the prompt, or try another image.",
  ],
  no_media_generated: ["The model generated no image", "Describe more clearly what to show."],
  image_load_error: ["The image could not be read", "Use another image or URL."],
  unsupported_image_format: [
    "The model does not support this image format",
    "Save it as JPEG or PNG, and try again.",
  ],
  file_download_error: [
    "fal could not download the image",
    "Check that its URL is public, or upload the file instead.",
  ],
  file_too_large: ["The image file is too large", "Make it smaller, and try again."],
  image_too_large: ["The image has too many pixels", "Make it smaller, and try again."],
  image_too_small: ["The image has too few pixels", "Try a larger one."],
  face_detection_error: [
    "No face was found in the image",
    "Try one that shows a face from the front.",
  ],
  upstream_unreachable: ["fal cannot be reached", "Nothing was charged. Try again in a minute."],
  request_timeout: ["fal took too long", "Try again in a few minutes."],
  startup_timeout: ["fal could not start a runner in time", "Try again in a few minutes."],
  generation_timeout: ["The model took too long", "Try again, perhaps with fewer steps or images."],
  client_cancelled: ["Cancelled", "The job was stopped."],
};
const CAUSES = new Set(["image_load_error", "file_download_error"]); // errors whose message names the cause
const BY_STATUS = {
  401: ["The proxy requires an access key", "Ask the operator of the proxy for one."],
  402: ["The budget is used up", "Ask the operator of the proxy."],
  403: ["The proxy does not allow this", "Choose another model, or ask the operator of the proxy."],
  404: ["fal did not find this", "The job may have expired, or there is no such model."],
  413: ["The request is too large", "Use smaller or fewer images."],
  422: ["The model does not accept this input", "Correct the input, and try again."],
  429: ["Too many requests", "Wait a moment, and try again."],
  500: ["fal has a problem", "This is not caused by your input. Try again in a minute."],
};

/**
 * Explain an error to the user.
 *
 * @param {unknown} error a ResponseError, a NoResponseError, or any other
 * @returns {{title: string, action: string, detail: string, fields: string[], status: number | null}}
 *   detail: the message of fal or the proxy; fields: names of the inputs that caused it
 */
export function explainError(error) {
  if (error instanceof NoResponseError) {
    const title = "The proxy does not respond";
    return {
      title,
      action: "Is it running, and are you online?",
      detail: "",
      fields: [],
      status: null,
    };
  }
  if (!(error instanceof ResponseError)) {
    const detail = error instanceof Error ? error.message : String(error);
    return { title: "That did not work", action: "Try again.", detail, fields: [], status: null };
  }
  const entries = Array.isArray(error.document?.detail) ? error.document.detail : [];
  const type = entries[0]?.type ?? error.document?.error_type ?? error.type;
  const status = BY_STATUS[error.status] ?? BY_STATUS[error.status >= 500 ? 500 : 422];
  const detail = errorDetail(error, entries);
  const [title, action] =
    (typeof type === "string" && Object.hasOwn(BY_TYPE, type) && BY_TYPE[type]) || status;
  const fields = entries.map(fieldName).filter(Boolean);
  return {
    title,
    action: retryAction(error) ?? causeOf(type, entries) ?? action,
    detail,
    fields,
    status: error.status,
  };
}

/** Return what exactly is wrong with an image, which no general advice can, or null. */
function causeOf(type, entries) {
  return CAUSES.has(type) && messageText(entries[0]?.msg) ? messageText(entries[0].msg) : null;
}

/** Return when to retry after a 429 or 402 with `Retry-After`, or null. */
function retryAction(error) {
  if (![402, 429].includes(error.status) || error.retryAfter === null) {
    return null;
  }
  const wait = describeWait(error.retryAfter);
  return error.status === 429
    ? `Try again in ${wait}.`
    : `Ask the operator, or try again in ${wait}.`;
}

/** `12 s`, `15 minutes`, `5 hours`, `3 days`: rounded up. @param {number} seconds */
export function describeWait(seconds) {
  const units = [
    [86_400, "days"],
    [3600, "hours"],
    [60, "minutes"],
  ];
  const [length, unit] = units.find(([each]) => seconds > 2 * each) ?? [1, "s"];
  return `${Math.ceil(seconds / length)} ${unit}`;
}

function errorDetail(error, entries) {
  if (entries.length > 0) {
    return entries
      .map((entry) => [inputLabel(fieldName(entry)), messageText(entry.msg)])
      .map((parts) => parts.filter(Boolean).join(": "))
      .join(" ");
  }
  const document = error.document ?? {};
  return (
    messageText(document.detail) ||
    messageText(document.message) ||
    messageText(document.error?.message)
  );
}

/** Return the name of the input that an entry of `detail` is about, or an empty string. */
function fieldName(entry) {
  const last = Array.isArray(entry?.loc)
    ? entry.loc.filter((part) => typeof part === "string").at(-1)
    : null;
  return typeof last === "string" && last !== "body" ? last : "";
}

function messageText(value) {
  return typeof value === "string" ? value.slice(0, 600) : "";
}
