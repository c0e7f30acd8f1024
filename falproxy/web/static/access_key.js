/** Requests to this proxy, with its access key where it wants one. */
import { el } from "./dom.js";

const HEADER = "x-falproxy-key";
const NAME = "falproxy.key";
let asking = null; // one dialog for all requests that are refused at the same time

/**
 * `fetch` of a path of this proxy, relative to the page (`api/fal/proxy`), with the access key where one
 * is known. When the proxy answers 401 a dialog asks for the key, and the request is made again: a 401
 * means that nothing was done. Whoever closes the dialog gets the 401.
 *
 * @param {string} path
 * @param {RequestInit} [init] its body must be one that can be sent twice: no stream
 * @returns {Promise<Response>} rejects with a TypeError where the proxy does not answer
 */
export async function fetchHere(path, init = {}) {
  let key = knownKey();
  for (;;) {
    const response = await fetch(new URL(path, document.baseURI), withKey(init, key));
    if (response.status !== 401) {
      return response;
    }
    const known = knownKey();
    // Another request may have asked in the meantime.
    const given =
      known !== key && known !== null ? known : await askForKey(key !== null, init.signal);
    if (given === null) {
      return response;
    }
    key = given;
  }
}

/** The access key that is remembered, or null. */
export function knownKey() {
  return read(() => sessionStorage) ?? read(() => localStorage);
}

/** Forgets the access key, here and on this device. */
export function forgetKey() {
  for (const storage of [() => sessionStorage, () => localStorage]) {
    try {
      storage().removeItem(NAME);
    } catch {
      // Without storage there is nothing to forget.
    }
  }
  announce();
}

/**
 * Asks for the access key. What is given is remembered in this tab, or on this device if so ticked.
 *
 * @param {boolean} wasRefused whether a key was given already, which the proxy does not know
 * @param {AbortSignal} [signal] closes the dialog
 * @returns {Promise<string | null>} null: the dialog was closed without one
 */
export function askForKey(wasRefused, signal) {
  asking ??= show(wasRefused, signal).finally(() => {
    asking = null;
  });
  return asking;
}

function show(wasRefused, signal) {
  const input = el("input", {
    type: "password",
    id: "access-key",
    autocomplete: "current-password",
    spellcheck: false,
    required: true,
    "aria-describedby": "access-why",
  });
  const remember = el("input", { type: "checkbox", id: "access-remember" });
  const why = wasRefused
    ? "The proxy does not know that key. Please check it, or ask whoever runs the proxy for another."
    : "This proxy lets in who has an access key. Whoever runs it has one for you.";
  const dialog = el(
    "dialog",
    { id: "access-dialog", "aria-labelledby": "access-title" },
    el(
      "form",
      { method: "dialog" },
      el("h2", { id: "access-title" }, "Access key"),
      el("p", { id: "access-why", className: wasRefused ? "problem" : "muted" }, why),
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
        el("button", { type: "submit", className: "button primary", value: "given" }, "Continue"),
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
      const key = dialog.returnValue === "given" ? input.value.trim() : "";
      dialog.remove();
      if (key) {
        keep(key, remember.checked);
      }
      resolve(key || null);
    });
  });
}

let forNow = null; // where the browser keeps nothing at all

function keep(key, onDevice) {
  forNow = key;
  try {
    sessionStorage.setItem(NAME, key);
    if (onDevice) {
      localStorage.setItem(NAME, key);
    } else {
      localStorage.removeItem(NAME);
    }
  } catch {
    // Storage is switched off: the key lives as long as the page.
  }
  announce();
}

function announce() {
  window.dispatchEvent(new Event("falproxy:key"));
}

function read(storage) {
  try {
    return storage().getItem(NAME);
  } catch {
    return forNow;
  }
}

function withKey(init, key) {
  const headers = new Headers(init.headers);
  // A header holds Latin-1 only; a key with anything else is no key of any proxy.
  if (key !== null && /^[\x20-\x7e\x80-\xff]+$/.test(key)) {
    headers.set(HEADER, key);
  }
  return { ...init, headers, credentials: init.credentials ?? "same-origin" };
}
