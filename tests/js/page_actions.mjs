/** What a person does at the page, and what they see of it: one function an act. */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

const AXE = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
const PATIENCE = 30_000; // ms
const LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];

/** Goes to an address, and waits until the page is there. */
export async function goto({ page, url }) {
  await page.goto(url);
  await page.locator("html[data-ready]").waitFor();
}

/** Goes to an address that is not the page, or where the page waits for something. */
export const visitPlain = ({ page, url }) => page.goto(url);

export async function reload({ page }) {
  await page.reload();
  await page.locator("html[data-ready]").waitFor();
}

export async function tab({ seen, url }) {
  const page = await seen.context.newPage();
  seen.pages.push(page);
  await goto({ page, url });
}

export async function closeTab({ page }) {
  await page.close();
}

const within = (page, { role, name, selector, exact = false }) =>
  (selector ? page.locator(selector) : page.getByRole(role, { name, exact })).first();

export const click = ({ page, ...what }) => within(page, what).click();
export const tap = ({ page, ...what }) => within(page, what).tap();
export const focus = ({ page, ...what }) => within(page, what).focus();
export const hover = ({ page, ...what }) => within(page, what).hover();
export const press = ({ page, key }) => page.keyboard.press(key);
export const fill = ({ page, label, text }) => page.getByLabel(label, { exact: true }).fill(text);
export const choose = ({ page, label, option }) =>
  page.getByLabel(label, { exact: true }).selectOption(option);
export const wait = ({ page, selector, state = "visible" }) =>
  page.locator(selector).first().waitFor({ state });
export const count = ({ page, selector }) => page.locator(selector).count();
export const values = ({ page, selector }) =>
  page.locator(selector).evaluateAll((found) => found.map((one) => one.value));
export const run = ({ page, code, given }) =>
  page.evaluate(`(${code})(${JSON.stringify(given ?? null)})`);

