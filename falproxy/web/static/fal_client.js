/** Client of fal's API through the proxy. Requests are never retried here. */
import { fetchFromProxy } from "./access_key.js";
import { setReachable, setSandbox } from "./proxy_status.js";

const PROXY = "api/fal/proxy";
const QUEUE = "https://queue.fal.run";
const UPLOAD = "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3";
const SCHEMA = "https://fal.ai/api/openapi/queue/openapi.json?endpoint_id=";
const NAMESPACES = ["workflows", "comfy"]; // their app ids have a third segment

/** A response with an error status. document: its JSON. retryAfter: seconds. Both may be null. */
export class ResponseError extends Error {
  constructor(response, document) {
    super(`status ${response.status}`);
    this.status = response.status;
    this.document = document;
    this.type = typeof document?.type === "string" ? document.type : null;
    const after = Number.parseFloat(response.headers.get("retry-after") ?? "");
    this.retryAfter = Number.isFinite(after) ? Math.max(0, after) : null;
    this.hasRequestId = response.headers.has("x-fal-request-id"); // fal's, not a gateway's
  }
}

/** No response, or an incomplete one. */
export class NoResponseError extends Error {}

/**
 * Submit a job to fal's queue. This costs money.
 *
 * @param {string} endpoint such as `fal-ai/flux/dev`
 * @param {object} input
 * @returns {Promise<{requestId: string, cacheStatus: string | null}>}
 *   rejects with a NoResponseError or a ResponseError: see `mayHaveBeenAccepted`
 */
export async function submitJob(endpoint, input) {
  const { document, headers } = await callFal(`${QUEUE}/${endpoint}`, {
    method: "POST",
    body: JSON.stringify(input),
  });
  if (typeof document?.request_id !== "string") {
    throw new NoResponseError("the response has no request id");
  }
  return { requestId: document.request_id, cacheStatus: headers.get("cache-status") };
}

/** Return whether fal may have accepted, and may charge for, a submit that failed like this. */
export function mayHaveBeenAccepted(error) {
  if (!(error instanceof ResponseError)) {
    return true;
  }
  return error.status >= 499 && error.status !== 503 && error.type !== "upstream_unreachable";
}

/** Return `{status, queue_position?, logs?, error?, error_type?}`. */
export async function fetchStatus(endpoint, requestId) {
  return (await callFal(`${requestUrl(endpoint, requestId)}/status?logs=1`)).document;
}

export async function fetchResult(endpoint, requestId) {
  return (await callFal(requestUrl(endpoint, requestId))).document;
}

/** Cancel a job. Rejects with a ResponseError 400 if the job is completed already. */
export async function cancelJob(endpoint, requestId) {
  await callFal(`${requestUrl(endpoint, requestId)}/cancel`, { method: "PUT" });
}

/** Return the OpenAPI document of an endpoint. */
export async function fetchSchema(endpoint) {
  return (await callFal(SCHEMA + encodeURIComponent(endpoint))).document;
}

/**
 * Upload a file to fal's CDN and return its URL.
 *
 * @param {Blob} file
 * @param {string} name
 * @param {AbortSignal} signal
 * @param {(sent: number) => void} onProgress receives the number of bytes that were sent
 * @returns {Promise<string>} rejects with a ResponseError 403 if the proxy does not allow uploads
 */
export async function uploadFile(file, name, signal, onProgress) {
  const body = JSON.stringify({ content_type: file.type, file_name: name });
  const { document } = await callFal(UPLOAD, { method: "POST", body, signal });
  await putFile(document.upload_url, file, signal, onProgress);
  return document.file_url;
}

/** PUT a file. Unlike `fetch`, XMLHttpRequest reports the progress. */
function putFile(url, file, signal, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", url);
    request.setRequestHeader("Content-Type", file.type);
    request.upload.onprogress = ({ loaded }) => onProgress(loaded);
    request.onload = () =>
      request.status < 300 ? resolve() : reject(new NoResponseError(`status ${request.status}`));
    request.onerror = () => reject(new NoResponseError("the upload failed"));
    request.onabort = () => reject(signal.reason);
    signal.addEventListener("abort", () => request.abort(), { once: true });
    request.send(file);
  });
}

function requestUrl(endpoint, requestId) {
  const parts = endpoint.split("/");
  const app = parts.slice(0, NAMESPACES.includes(parts[0]) ? 3 : 2).join("/");
  return `${QUEUE}/${app}/requests/${encodeURIComponent(requestId)}`;
}

async function callFal(target, { method = "GET", body, signal } = {}) {
  const headers = { "x-fal-target-url": target, accept: "application/json" };
  if (body !== undefined) {
    headers["content-type"] = "application/json";
  }
  // "no-store" makes browsers send Cache-Control: no-cache, which bypasses the result cache.
  const cache = method === "GET" ? "no-store" : "default";
  let response;
  try {
    response = await fetchFromProxy(PROXY, { method, headers, body, signal, cache });
  } catch (error) {
    throw handleFetchError(error, signal);
  }
  setReachable(true);
  if (response.headers.has("x-falproxy-sandbox")) {
    setSandbox();
  }
  let text;
  try {
    text = await response.text();
  } catch (error) {
    throw handleFetchError(error, signal);
  }
  const document = parseJson(text);
  if (!response.ok) {
    throw new ResponseError(response, document);
  }
  if (document === undefined) {
    throw new NoResponseError("the response is not JSON");
  }
  return { document, headers: response.headers };
}

/** Return the error to throw. Marks the proxy as unreachable unless the request was aborted. */
function handleFetchError(error, signal) {
  if (signal?.aborted) {
    return error;
  }
  setReachable(false);
  return new NoResponseError(error.message);
}

function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
