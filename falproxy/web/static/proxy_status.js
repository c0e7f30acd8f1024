/** The proxy's properties and its reachability, shown as chips in the header. */
import { clearAccessKey, getAccessKey } from "./access_key.js";
import { byId, el } from "./dom.js";

const INFO_URL = "web/about.json";
const RETRY_INTERVAL = 4000; // ms between two attempts while the proxy does not respond

/** Properties of the proxy: defaults until `loadProxyInfo` has run. maxBody: bytes. */
export const proxyInfo = {
  version: "",
  isSandbox: false,
  isLocked: false,
  uploads: true,
  formats: ["jpeg", "png", "webp", "gif", "avif"],
  maxBody: 100 * 2 ** 20,
};
let isReachable = true;
let retryTimer = null;

/** Load the proxy's properties. The defaults stay if the proxy does not respond. */
export async function loadProxyInfo() {
  try {
    const response = await fetch(new URL(INFO_URL, document.baseURI), { cache: "no-store" });
    Object.assign(proxyInfo, await response.json());
    setReachable(true);
  } catch {
    setReachable(false);
  }
}

export function setSandbox() {
  if (!proxyInfo.isSandbox) {
    proxyInfo.isSandbox = true;
    renderChips();
  }
}

/**
 * Record whether the proxy responds. While it does not, it is tried again every `RETRY_INTERVAL`.
 *
 * @param {boolean} isReachableNow
 */
export function setReachable(isReachableNow) {
  if (isReachableNow !== isReachable) {
    isReachable = isReachableNow;
    if (isReachableNow) {
      window.dispatchEvent(new Event("falproxy:wake"));
    }
  }
  clearTimeout(retryTimer);
  retryTimer = isReachableNow ? null : setTimeout(loadProxyInfo, RETRY_INTERVAL);
  renderChips();
}

export function startStatusChips() {
  window.addEventListener("online", () => {
    renderChips();
    window.dispatchEvent(new Event("falproxy:wake"));
  });
  window.addEventListener("offline", renderChips);
  window.addEventListener("falproxy:key", renderChips);
}

let renderedStatus = "";

function renderChips() {
  const hasKey = getAccessKey() !== null;
  const status = [navigator.onLine, isReachable, proxyInfo.isSandbox, hasKey].join();
  if (status === renderedStatus) {
    return;
  }
  renderedStatus = status;
  const chips = [];
  if (!navigator.onLine && !isReachable) {
    chips.push(el("span", { className: "chip bad" }, "You are offline"));
  } else if (!isReachable) {
    chips.push(el("span", { className: "chip bad" }, "The proxy does not respond"));
  }
  if (proxyInfo.isSandbox) {
    const title = "Offline emulator of fal: images are drawn on this machine, nothing is charged.";
    chips.push(el("span", { className: "chip warn", title }, "Sandbox"));
  }
  if (hasKey) {
    const props = { type: "button", className: "chip button-chip", onclick: clearAccessKey };
    chips.push(el("button", props, "Forget key"));
  }
  byId("proxy-status").replaceChildren(...chips);
}