/** Returns when a function says so. Not by waitForFunction, which the page's policy forbids. */
export async function until({ page, code, given }) {
  const deadline = Date.now() + PATIENCE;
  while (!(await run({ page, code, given }))) {
    if (Date.now() > deadline) {
      throw new Error(
        `it did not come true: ${code} ${JSON.stringify(given ?? null)}\n${await page.innerText("body")}`,
      );
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** The visible texts of all that a selector finds. */
export const texts = async ({ page, selector }) => {
  const found = await page.locator(selector).all();
  const visible = [];
  for (const one of found) {
    if (await one.isVisible()) {
      visible.push((await one.innerText()).trim());
    }
  }
  return visible;
};

export const files = ({ page, selector = "input[type=file]", paths }) =>
  page.locator(selector).first().setInputFiles(paths);

/** Drops a file, as if it came from the desktop. */
export async function drop({ page, selector, path, type }) {
  const content = (await readFile(path)).toString("base64");
  const name = path.split("/").at(-1);
  const transfer = await page.evaluateHandle(
    async ([bytes, fileName, kind]) => {
      const made = new DataTransfer();
      const raw = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
      made.items.add(new File([raw], fileName, { type: kind }));
      return made;
    },
    [content, name, type],
  );
  for (const event of ["dragenter", "dragover", "drop"]) {
    await page.dispatchEvent(selector, event, { dataTransfer: transfer });
  }
}

/** Copies a PNG, as if from another program. */
export async function copyPicture({ page, path }) {
  const content = (await readFile(path)).toString("base64");
  await page.evaluate(async (bytes) => {
    const raw = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
    const blob = new Blob([raw], { type: "image/png" });
    await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
  }, content);
}

export const clipboard = ({ page }) => page.evaluate(() => navigator.clipboard.readText());

/** Presses the mouse on a place of an element, given as shares of its size, and drags it to another. */
export async function drag({ page, selector, from, to }) {
  const box = await page.locator(selector).boundingBox();
  const at = ([x, y]) => [box.x + box.width * x, box.y + box.height * y];
  await page.mouse.move(...at(from));
  await page.mouse.down();
  await page.mouse.move(...at(to), { steps: 5 });
  await page.mouse.up();
}

export async function touch({ page, selector, at: [x, y] }) {
  const box = await page.locator(selector).boundingBox();
  await page.touchscreen.tap(box.x + box.width * x, box.y + box.height * y);
}

/** The name and the size of what a click saves. */
export async function download({ page, ...what }) {
  const [saved] = await Promise.all([page.waitForEvent("download"), within(page, what).click()]);
  const path = await saved.path();
  return { name: saved.suggestedFilename(), bytes: (await readFile(path)).length };
}

/** Answers requests for an address in fal's place, the first `times` of them. */
export async function intercept({
  page,
  pattern,
  target = "",
  method = null,
  status = null,
  headers = {},
  body = "{}",
  times = 1,
}) {
  let left = times;
  await page.route(pattern, async (route) => {
    const request = route.request();
    const isMeant =
      (request.headers()["x-fal-target-url"] ?? "").includes(target) &&
      (method === null || request.method() === method);
    if (!isMeant || left === 0) {
      return route.fallback();
    }
    left -= 1;
    return status === null
      ? route.abort()
      : route.fulfill({
          status,
          headers: { "content-type": "application/json", ...headers },
          body,
        });
  });
}

/** Lets a request go up, and loses its answer. */
export async function loseAnswer({ page, pattern, target, method }) {
  let isLost = false;
  await page.route(pattern, async (route) => {
    const request = route.request();
    if (
      isLost ||
      request.method() !== method ||
      !(request.headers()["x-fal-target-url"] ?? "").includes(target)
    ) {
      return route.fallback();
    }
    isLost = true;
    await route.fetch();
    return route.abort();
  });
}

export const offline = ({ seen, is }) => seen.context.setOffline(is);
export const resize = ({ page, width, height = 900 }) => page.setViewportSize({ width, height });
export const scheme = ({ page, is }) =>
  page.emulateMedia({ colorScheme: is, reducedMotion: "reduce" });
export const before = ({ page, code }) => page.addInitScript(code);
export const requests = ({ seen }) => seen.requests;
export const complaints = ({ seen }) => seen.complaints;

/** What axe-core has against the page as it is now. */
export async function axe({ page }) {
  if (!(await page.evaluate(() => "axe" in window))) {
    await page.evaluate(await readFile(AXE, "utf8")); // not a script element: the page allows none
  }
  const { violations } = await page.evaluate(
    (tags) => window.axe.run(document, { runOnly: tags }),
    LEVELS,
  );
  return violations.map(
    ({ id, nodes }) => `${id}: ${nodes.map((node) => node.html.slice(0, 200)).join(" | ")}`,
  );
}

export async function shoot({ page, path }) {
  await page.evaluate(() => window.scrollTo(0, 0)); // or the header is in the middle of the picture
  await page.screenshot({ path, fullPage: true });
}

/** How much moved by itself (Layout Instability), from the start of the page. */
export const shift = ({ page }) =>
  page.evaluate(
    () =>
      new Promise((resolve) => {
        let sum = 0;
        const observer = new PerformanceObserver((list) => {
          sum += list
            .getEntries()
            .reduce((all, entry) => all + (entry.hadRecentInput ? 0 : entry.value), 0);
        });
        observer.observe({ type: "layout-shift", buffered: true });
        requestAnimationFrame(() => requestAnimationFrame(() => resolve(sum)));
      }),
  );

/** Bytes over the wire, without headers, of all that the page has loaded so far; 0 from its cache. */
export const loaded = ({ page }) =>
  page.evaluate(() => {
    const entries = [
      ...performance.getEntriesByType("navigation"),
      ...performance.getEntriesByType("resource"),
    ];
    return entries.map(({ name, transferSize, encodedBodySize }) => ({
      name,
      bytes: transferSize > 0 ? encodedBodySize : 0,
    }));
  });
