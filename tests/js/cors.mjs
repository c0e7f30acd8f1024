/**
 * Script of a page of another origin. It calls the proxy by its full URL and with an access key,
 * both from the attributes of its script element. browser.mjs calls `window.play` in it; `gateway`
 * is the page's own origin.
 */
import { fal } from "@fal-ai/client";
import * as scenarios from "./scenarios.js";

const { proxyUrl, accessKey } = document.currentScript.dataset;
const ACCESS_HEADERS = { "x-falproxy-key": accessKey };

fal.config({
  proxyUrl,
  credentials: "client-id:client-secret",
  suppressLocalCredentialsWarning: true,
  requestMiddleware: async (request) => ({
    ...request,
    headers: { ...request.headers, ...ACCESS_HEADERS },
  }),
});

/** Call a model without fal's client. Return the parts of the response that the page can read. */
async function fetchDirectly() {
  const response = await fetch(proxyUrl, {
    method: "POST",
    headers: {
      ...ACCESS_HEADERS,
      "content-type": "application/json",
      "x-fal-target-url": "https://fal.run/fal-ai/flux/dev",
    },
    body: JSON.stringify({ prompt: "a heron at dawn" }),
  });
  return { status: response.status, headers: Object.fromEntries(response.headers) };
}

// Requests that browsers send without a preflight, because a form could send them too.

async function postText() {
  return sendWithoutPreflight({ method: "POST", body: JSON.stringify({ prompt: "a heron at dawn" }) });
}

async function postNothing() {
  return sendWithoutPreflight({ method: "POST" });
}

async function sendWithoutPreflight(request) {
  const url = proxyUrl.replace(/proxy$/, "queue/fal-ai/flux/dev");
  const { type, status } = await fetch(url, { mode: "no-cors", ...request });
  return { type, status };
}

const allScenarios = { ...scenarios, fetchDirectly, postText, postNothing };

window.play = (name, { gateway }) => allScenarios[name]({ fal, gateway, statuses: [] });
