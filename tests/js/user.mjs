/**
 * Calls the proxy with @fal-ai/client for three users:
 *
 *     GATEWAY=<origin> ACCESS_KEY=<secret> node user.mjs
 */
import { createFalClient } from "@fal-ai/client";

const { GATEWAY: gateway, ACCESS_KEY: accessKey } = process.env;
const USER = "x-falproxy-user";
const DEV = "fal-ai/flux/dev";
const input = { prompt: "a heron", image_size: "square" };

/** Return a client whose requests have these headers. */
function client(headers) {
  return createFalClient({
    proxyUrl: { url: `${gateway}/api/fal/proxy`, when: "always" },
    requestMiddleware: async (request) => ({
      ...request,
      headers: { ...request.headers, "x-falproxy-key": accessKey, ...headers },
    }),
  });
}

await client({ [USER]: "ada" }).run(DEV, { input });
await client({ [USER]: "bob" }).subscribe(DEV, { input, mode: "polling", pollInterval: 20 });
await client({}).subscribe(DEV, { input, headers: { [USER]: "eve" }, mode: "streaming" });
