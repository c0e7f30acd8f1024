/** A short notice at the bottom of the page, with an action such as "Undo". */
import { byId, el } from "./dom.js";

const TIME = 8000; // ms
let timer = null;

/**
 * @param {string} text
 * @param {{label: string, onclick: () => void}} [action]
 */
export function showToast(text, action) {
  clearTimeout(timer);
  const toast = byId("toast");
  const hide = () => {
    toast.hidden = true;
    toast.replaceChildren();
  };
  const perform = () => {
    hide();
    action.onclick();
  };
  toast.hidden = false;
  toast.replaceChildren(
    el("span", {}, text),
    action
      ? el("button", { type: "button", className: "button", onclick: perform }, action.label)
      : "",
  );
  const wait = () => {
    timer = setTimeout(() => (toast.matches(":hover, :focus-within") ? wait() : hide()), TIME);
  };
  wait();
}
