/** DOM helpers. Text is inserted as text: nothing that fal sends is parsed as HTML. */

/**
 * Create an element.
 *
 * @param {string} tag
 * @param {Record<string, unknown>} [props] properties (`className`, `hidden`, `onclick`); names with a dash,
 *   `role` and `for` are set as attributes; null and undefined are skipped
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {HTMLElement}
 */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined) {
      continue;
    }
    if (name.includes("-") || name === "role" || name === "for") {
      element.setAttribute(name, String(value));
    } else {
      element[name] = value;
    }
  }
  element.append(
    ...children.filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** Return the element with an id that exists in the page's HTML. @param {string} id */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Return a URL that the page may show or link to, or null for any other, such as `javascript:`.
 *
 * @param {unknown} value
 * @returns {string | null}
 */
export function safeUrl(value) {
  if (typeof value !== "string") {
    return null;
  }
  try {
    const url = new URL(value);
    const isSafe =
      ["https:", "http:", "blob:"].includes(url.protocol) || /^data:image\/(?!svg)/i.test(value);
    return isSafe ? url.href : null;
  } catch {
    return null;
  }
}

/** Return 128 random bits in hex. Unlike `crypto.randomUUID` it works without https. */
export function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
