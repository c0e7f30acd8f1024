/** On phones the form is a sheet at the bottom of the screen once there is a result. */
import { byId } from "./dom.js";

function setOpen(isOpen) {
  byId("job-form").classList.toggle("is-open", isOpen);
  byId("sheet-button").setAttribute("aria-expanded", String(isOpen));
  byId("sheet-button").textContent = isOpen ? "Close" : "Inputs";
}

export function startSheet() {
  byId("sheet-button").addEventListener("click", () => {
    setOpen(!byId("job-form").classList.contains("is-open"));
  });
  byId("job-form").addEventListener("keydown", ({ key }) => key === "Escape" && closeSheet());
  document.querySelector(".header").addEventListener("click", ({ target }) => {
    if (target.closest(".tasks a")) {
      setOpen(true);
    }
  });
}

export function openSheet() {
  setOpen(true);
}

export function closeSheet() {
  setOpen(false);
}
