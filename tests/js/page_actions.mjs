/** Actions of a user on the page, and readings of what it shows. One exported function each. */
import { readFile } from "node:fs/promises";

import { axeViolations as findViolations } from "./axe.mjs";

const TIMEOUT = 30_000; // ms

/** Open a URL and wait until the page is ready. */
export async function goto({ page, url }) {
  await page.goto(url);
  await page.locator("html[data-ready]").waitFor();
}

/** Open a URL without waiting: it is not the page, or the page shows a dialog first. */
export const gotoWithoutWaiting = ({ page, url }) => page.goto(url);

export async function reload({ page }) {
  await page.reload();
  await page.locator("html[data-ready]").waitFor();
}

export async function openTab({ session, url }) {
  const page = await session.context.newPage();
  session.pages.push(page);
  await goto({ page, url });
}

export async function closeTab({ page }) {
  await page.close();
}

const locate = (page, { role, name, selector, exact = false }) =>
  (selector ? page.locator(selector) : page.getByRole(role, { name, exact })).first();

export const click = ({ page, ...target }) => locate(page, target).click();
export const doubleClick = ({ page, ...target }) => locate(page, target).dblclick();
export const focus = ({ page, ...target }) => locate(page, target).focus();
export const hover = ({ page, ...target }) => locate(page, target).hover();
export const press = ({ page, key }) => page.keyboard.press(key);

/** Hold a key down: the browser repeats its event. */
export async function hold({ page, key, repetitions }) {
  const keys = key.split("+");
  for (const modifier of keys.slice(0, -1)) {
    await page.keyboard.down(modifier);
  }
  for (let repetition = 0; repetition <= repetitions; repetition += 1) {
    await page.keyboard.down(keys.at(-1));
  }
  for (const released of keys.reverse()) {
    await page.keyboard.up(released);
  }
}

export const fill = ({ page, label, text }) => page.getByLabel(label, { exact: true }).fill(text);
export const select = ({ page, label, option }) =>
  page.getByLabel(label, { exact: true }).selectOption(option);

/** Choose a model in the dialog, by its endpoint id, and wait for its form. */
export async function chooseModel({ page, endpoint }) {
  if ((await page.locator("#model").evaluate(({ value }) => value)) !== endpoint) {
    await page.locator("#model").click();
    await page.getByLabel("Search models").fill(endpoint);
    await page.locator(`.model-entry[value="${endpoint}"]`).first().click();
  }
  await page.locator(`#job-form[data-endpoint="${endpoint}"]`).waitFor();
}

export const waitFor = ({ page, selector, state = "visible" }) =>
  page.locator(selector).first().waitFor({ state });
export const count = ({ page, selector }) => page.locator(selector).count();
export const values = ({ page, selector }) =>
  page.locator(selector).evaluateAll((elements) => elements.map((element) => element.value));
export const evaluate = ({ page, code, argument }) =>
  page.evaluate(`(${code})(${JSON.stringify(argument ?? null)})`);

/**
 * Wait until a function returns true. Playwright's waitForFunction is blocked by the page's CSP.
 */
