/** Small values that the browser keeps for this page, such as the content of the form. */

const PREFIX = `falproxy:${new URL(".", document.baseURI).pathname}:`;

/**
 * Return a stored value, or null.
 *
 * @param {string} name
 * @param {"localStorage" | "sessionStorage"} [storage] sessionStorage: of this tab
 */
export function readStored(name, storage = "localStorage") {
  try {
    return JSON.parse(window[storage].getItem(PREFIX + name));
  } catch {
    return null; // storage is disabled, or another version of the page has stored it
  }
}

/** @param {string} name @param {unknown} value */
export function writeStored(name, value, storage = "localStorage") {
  try {
    window[storage].setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Storage is disabled or full: the value is lost with a reload.
  }
}
