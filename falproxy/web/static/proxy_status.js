/** What this proxy is, and whether it can be reached: the chips in the header. */
import { forgetKey, knownKey } from "./access_key.js";
import { el, find } from "./dom.js";

const ABOUT = "web/about.json";
const LOOK_AGAIN = 4000; // ms between two looks at a proxy that does not answer
const UNKNOWN = {
  version: "",
  isSandbox: false,
  isLocked: false,
  uploads: true,
  formats: ["jpeg", "png", "webp", "gif", "avif"],
  maxBody: 100 * 2 ** 20,
};

/** What the proxy says of itself, all of it known after `loadAbout`. maxBody: bytes. */
export const about = { ...UNKNOWN };
let isReached = true;
let timer = null;

/** Asks the proxy what it is. Without an answer the page goes on with what is usual. */
export async function loadAbout() {
  try {
    const response = await fetch(new URL(ABOUT, document.baseURI), { cache: "no-store" });
    Object.assign(about, await response.json());
    reached(true);
  } catch {
    reached(false);
  }
}

/** Notes that answers come from a sandbox. */
export function noteSandbox() {
  if (!about.isSandbox) {
    about.isSandbox = true;
    showStates();
  }
}

/**
 * Notes whether the proxy has answered; one that has not is looked at until it does.
 *
 * @param {boolean} now
 */
export function reached(now) {
  if (now !== isReached) {
    isReached = now;
    if (now) {
      window.dispatchEvent(new Event("falproxy:wake"));
    }
  }
  clearTimeout(timer);
  timer = now ? null : setTimeout(loadAbout, LOOK_AGAIN);
  showStates();
}

/** Keeps the chips true. */
export function watchStates() {
  window.addEventListener("online", () => {
    showStates();
    window.dispatchEvent(new Event("falproxy:wake"));
  });
  window.addEventListener("offline", showStates);
  window.addEventListener("falproxy:key", showStates);
}

let shown = "";

function showStates() {
  const states = [navigator.onLine, isReached, about.isSandbox, knownKey() !== null].join();
  if (states === shown) {
    return;
  }
  shown = states;
  const chips = [];
  if (!navigator.onLine && !isReached) {
    chips.push(el("span", { className: "chip bad" }, "You are offline"));
  } else if (!isReached) {
    chips.push(el("span", { className: "chip bad" }, "The proxy does not answer"));
  }
  if (about.isSandbox) {
    const title = "An offline fal: pictures are drawn on this machine, and nothing is paid.";
    chips.push(el("span", { className: "chip warn", title }, "Sandbox"));
  }
  if (knownKey() !== null) {
    const props = { type: "button", className: "chip button-chip", onclick: forgetKey };
    chips.push(el("button", props, "Forget key"));
  }
  find("states").replaceChildren(...chips);
}
