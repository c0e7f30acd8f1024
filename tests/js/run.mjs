/**
 * Plays one scenario in Node: GATEWAY=<origin> SANDBOX=<origin> node run.mjs <scenario>
 * The last line of its output is the result as JSON.
 */
import { webcrypto } from "node:crypto";
import { WebSocket } from "ws";
import { play } from "./play.js";

// Needed by the client's realtime API; older versions of Node do not have it.
globalThis.crypto ??= webcrypto;

const [scenario] = process.argv.slice(2);
const { GATEWAY: gateway, SANDBOX: sandbox } = process.env;

const result = await play(scenario, {
  gateway,
  sandbox,
  proxyUrl: { url: `${gateway}/api/fal/proxy`, when: "always" },
  WebSocket,
});
// Exit explicitly: the client may have a timer for the renewal of a token.
process.stdout.write(`${JSON.stringify(result)}\n`, () => process.exit(0));
