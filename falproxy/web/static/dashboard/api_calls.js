/** The request to the API that has the numbers of each panel. */
import { byId, el } from "../dom.js";
import { rangeQuery } from "./time_range.js";

const PERFORMANCE = "api/usage/performance";
// Panel → path and parameters, beside those of the time range.
const CALLS = {
  "calls-chart": ["api/usage", {}],
  "cost-chart": ["api/usage", {}],
  "duration-chart": [PERFORMANCE, {}],
  "parts-chart": [PERFORMANCE, {}],
  "errors-chart": [PERFORMANCE, {}],
  failures: [PERFORMANCE, {}],
  endpoints: ["api/usage", { by: "endpoint" }],
  routes: ["api/usage", { by: "route" }],
  principals: ["api/usage", { by: "principal" }],
  users: ["api/usage", { by: "user" }],
  live: ["api/usage", {}],
  state: ["api/usage/state", {}],
};

/** Show the requests of the present time range. */
export function showApiCalls() {
  for (const [id, [path, parameters]] of Object.entries(CALLS)) {
    showApiCall(id, path, new URLSearchParams([...Object.entries(parameters), ...rangeQuery()]));
  }
  showApiCall("keys", "api/keys");
}

/** @param {string} id of the element above @param {string} path @param {URLSearchParams} [query] */
export function showApiCall(id, path, query) {
  const text = `GET ${path}${query?.size ? `?${decodeURIComponent(query)}` : ""}`;
  const above = byId(id);
  const isFigure = above.tagName === "FIGURE";
  const place = isFigure ? above.querySelector(":scope > .api-call") : above.nextElementSibling;
  if (place?.classList.contains("api-call")) {
    place.lastElementChild.textContent = text;
    return;
  }
  const line = el("p", { className: "api-call muted small" }, "API: ", el("code", {}, text));
  isFigure ? above.append(line) : above.after(line);
}
