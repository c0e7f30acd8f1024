/** Accessibility of a page, checked with axe-core. */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
// The rules with these tags whose results depend on colors.
const COLOR_RULES = ["color-contrast", "link-in-text-block"];
// What other rules read of an element, beside its HTML and its box.
const STYLES = [
  "display", "visibility", "opacity", "position", "overflow", "zIndex", "clip", "clipPath",
  "transform", "fontSize", "fontWeight", "lineHeight", "textDecorationLine", "pointerEvents",
]; // prettier-ignore

/**
 * Return the violations of a Playwright page, as one text each. In a document that has changed in
 * nothing but colors since it was last checked, the rules about colors run again, and no others.
 */
export async function axeViolations(page) {
  if (!(await page.evaluate(() => "axe" in window))) {
    await page.evaluate(AXE); // the CSP forbids an injected script element
  }
  await page.evaluate(settle);
  return page.evaluate(check, { tags: TAGS, colorRules: COLOR_RULES, styles: STYLES });
}

async function check({ tags, colorRules, styles }) {
  const { axe } = window;
  const state = readState();
  const isKnown = axe.checked?.state === state;
  const runOnly = isKnown ? { type: "rule", values: colorRules } : tags;
  // Checks that passed are not described; nodes are described by their HTML alone.
  const options = { runOnly, resultTypes: ["violations"], selectors: false };
  const { violations } = await axe.run(document, options);
  const others = violations.filter(({ id }) => !colorRules.includes(id));
  axe.checked = isKnown ? axe.checked : { state, others: others.map(describe) };
  const ofColors = violations.filter(({ id }) => colorRules.includes(id));
  return [...axe.checked.others, ...ofColors.map(describe)];

  function describe({ id, nodes }) {
    return `${id}: ${nodes.map((node) => node.html.slice(0, 400)).join(" | ")}`;
  }

  /** Return what rules read of the document, except for colors. */
  function readState() {
    const elements = [...document.querySelectorAll("*")].map((element) => {
      const { x, y, width, height } = element.getBoundingClientRect();
      const style = getComputedStyle(element);
      return [x, y, width, height, element.value, ...styles.map((name) => style[name])].join();
    });
    return [innerWidth, innerHeight, document.documentElement.outerHTML, ...elements].join("\n");
  }
}

/** Scroll to the top, where the sticky header covers nothing, and wait until all colors are final. */
async function settle() {
  window.scrollTo(0, 0);
  const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
  await frame();
  await frame();
  // An inherited color may begin its transition when that of the parent has ended.
  const isEnding = ({ effect }) => effect.getComputedTiming().endTime !== Infinity;
  for (let frames = 0; frames < 100 && document.getAnimations().some(isEnding); frames += 1) {
    await frame();
  }
}
