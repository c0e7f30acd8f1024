/** Error messages for the user. */
import { ApiError, ValidationError } from "@fal-ai/client";

const TITLES = {
  400: "The request is not valid",
  401: "The proxy requires an access key",
  402: "The budget is used up",
  403: "The proxy does not allow this",
  404: "fal did not find this model or request",
  413: "The request is too large",
  422: "The model does not accept this input",
  429: "Too many images at once",
  499: "The job was cancelled",
  502: "fal cannot be reached",
  503: "fal is busy or down",
  504: "fal took too long",
};

/**
 * Return `{title, text, reference, fields}`.
 *
 * reference: status and request id. fields: validation messages by the name of the input.
 */
export function explainError(error) {
  if (error instanceof ValidationError) {
    return explainValidationError(error);
  }
  if (error instanceof ApiError) {
    return {
      title: TITLES[error.status] ?? "That did not work",
      text: messageOf(error),
      reference: referenceOf(error),
      fields: {},
    };
  }
  if (error instanceof TypeError) {
    // Thrown by fetch if there is no response.
    return {
      title: "The proxy cannot be reached",
      text: "Is it running, and are you online?",
      reference: "",
      fields: {},
    };
  }
  return { title: "That did not work", text: error.message, reference: "", fields: {} };
}

function explainValidationError(error) {
  const fields = {};
  for (const { loc, msg } of error.fieldErrors) {
    fields[loc.at(-1)] = msg;
  }
  return {
    title: TITLES[422],
    text: error.fieldErrors.map(({ msg }) => msg).join(" ") || error.message,
    reference: referenceOf(error),
    fields,
  };
}

/** The proxy and fal use different names for the message. */
function messageOf({ body, message }) {
  const text = body?.message ?? body?.detail;
  return typeof text === "string" && text ? text : message;
}

/** fal returns the request id in a header, the proxy in the body of its own errors. */
function referenceOf({ status, requestId, body }) {
  const id = requestId || body?.request_id;
  return id ? `Status ${status}, request ${id}` : `Status ${status}`;
}
