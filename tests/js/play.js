/** Configures @fal-ai/client for a scenario and plays it, in Node or in a page. */
import { fal } from "@fal-ai/client";
import * as scenarios from "./scenarios.js";

/**
 * Return the result of a scenario. `gateway` and `sandbox` are origins; `proxyUrl` and `WebSocket`
 * depend on the environment.
 */
export async function play(name, { gateway, sandbox, proxyUrl, WebSocket }) {
  const statuses = [];
  globalThis.WebSocket = redirectToSandbox(WebSocket, sandbox);
  fal.config({
    proxyUrl,
    // An app may still have its own key configured. The proxy must not forward it.
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

/**
 * Return a WebSocket class for the sandbox: the client connects to wss://fal.run without the proxy.
 */
function redirectToSandbox(WebSocket, sandbox) {
  const origin = sandbox.replace(/^http/, "ws");
  return class extends WebSocket {
    constructor(url) {
      super(String(url).replace(/^wss:\/\//, `${origin}/`));
    }
  };
}
