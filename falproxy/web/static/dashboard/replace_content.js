/** Updates of parts of the dashboard that the user may be using. */
import { byId } from "../dom.js";

const waiting = new Map(); // function that creates the latest content, by element
let pressed = null; // the element that a mouse button, a pen or a finger is pressed on

/**
 * Replace what is in an element. What has the focus there keeps it, if it has an id.
 *
 * An element that is being clicked, or whose text is being selected, is replaced afterwards: a click
 * needs the same element at its begin and its end.
 *
 * @param {HTMLElement} container
 * @param {() => Node} create
 */
export function replaceContent(container, create) {
  if (container.contains(pressed)) {
    waiting.set(container, create);
    return;
  }
  const focusedId = container.contains(document.activeElement) ? document.activeElement.id : "";
  container.replaceChildren(create());
  if (focusedId) {
    byId(focusedId)?.focus();
  }
}

function release() {
  pressed = null;
  for (const [container, create] of waiting) {
    replaceContent(container, create);
  }
  waiting.clear();
}

document.addEventListener("pointerdown", ({ target }) => (pressed = target), true);
for (const type of ["pointerup", "pointercancel"]) {
  document.addEventListener(type, () => setTimeout(release), true); // after the click
}
window.addEventListener("blur", release);
