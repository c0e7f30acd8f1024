/**
 * What a page of another origin is made of: it reaches the proxy by its full address, which the
 * script's own element names, with an access key. browser.mjs calls `window.play` in it; there the
 * gateway is whoever serves the page.
 */
import { fal } from "@fal-ai/client";
import * as scenarios from "./scenarios.js";

const { proxyUrl, accessKey } = document.currentScript.dataset;
const ACCESS = { "x-falproxy-key": accessKey };

fal.config({
  proxyUrl,
  credentials: "client-id:client-secret",
  suppressLocalCredentialsWarning: true,
  requestMiddleware: async (request) => ({
    ...request,
    headers: { ...request.headers, ...ACCESS },
  }),
});

/** A call without fal's client, and of its answer what the page can see. */
async function fetchPlainly() {
  const response = await fetch(proxyUrl, {
    method: "POST",
    headers: {
      ...ACCESS,
      "content-type": "application/json",
      "x-fal-target-url": "https://fal.run/fal-ai/flux/dev",
    },
    body: JSON.stringify({ prompt: "a heron at dawn" }),
  });
  return { status: response.status, headers: Object.fromEntries(response.headers) };
}

// Calls that browsers send without asking first, since a form could send them too.

async function postText() {
  return sendBlindly({ method: "POST", body: JSON.stringify({ prompt: "a heron at dawn" }) });
}

async function postNothing() {
  return sendBlindly({ method: "POST" });
}

async function sendBlindly(request) {
  const url = proxyUrl.replace(/proxy$/, "queue/fal-ai/flux/dev");
  const { type, status } = await fetch(url, { mode: "no-cors", ...request });
  return { type, status };
}

const played = { ...scenarios, fetchPlainly, postText, postNothing };

window.play = (name, { gateway }) => played[name]({ fal, gateway, statuses: [] });
