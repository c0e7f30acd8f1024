/** What went wrong, in words for the person at the page. */
import { ApiError, ValidationError } from "@fal-ai/client";

const TITLES = {
  400: "The request was not understood",
  401: "The proxy wants to know who you are",
  402: "The budget is used up",
  403: "This is not allowed here",
  404: "fal does not know this model or request",
  413: "That is too large to send",
  422: "fal cannot work with this input",
  429: "Too many pictures at once",
  499: "The picture was cancelled",
  502: "fal cannot be reached",
  503: "fal is busy or down",
  504: "fal took too long",
};

/** `{title, text, trace, fields}`; `fields` are fal's complaints by the last name of their place. */
export function explain(error) {
  if (error instanceof ValidationError) {
    return validation(error);
  }
  if (error instanceof ApiError) {
    return {
      title: TITLES[error.status] ?? "That did not work",
      text: sentence(error),
      trace: trace(error),
      fields: {},
    };
  }
  if (error instanceof TypeError) {
    // What fetch throws when there was no answer at all.
    return {
      title: "The proxy cannot be reached",
      text: "Is it running, and are you online?",
      trace: "",
      fields: {},
    };
  }
  return { title: "That did not work", text: error.message, trace: "", fields: {} };
}

function validation(error) {
  const fields = {};
  for (const { loc, msg } of error.fieldErrors) {
    fields[loc.at(-1)] = msg;
  }
  return {
    title: TITLES[422],
    text: error.fieldErrors.map(({ msg }) => msg).join(" ") || error.message,
    trace: trace(error),
    fields,
  };
}

/** The proxy and fal put their sentence under different names. */
function sentence({ body, message }) {
  const text = body?.message ?? body?.detail;
  return typeof text === "string" && text ? text : message;
}

/** fal names a request in a header, the proxy in the body of an error of its own. */
function trace({ status, requestId, body }) {
  const id = requestId || body?.request_id;
  return id ? `Status ${status}, request ${id}` : `Status ${status}`;
}
