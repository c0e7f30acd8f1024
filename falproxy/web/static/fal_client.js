/** fal's API through the proxy, spoken as fal's own client does. Nothing here sends anything twice. */
import { noteSandbox, reached } from "./proxy_status.js";
import { fetchHere } from "./access_key.js";

const PROXY = "api/fal/proxy";
const QUEUE = "https://queue.fal.run";
const UPLOAD = "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3";
const SCHEMA = "https://fal.ai/api/openapi/queue/openapi.json?endpoint_id=";
const NAMESPACES = ["workflows", "comfy"]; // their apps have a third segment

/** An answer that is no success. document: its JSON, or null. retryAfter: seconds, or null. */
export class Refusal extends Error {
  constructor(response, document) {
    super(`status ${response.status}`);
    this.status = response.status;
    this.document = document;
    this.type = typeof document?.type === "string" ? document.type : null;
    const after = Number.parseFloat(response.headers.get("retry-after") ?? "");
    this.retryAfter = Number.isFinite(after) ? Math.max(0, after) : null;
  }
}

/** No answer, or one that broke off. */
export class Silence extends Error {}

/**
 * Buys a job.
 *
 * @param {string} endpoint such as `fal-ai/flux/dev`
 * @param {object} input
 * @returns {Promise<{requestId: string, cacheStatus: string | null}>}
 *   rejects with Silence or a Refusal; `mayBeTaken` knows what that means
 */
export async function submit(endpoint, input) {
  const { document, headers } = await call(`${QUEUE}/${endpoint}`, {
    method: "POST",
    body: JSON.stringify(input),
  });
  if (typeof document?.request_id !== "string") {
    throw new Silence("an answer without a request id");
  }
  return { requestId: document.request_id, cacheStatus: headers.get("cache-status") };
}

/**
 * Whether a submit that failed may have been taken, and paid, all the same.
 *
 * @param {unknown} error
 * @returns {boolean}
 */
export function mayBeTaken(error) {
  if (!(error instanceof Refusal)) {
    return true;
  }
  return error.status >= 499 && error.status !== 503 && error.type !== "upstream_unreachable";
}

/**
 * How a job is doing, as fal tells it: `{status, queue_position?, logs?, error?, error_type?}`.
 *
 * @param {string} endpoint
 * @param {string} requestId
 */
export async function statusOf(endpoint, requestId) {
  return (await call(`${requestUrl(endpoint, requestId)}/status?logs=1`)).document;
}

/** The model's answer. @param {string} endpoint @param {string} requestId */
export async function resultOf(endpoint, requestId) {
  return (await call(requestUrl(endpoint, requestId))).document;
}

/**
 * Asks for an end. A Refusal of 400 is a job that has its result already.
 *
 * @param {string} endpoint
 * @param {string} requestId
 */
export async function cancel(endpoint, requestId) {
  await call(`${requestUrl(endpoint, requestId)}/cancel`, { method: "PUT" });
}

/**
 * The OpenAPI document of an endpoint, which says what its inputs are.
 *
 * @param {string} endpoint
 */
export async function schemaOf(endpoint) {
  return (await call(SCHEMA + encodeURIComponent(endpoint))).document;
}

/**
 * Puts a file on fal's CDN and returns its address.
 *
 * @param {Blob} file
 * @param {string} name
 * @param {AbortSignal} signal
 * @returns {Promise<string>} rejects with a Refusal of 403 where uploads are switched off
 */
export async function upload(file, name, signal) {
  const body = JSON.stringify({ content_type: file.type, file_name: name });
  const { document } = await call(UPLOAD, { method: "POST", body, signal });
  const headers = { "Content-Type": file.type };
  const put = await fetch(document.upload_url, { method: "PUT", body: file, headers, signal });
  if (!put.ok) {
    throw new Refusal(put, null);
  }
  return document.file_url;
}

function requestUrl(endpoint, requestId) {
  const parts = endpoint.split("/");
  const app = parts.slice(0, NAMESPACES.includes(parts[0]) ? 3 : 2).join("/");
  return `${QUEUE}/${app}/requests/${encodeURIComponent(requestId)}`;
}

async function call(target, { method = "GET", body, signal } = {}) {
  const headers = { "x-fal-target-url": target, accept: "application/json" };
  if (body !== undefined) {
    headers["content-type"] = "application/json";
  }
  // With "no-store" a browser also sends Cache-Control: no-cache, which asks for a new result.
  const cache = method === "GET" ? "no-store" : "default";
  let response;
  try {
    response = await fetchHere(PROXY, { method, headers, body, signal, cache });
  } catch (error) {
    throw silence(error, signal);
  }
  reached(true);
  if (response.headers.has("x-falproxy-sandbox")) {
    noteSandbox();
  }
  let text;
  try {
    text = await response.text();
  } catch (error) {
    throw silence(error, signal);
  }
  const document = parsed(text);
  if (!response.ok) {
    throw new Refusal(response, document);
  }
  if (document === undefined) {
    throw new Silence("an answer that is no JSON");
  }
  return { document, headers: response.headers };
}

function silence(error, signal) {
  if (signal?.aborted) {
    return error;
  }
  reached(false);
  return new Silence(error.message);
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
