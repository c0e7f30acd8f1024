/** What the scenarios' page is made of: browser.mjs calls `window.play` in it. */
import { play } from "./play.js";

const { WebSocket } = window;

window.play = (name, origins) => play(name, { ...origins, proxyUrl: "/api/fal/proxy", WebSocket });
