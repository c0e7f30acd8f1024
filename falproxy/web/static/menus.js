/** Menus: `<details class="menu">`. They close with Escape, with a choice, and when the focus leaves. */

const openMenus = () => [...document.querySelectorAll("details.menu[open]")];

/** Handle the menus of the whole page. Called once. */
export function startMenus() {
  document.addEventListener("keydown", ({ key }) => {
    const [menu] = key === "Escape" ? openMenus() : [];
    if (menu !== undefined) {
      menu.open = false;
      menu.querySelector("summary").focus();
    }
  });
  const closeOthers = ({ target }) => {
    openMenus()
      .filter((menu) => target === menu || !(target instanceof Node) || !menu.contains(target))
      .forEach((menu) => (menu.open = false));
  };
  const showItems = ({ target }) => {
    if (target.matches?.("details.menu[open]")) {
      target.querySelector(".menu-items").scrollIntoView({ block: "nearest" });
    }
  };
  document.addEventListener("toggle", showItems, { capture: true }); // it does not bubble
  document.addEventListener("pointerdown", closeOthers);
  document.addEventListener("focusin", closeOthers);
  document.addEventListener("click", ({ target }) => {
    const menu = target.closest?.(".menu-items button")?.closest("details");
    if (menu) {
      setTimeout(() => (menu.open = false), menu.contains(document.activeElement) ? 1500 : 0);
    }
  });
}
