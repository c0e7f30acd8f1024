/**
 * A person at the page of /docs: looks at all of it, and tries operations out. By hand:
 *
 *     node docs.mjs <origin and prefix> [directory for screenshots]
 *
 * prints what was seen, as one JSON line.
 */
import { launch, withPage } from "./chromium.mjs";

const [place, artefacts] = process.argv.slice(2);
// Red, 64 x 48 pixels.
const PICTURE =
  "iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAIAAAAuKetIAAAAQElEQVR42u3PQQ0AAAgEoNP+nbWCXzdoQE1+6wgI" +
  "CAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIHC36dwFfYw5C7wAAAABJRU5ErkJggg==";

async function visit(page) {
  page.setDefaultTimeout(20_000);
  const origins = new Set();
  const complaints = [];
  page.on("request", (request) => origins.add(new URL(request.url()).origin));
  page.on("console", (message) => {
    if (message.type() === "error") {
      complaints.push(message.text());
    }
  });
  await page.goto(`${place}/docs`);
  await page.locator(".opblock").first().waitFor();
  await shoot(page, "page");
  const operations = await page.locator(".opblock-summary-path").allTextContents();
  const tried = {};
  for (const id of ["edit", "createImage", "generate", "generateByTemplate"]) {
    tried[id] = await tryOut(page, id);
  }
  tried.createImageEdit = await tryOut(page, "createImageEdit", { image: "red.png" });
  return {
    operations: operations.map((text) => text.replaceAll("\u200b", "")),
    title: await page.locator(".info .title").innerText(),
    server: await page.locator(".servers select").inputValue(),
    tried,
    complaints,
    origins: [...origins].filter((origin) => origin !== "null"), // data: and blob: have none
  };
}

/** The status of an operation that is sent as the page suggests it, with files chosen. */
async function tryOut(page, id, files = {}) {
  const block = page.locator(`.opblock[id$="-${id}"]`);
  await block.locator(".opblock-summary-control").click();
  await block.getByRole("button", { name: "Try it out" }).click();
  for (const [field, name] of Object.entries(files)) {
    const content = Buffer.from(PICTURE, "base64");
    const input = block.locator(`tr[data-property-name="${field}"] input[type=file]`);
    await input.setInputFiles({ name, mimeType: "image/png", buffer: content });
  }
  await block.getByRole("button", { name: "Execute" }).click();
  await block.locator(".live-responses-table .response-col_status").nth(1).waitFor();
  await shoot(block, id);
  const status = await block.locator(".live-responses-table tbody .response-col_status").innerText();
  await block.locator(".opblock-summary-control").click(); // the next one is in sight again
  return Number.parseInt(status, 10);
}

/** Keeps a picture of a page or a part of it, for the curious. */
async function shoot(seen, name) {
  if (artefacts) {
    await seen.screenshot({ path: `${artefacts}/docs-${name}.png` });
  }
}

const browser = await launch();
try {
  const seen = await withPage(browser, { viewport: { width: 1280, height: 900 } }, visit);
  process.stdout.write(`${JSON.stringify(seen)}\n`);
} finally {
  await browser.close();
}
