/** The proxy's properties and its reachability, shown as chips in the header. */
import { clearAccessKey, enterAccessKey, getAccessKey } from "./access_key.js";
import { byId, el } from "./dom.js";
import { icon } from "./icons.js";

const INFO_URL = "web/about.json";
const RETRY_INTERVAL = 4000; // ms between two attempts while the proxy does not respond
const CHECK_TIMEOUT = 5000; // ms

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
  await checkReachable();
}

/**
 * Request the proxy's properties. Return whether the proxy responds: not a host in front of it.
 *
 * @param {AbortSignal} [signal]
 */
export async function checkReachable(signal) {
  const controller = new AbortController();
  const abort = () => controller.abort();
  const timer = setTimeout(abort, CHECK_TIMEOUT);
  signal?.addEventListener("abort", abort);
  try {
    const response = await fetch(new URL(INFO_URL, document.baseURI), {
      cache: "no-store",
      signal: controller.signal,
    });
    const info = await response.json();
    if (!response.ok || typeof info?.version !== "string") {
      throw new Error("not a response of the proxy");
    }
    Object.assign(proxyInfo, info, { isSandbox: info.isSandbox || proxyInfo.isSandbox });
    setReachable(true);
    renderChips();
    return true;
  } catch {
    if (!signal?.aborted) {
      setReachable(false);
    }
    return false;
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", abort);
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
  const { isSandbox, isLocked } = proxyInfo;
  const status = [navigator.onLine, isReachable, isSandbox, isLocked, hasKey].join();
  if (status === renderedStatus) {
    return;
  }
  renderedStatus = status;
  const chips = [];
  if (!isReachable) {
    const text = navigator.onLine ? "The proxy does not respond" : "You are offline";
    chips.push(el("span", { className: "chip bad" }, text));
  }
  if (hasKey) {
    chips.push(chipButton("Forget key", clearAccessKey));
  } else if (isLocked) {
    chips.push(chipButton("Enter key", enterAccessKey));
  }
  if (isSandbox) {
    const title = "Offline emulator of fal: results are drawn on this machine, nothing is charged.";
    chips.push(el("span", { className: "chip warn", title }, "Sandbox: free"));
  }
  byId("proxy-status").replaceChildren(...chips);
}

function chipButton(label, onclick) {
  return el(
    "button",
    { type: "button", className: "chip button-chip", title: label, onclick },
    icon("key"),
    el("span", {}, label),
  );
}
