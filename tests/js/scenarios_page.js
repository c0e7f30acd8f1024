/** Script of the page that scenarios run in: browser.mjs calls `window.play`. */
import { play } from "./play.js";

const { WebSocket } = window;

window.play = (name, origins) => play(name, { ...origins, proxyUrl: "/api/fal/proxy", WebSocket });
