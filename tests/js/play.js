/** Sets @fal-ai/client up for one scenario and plays it, in Node or in a page. */
import { fal } from "@fal-ai/client";
import * as scenarios from "./scenarios.js";

/**
 * The scenario's result. `gateway` and `sandbox` are origins; `proxyUrl` and `WebSocket` are what
 * the client would be given, or find, where this runs.
 */
export async function play(name, { gateway, sandbox, proxyUrl, WebSocket }) {
  const statuses = [];
  globalThis.WebSocket = sandboxed(WebSocket, sandbox);
  fal.config({
    proxyUrl,
    // An app may still have a key of its own configured. It must never get past the proxy.
    credentials: "client-id:client-secret",
    suppressLocalCredentialsWarning: true,
    retry: { baseDelay: 20 },
    fetch: async (...request) => {
      const response = await fetch(...request);
      statuses.push(response.status);
      return response;
    },
  });
  return scenarios[name]({ fal, gateway, statuses });
}

/** The client opens wss://fal.run by itself, past any proxy: here that is the sandbox. */
function sandboxed(WebSocket, sandbox) {
  const origin = sandbox.replace(/^http/, "ws");
  return class extends WebSocket {
    constructor(url) {
      super(String(url).replace(/^wss:\/\//, `${origin}/`));
    }
  };
}
