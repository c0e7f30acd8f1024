/**
 * A user of the page /docs: lists the operations and sends requests. By hand:
 *
 *     node docs.mjs <origin and prefix> [directory for screenshots]
 *
 * prints what the page shows, as one JSON line.
 */
import { launch, withPage } from "./chromium.mjs";

const [base, artefacts] = process.argv.slice(2);
// A red PNG, 64 x 48 pixels.
const IMAGE =
  "iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAIAAAAuKetIAAAAQElEQVR42u3PQQ0AAAgEoNP+nbWCXzdoQE1+6wgI" +
  "CAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIHC36dwFfYw5C7wAAAABJRU5ErkJggg==";

async function visit(page) {
  page.setDefaultTimeout(20_000);
  const origins = new Set();
  const consoleErrors = [];
  page.on("request", (request) => origins.add(new URL(request.url()).origin));
  page.on("console", (message) => {
    if (message.type() === "error") {
      consoleErrors.push(message.text());
    }
  });
  await page.goto(`${base}/docs`);
  await page.locator(".opblock").first().waitFor();
  await screenshot(page, "page");
  const operations = await page.locator(".opblock-summary-path").allTextContents();
  const statuses = {};
  for (const id of ["edit", "createImage", "generate", "generateByTemplate"]) {
    statuses[id] = await tryOut(page, id);
  }
  const header = await page.locator("#header nav a").allTextContents();
  const currentPage = await page.locator('#header [aria-current="page"]').innerText();
  const widths = await widthsOnPhone(page);
  statuses.createImageEdit = await tryOut(page, "createImageEdit", { image: "red.png" });
  return {
    operations: operations.map((text) => text.replaceAll("\u200b", "")),
    title: await page.locator(".info .title").innerText(),
    server: await page.locator(".servers select").inputValue(),
    statuses,
    header,
    currentPage,
    widths,
    consoleErrors,
    origins: [...origins].filter((origin) => origin !== "null"), // data: and blob: have none
  };
}

/** Return the widths of the document and of a small screen, with one operation expanded. */
async function widthsOnPhone(page) {
  const size = page.viewportSize();
  await page.setViewportSize({ width: 360, height: 780 });
  await page.emulateMedia({ colorScheme: "dark" });
  const summary = page.locator('.opblock[id$="-generate"] .opblock-summary-control');
  await summary.click();
  await screenshot(page, "phone");
  const widths = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  await summary.click();
  await page.emulateMedia({ colorScheme: "light" });
  await page.setViewportSize(size);
  return widths;
}

/**
 * Send the example request of an operation, with these files. Return the status of the response.
 */
async function tryOut(page, id, files = {}) {
  const block = page.locator(`.opblock[id$="-${id}"]`);
  await block.locator(".opblock-summary-control").click();
  await block.getByRole("button", { name: "Try it out" }).click();
  for (const [field, name] of Object.entries(files)) {
    const content = Buffer.from(IMAGE, "base64");
    const input = block.locator(`tr[data-property-name="${field}"] input[type=file]`);
    await input.setInputFiles({ name, mimeType: "image/png", buffer: content });
  }
  await block.getByRole("button", { name: "Execute" }).click();
  await block.locator(".live-responses-table .response-col_status").nth(1).waitFor();
  await screenshot(block, id);
  const status = await block.locator(".live-responses-table tbody .response-col_status").innerText();
  await block.locator(".opblock-summary-control").click(); // collapse it again
  return Number.parseInt(status, 10);
}

/** Take a screenshot of a page or an element if `artefacts` is set. */
async function screenshot(target, name) {
  if (artefacts) {
    await target.screenshot({ path: `${artefacts}/docs-${name}.png` });
  }
}

const browser = await launch();
try {
  const result = await withPage(browser, { viewport: { width: 1280, height: 900 } }, visit);
  process.stdout.write(`${JSON.stringify(result)}\n`);
} finally {
  await browser.close();
}
