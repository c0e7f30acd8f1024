/**
 * Takes the screenshots of make_screenshots.py: `node screenshots.mjs <origin> <folder>`.
 *
 * The page is found by roles and labels, so that a change of its layout changes only the images.
 */
import { launch, withPage } from "../tests/js/chromium.mjs";

const [origin, folder] = process.argv.slice(2);
const PROMPTS = [
  "a heron in the reeds, morning fog",
  "a paper model of a city, soft light",
  "a red fox in the snow",
  "a lighthouse at dusk, long exposure",
];
const OPTIONS = { viewport: { width: 1440, height: 900 }, colorScheme: "light" };
const TIMEOUT = 60_000; // milliseconds

/** Return whether the history has as many images, and the page shows a large one, completely loaded. */
const hasResults = (count) =>
  document.querySelectorAll("#thumbnails img").length >= count &&
  [...document.querySelectorAll("main img")].some(
    (image) => image.complete && image.naturalWidth >= 512 && image.clientWidth >= 300,
  );

async function drawPage(page) {
  page.setDefaultTimeout(TIMEOUT);
  await page.goto(`${origin}/`, { waitUntil: "networkidle" });
  for (const [index, prompt] of PROMPTS.entries()) {
    await page.getByLabel("Prompt", { exact: true }).fill(prompt);
    await page.locator("form button[type=submit]").click();
    await page.waitForFunction(hasResults, index + 1);
  }
  await page.waitForLoadState("networkidle");
  await page.mouse.move(0, 0);
  await page.screenshot({ path: `${folder}/page.png`, animations: "disabled" });
}

async function drawDashboard(page) {
  page.setDefaultTimeout(TIMEOUT);
  await page.goto(`${origin}/dashboard`, { waitUntil: "networkidle" });
  await page.waitForFunction(() => /fal-ai\/flux/.test(document.body.innerText));
  await page.screenshot({ path: `${folder}/dashboard.png`, animations: "disabled" });
}

const browser = await launch();
try {
  await withPage(browser, OPTIONS, drawPage);
  await withPage(browser, OPTIONS, drawDashboard);
} finally {
  await browser.close();
}