export async function waitUntil({ page, code, argument }) {
  const deadline = Date.now() + TIMEOUT;
  while (!(await evaluate({ page, code, argument }))) {
    if (Date.now() > deadline) {
      throw new Error(
        `timed out: ${code} ${JSON.stringify(argument ?? null)}\n${await page.innerText("body")}`,
      );
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** Return the texts of the visible elements of a selector. */
export const texts = async ({ page, selector }) => {
  const visible = [];
  for (const element of await page.locator(selector).all()) {
    if (await element.isVisible()) {
      visible.push((await element.innerText()).trim());
    }
  }
  return visible;
};

export const setFiles = ({ page, selector = "input[type=file]", paths }) =>
  page.locator(selector).first().setInputFiles(paths);

/** Drop a file, as from the desktop. */
export async function dropFile({ page, selector, path, type }) {
  const content = (await readFile(path)).toString("base64");
  const name = path.split("/").at(-1);
  const dataTransfer = await page.evaluateHandle(
    async ([base64, fileName, contentType]) => {
      const transfer = new DataTransfer();
      const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
      transfer.items.add(new File([bytes], fileName, { type: contentType }));
      return transfer;
    },
    [content, name, type],
  );
  for (const event of ["dragenter", "dragover", "drop"]) {
    await page.dispatchEvent(selector, event, { dataTransfer });
  }
}

/** Copy a PNG to the clipboard, as from another program. */
export async function copyImage({ page, path }) {
  const content = (await readFile(path)).toString("base64");
  await page.evaluate(async (base64) => {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const blob = new Blob([bytes], { type: "image/png" });
    await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
  }, content);
}

export const readClipboard = ({ page }) => page.evaluate(() => navigator.clipboard.readText());

/** Drag the mouse from one point of an element to another. Points are fractions of its size. */
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

/** Click a button that downloads a file. Return the file's name and size. */
export async function download({ page, ...target }) {
  const [file] = await Promise.all([page.waitForEvent("download"), locate(page, target).click()]);
  const path = await file.path();
  return { name: file.suggestedFilename(), bytes: (await readFile(path)).length };
}

/** Click a button that downloads a text file. Return its content. */
export async function downloadText({ page, ...target }) {
  const [file] = await Promise.all([page.waitForEvent("download"), locate(page, target).click()]);
  return readFile(await file.path(), "utf8");
}

/** Click a button that lets the user choose a file; menu: of the history, which is opened first. */
export async function chooseFile({ page, paths, menu = false, ...target }) {
  if (menu) {
    await page.locator("#history-menu").evaluate((details) => (details.open = true));
  }
  const button = locate(page, target);
  const [chooser] = await Promise.all([page.waitForEvent("filechooser"), button.click()]);
  await chooser.setFiles(paths);
}

/** Respond to the first `times` requests of a pattern. Without a status their connection fails. */
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
  let remaining = times;
  await page.route(pattern, async (route) => {
    if (remaining === 0 || !isMatching(route.request(), method, target)) {
      return route.fallback();
    }
    remaining -= 1;
    return status === null
      ? route.abort()
      : route.fulfill({
          status,
          headers: { "content-type": "application/json", ...headers },
          body,
        });
  });
}

/** Send the first request of a pattern to the proxy, and drop its response. */
export async function loseResponse({ page, pattern, target, method }) {
  let isLost = false;
  await page.route(pattern, async (route) => {
    if (isLost || !isMatching(route.request(), method, target)) {
      return route.fallback();
    }
    isLost = true;
    await route.fetch();
    return route.abort();
  });
}

function isMatching(request, method, target) {
  const requestTarget = request.headers()["x-fal-target-url"] ?? "";
  return requestTarget.includes(target) && (method === null || request.method() === method);
}

export const setOffline = ({ session, isOffline }) => session.context.setOffline(isOffline);
export const resize = ({ page, width, height = 900 }) => page.setViewportSize({ width, height });
export const setColorScheme = ({ page, colorScheme }) =>
  page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
export const addInitScript = ({ page, code }) => page.addInitScript(code);
export const requests = ({ session }) => session.requests;
export const consoleErrors = ({ session }) => session.consoleErrors;

/** Return the accessibility violations that axe-core finds on the page. */
export const axeViolations = ({ page }) => findViolations(page);

export async function screenshot({ page, path }) {
  await page.evaluate(() => {
    window.scrollTo(0, 0); // the sticky header must not cover the middle
    const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
    return frame().then(frame);
  });
  await page.screenshot({ path, fullPage: true });
}

/** Return the cumulative layout shift since the page was opened (Layout Instability API). */
export const layoutShift = ({ page }) =>
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

/**
 * Return the loaded files with their transferred body sizes in bytes; 0 from the browser's cache.
 */
export const loadedFiles = ({ page }) =>
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
