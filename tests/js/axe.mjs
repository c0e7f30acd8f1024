/** Accessibility of a page, checked with axe-core. */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];

/** Return the violations of a Playwright page, as one text each. */
export async function axeViolations(page) {
  if (!(await page.evaluate(() => "axe" in window))) {
    await page.evaluate(AXE); // the CSP forbids an injected script element
  }
  await page.evaluate(settle);
  return page.evaluate(async (runOnly) => {
    // Checks that passed are not described.
    const options = { runOnly, resultTypes: ["violations"] };
    const { violations } = await window.axe.run(document, options);
    return violations.map(
      ({ id, nodes }) => `${id}: ${nodes.map((node) => node.html.slice(0, 400)).join(" | ")}`,
    );
  }, TAGS);
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
