/**
 * Plays one scenario in Node: GATEWAY=<origin> SANDBOX=<origin> node run.mjs <scenario>
 * The last line of its output is the result as JSON.
 */
import { webcrypto } from "node:crypto";
import { WebSocket } from "ws";
import { play } from "./play.js";

// Browsers and newer Nodes have it; the client's realtime expects it.
globalThis.crypto ??= webcrypto;

const [scenario] = process.argv.slice(2);
const { GATEWAY: gateway, SANDBOX: sandbox } = process.env;

const result = await play(scenario, {
  gateway,
  sandbox,
  proxyUrl: { url: `${gateway}/api/fal/proxy`, when: "always" },
  WebSocket,
});
// The client may leave a timer behind, for a token to be renewed: nothing is waited for.
process.stdout.write(`${JSON.stringify(result)}\n`, () => process.exit(0));
