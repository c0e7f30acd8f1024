/**
 * A person at the dashboard: reads the numbers, moves over a chart, looks at another time. By hand:
 *
 *     node dashboard.mjs <origin and prefix> '{"key": null, "artefacts": null}'
 *
 * prints what was seen, as one JSON line. key: what is typed into the dialog for the access key;
 * artefacts: a directory for screenshots.
 */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

import { launch, withPage } from "./chromium.mjs";

const [place, given = "{}"] = process.argv.slice(2);
const { key = null, artefacts = null } = JSON.parse(given);
const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];

async function visit(page) {
  page.setDefaultTimeout(30_000);
  const origins = new Set();
  const asked = [];
  const complaints = [];
  page.on("request", (request) => {
    const url = new URL(request.url());
    origins.add(url.origin);
    if (url.pathname.endsWith("/api/usage")) {
      asked.push(url.search);
    }
  });
  page.on("console", (message) => {
    if (message.type() === "error" && !message.text().includes("401")) {
      complaints.push(message.text());
    }
  });
  await page.goto(`${place}/dashboard`);
  if (key !== null) {
    await page.getByLabel("Your key").fill(key);
    await page.getByRole("button", { name: "Continue" }).click();
  }
  await shown(page, "day");
  const seen = { ...(await read(page)), violations: await violations(page) };
  await shoot(page);
  seen.chart = await walk(page);
  seen.pause = await pause(page);
  await page.getByRole("radio", { name: "Hour" }).check({ force: true });
  await shown(page, "hour");
  seen.hour = await read(page);
  seen.address = page.url();
  await page.reload();
  await shown(page, "hour");
  return { ...seen, asked, complaints, origins: [...origins] };
}

async function shown(page, range) {
  await page.locator(`html[data-shown="${range}"]`).waitFor({ state: "attached" });
}

async function read(page) {
  const tiles = {};
  for (const id of ["calls", "errors", "hits", "spent", "saved", "latency"]) {
    tiles[id] = await page.locator(`#${id} dd`).allInnerTexts();
  }
  const rows = (id) =>
    page.locator(`#${id} tbody tr`).evaluateAll((found) =>
      found.map((row) => [...row.cells].map((cell) => cell.innerText.trim())),
    );
  return {
    tiles,
    whose: await page.locator("#whose").innerText(),
    isEmpty: await page.locator("#empty").isVisible(),
    endpoints: await rows("endpoints"),
    routes: await rows("routes"),
    principals: await rows("principals"),
    live: await rows("live"),
    latest: await rows("latest"),
    points: await page.locator("#calls-chart tbody tr").count(),
  };
}

/** What a keyboard gets to hear of the chart of calls. */
async function walk(page) {
  const slider = page.getByRole("slider", { name: /^Calls/ });
  await slider.focus();
  const heard = [await slider.getAttribute("aria-valuetext")];
  for (const press of ["ArrowLeft", "Home", "End"]) {
    await page.keyboard.press(press);
    heard.push(await slider.getAttribute("aria-valuetext"));
  }
  const readout = await page.locator("#calls-chart .readout").innerText();
  return { heard, readout };
}

async function pause(page) {
  const button = page.getByRole("button", { name: "Pause updates" });
  await button.click();
  const pressed = await button.getAttribute("aria-pressed");
  const says = await page.locator("#updated").innerText();
  await button.click();
  return { pressed, says };
}

async function violations(page) {
  const found = [];
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
    await page.evaluate(AXE);
    const result = await page.evaluate(
      (values) => globalThis.axe.run(document, { runOnly: { type: "tag", values } }),
      TAGS,
    );
    for (const { id, nodes } of result.violations) {
      found.push(`${colorScheme} ${id}: ${nodes.map(({ html }) => html).join(" | ").slice(0, 400)}`);
    }
  }
  await page.emulateMedia({ colorScheme: "light" });
  return found;
}

/** Pictures for the curious; and nothing of the page is cut off at any width. */
async function shoot(page) {
  for (const width of [360, 1440]) {
    await page.setViewportSize({ width, height: 900 });
    await narrowed(page); // the charts are drawn anew a moment later
    const wide = await page.evaluate(() => {
      const { scrollWidth, clientWidth } = document.documentElement;
      const isOut = (element) => element.getBoundingClientRect().right > clientWidth + 1;
      const found = [...document.querySelectorAll("body *")].filter(isOut);
      return scrollWidth > clientWidth ? found.map(({ outerHTML }) => outerHTML.slice(0, 120)) : [];
    });
    if (wide.length > 0) {
      throw new Error(`the page is too wide at ${width}: ${wide.slice(0, 5).join("\n")}`);
    }
    for (const colorScheme of artefacts === null ? [] : ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      await page.screenshot({
        path: `${artefacts}/dashboard-${colorScheme}-${width}.png`,
        fullPage: true,
      });
    }
  }
}

async function narrowed(page) {
  const isIn = () => document.documentElement.scrollWidth <= document.documentElement.clientWidth;
  await page.waitForFunction(isIn, null, { timeout: 5000 }).catch(() => {}); // what is out is told
}

const browser = await launch();
try {
  const options = { viewport: { width: 1280, height: 900 }, bypassCSP: false };
  const seen = await withPage(browser, options, visit);
  process.stdout.write(`${JSON.stringify(seen)}\n`);
} finally {
  await browser.close();
}
