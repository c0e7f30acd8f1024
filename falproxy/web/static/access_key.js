/** Requests to this proxy with its access key, and the dialog that asks for the key. */
import { el } from "./dom.js";

const HEADER = "x-falproxy-key";
const STORAGE_KEY = "falproxy.key";
let openDialog = null; // promise of the dialog: requests refused at the same time share one
let keyInMemory = null; // used if storage is disabled
let isDeclined = false; // the dialog was closed without a key: it is not shown again by itself

/**
 * `fetch` a path of this proxy with the access key. After a 401, which means that the request had
 * no effect, a dialog asks for the key and the request is sent again. The 401 is returned if the
 * dialog is closed, or was closed before.
 *
 * @param {string} path relative to the page, such as `api/fal/proxy`
 * @param {RequestInit} [init] its body must not be a stream, because it may be sent twice
 * @returns {Promise<Response>} rejects with a TypeError if the proxy does not respond
 */
export async function fetchFromProxy(path, init = {}) {
  let key = getAccessKey();
  for (;;) {
    const response = await fetch(new URL(path, document.baseURI), withAccessKey(init, key));
    if (response.status !== 401) {
      return response;
    }
    const storedKey = getAccessKey();
    const wasRejected = key !== null;
    if (wasRejected && storedKey === key) {
      clearAccessKey();
    }
    // Another request may have opened the dialog in the meantime.
    const nextKey =
      storedKey !== key && storedKey !== null
        ? storedKey
        : await promptUnlessDeclined(wasRejected, init.signal);
    if (nextKey === null) {
      return response;
    }
    key = nextKey;
  }
}

async function promptUnlessDeclined(wasRejected, signal) {
  if (isDeclined && !wasRejected && openDialog === null) {
    return null;
  }
  return promptForAccessKey(wasRejected, signal);
}

/** Show the dialog with the next refused request, although it was closed before. */
export function allowPrompt() {
  isDeclined = false;
}

/** Ask for the access key because the user wants to enter it. */
export function enterAccessKey() {
  return promptForAccessKey(false);
}

export function getAccessKey() {
  return readKey(() => sessionStorage) ?? readKey(() => localStorage);
}

export function clearAccessKey() {
  keyInMemory = null;
  for (const getStorage of [() => sessionStorage, () => localStorage]) {
    try {
      getStorage().removeItem(STORAGE_KEY);
    } catch {
      // Storage is disabled: it holds no key.
    }
  }
  dispatchKeyChange();
}

/**
 * Ask for the access key. It is stored for this tab, or on this device if that box is checked.
 *
 * @param {boolean} wasRejected whether the proxy has rejected a key already
 * @param {AbortSignal} [signal] closes the dialog
 * @returns {Promise<string | null>} null: the dialog was closed without a key
 */
export function promptForAccessKey(wasRejected, signal) {
  openDialog ??= showDialog(wasRejected, signal).finally(() => {
    openDialog = null;
  });
  return openDialog;
}

function showDialog(wasRejected, signal) {
  const input = el("input", {
    type: "password",
    id: "access-key",
    autocomplete: "current-password",
    spellcheck: false,
    required: true,
    "aria-describedby": "access-reason",
  });
  const remember = el("input", { type: "checkbox", id: "access-remember" });
  const reason = wasRejected
    ? "This access key is not valid. Check it, or ask the operator of the proxy for another one."
    : "This proxy requires an access key. Ask the operator of the proxy for one.";
  const dialog = el(
    "dialog",
    { id: "access-dialog", "aria-labelledby": "access-title" },
    el(
      "form",
      { method: "dialog" },
      el("h2", { id: "access-title" }, "Access key"),
      el("p", { id: "access-reason", className: wasRejected ? "problem" : "muted" }, reason),
      el("div", { className: "field" }, el("label", { for: "access-key" }, "Your key"), input),
      el(
        "label",
        { className: "check", for: "access-remember" },
        remember,
        "Remember it on this device",
      ),
      el(
        "div",
        { className: "row end" },
        el(
          "button",
          { type: "button", className: "button quiet", onclick: () => dialog.close() },
          "Not now",
        ),
        el("button", { type: "submit", className: "button primary", value: "submit" }, "Continue"),
      ),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  input.focus();
  const close = () => dialog.close();
  signal?.addEventListener("abort", close);
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      signal?.removeEventListener("abort", close);
      const key = dialog.returnValue === "submit" ? input.value.trim() : "";
      dialog.remove();
      isDeclined = key === "";
      if (key) {
        storeKey(key, remember.checked);
      }
      resolve(key || null);
    });
  });
}

function storeKey(key, isOnDevice) {
  keyInMemory = key;
  try {
    sessionStorage.setItem(STORAGE_KEY, key);
    if (isOnDevice) {
      localStorage.setItem(STORAGE_KEY, key);
    } else {
      localStorage.removeItem(STORAGE_KEY);
    }
  } catch {
    // Storage is disabled: the key is valid until the page is closed.
  }
  dispatchKeyChange();
}

function dispatchKeyChange() {
  window.dispatchEvent(new Event("falproxy:key"));
}

function readKey(getStorage) {
  try {
    return getStorage().getItem(STORAGE_KEY);
  } catch {
    return keyInMemory;
  }
}

function withAccessKey(init, key) {
  const headers = new Headers(init.headers);
  // A header value is Latin-1, so a key with other characters cannot be valid.
  if (key !== null && /^[\x20-\x7e\x80-\xff]+$/.test(key)) {
    headers.set(HEADER, key);
  }
  return { ...init, headers, credentials: init.credentials ?? "same-origin" };
}
