/** Making elements. All text goes in as text: what fal says is never read as HTML. */

/**
 * An element. Names of `props` are properties (`className`, `hidden`, `onclick`), except those with a
 * dash and `role`, `for`, which are attributes; those that are null or undefined are left out.
 *
 * @param {string} tag
 * @param {Record<string, unknown>} [props]
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

/** The element of an id that the page has for certain. @param {string} id */
export function find(id) {
  return document.getElementById(id);
}

/**
 * An address that a page may show or link to; null for any other, such as `javascript:`.
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
    const isFine =
      ["https:", "http:", "blob:"].includes(url.protocol) || /^data:image\/(?!svg)/i.test(value);
    return isFine ? url.href : null;
  } catch {
    return null;
  }
}

/** A name for something of this page: 128 random bits in hex. Also outside of secure contexts. */
export function newName() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
