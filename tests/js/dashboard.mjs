/**
 * A user of the dashboard, for test_dashboard_browser.py: reads the numbers, reads a chart by
 * keyboard, changes the time range. ARTEFACTS: a directory for screenshots.
 */
import { axeViolations } from "./axe.mjs";

const artefacts = process.env.ARTEFACTS ?? null;
export const CONTEXT_OPTIONS = {
  viewport: { width: 1280, height: 900 },
  permissions: ["clipboard-read", "clipboard-write"],
};

/**
 * Return what the dashboard shows.
 *
 * gateway: the proxy's origin and prefix; key: entered into the dialog for the access key;
 * managesKeys: create, rotate and revoke a key; parts: what is done beside reading the numbers, of
 * `appearance`, `chart`, `csv`, `pause`, `list` and `hour`.
 */
export async function visit({ page, gateway, key = null, managesKeys = false, parts }) {
  page.setDefaultTimeout(30_000);
  const origins = new Set();
  const usageQueries = [];
  const consoleErrors = [];
  page.on("request", (request) => {
    const url = new URL(request.url());
    origins.add(url.origin);
    if (url.pathname.endsWith("/api/usage") && !url.searchParams.has("until")) {
      usageQueries.push(url.search);
    }
  });
  page.on("console", (message) => {
    if (message.type() === "error" && !/ 40[01] /.test(message.text())) {
      consoleErrors.push(message.text());
    }
  });
  await page.goto(`${gateway}/dashboard`);
  if (key !== null) {
    await page.getByLabel("Your key").fill(key);
    await page.getByRole("button", { name: "Continue" }).click();
  }
  await waitForRange(page, "day");
  const keys = managesKeys ? await manageKeys(page) : null;
  const hasKeys = await page.locator("#keys-panel").isVisible();
  const result = { ...(await readNumbers(page)), keys, hasKeys };
  result.violations = [...(keys?.violations ?? [])];
  for (const part of parts) {
    await PARTS[part](page, result);
  }
  return { ...result, usageQueries, consoleErrors, origins: [...origins] };
}

/** The parts of a visit: each function adds what it finds to the result. */
const PARTS = {
  async appearance(page, result) {
    result.violations.push(...(await violationsInBothSchemes(page)));
    await checkWidths(page);
  },
  async chart(page, result) {
    result.chart = await readChart(page);
  },
  async csv(page, result) {
    result.csv = await exportTables(page);
  },
  async pause(page, result) {
    result.pause = await pauseUpdates(page);
  },
  async list(page, result) {
    result.list = await readCalls(page);
  },
  async hour(page, result) {
    await page.getByRole("radio", { name: "Hour" }).check({ force: true });
    await waitForRange(page, "hour");
    result.hour = await readNumbers(page);
    result.url = page.url();
    await page.reload();
    await waitForRange(page, "hour");
  },
};

/** Create a key with the dialog, rotate and revoke it. Return its secrets and the table after each step. */
async function manageKeys(page) {
  const violations = [];
  const tables = [];
  const dialog = page.getByRole("dialog");
  const readTable = () =>
    page.locator("#keys tbody tr").evaluateAll((rows) =>
      rows.map((row) => [...row.cells].map((cell) => cell.innerText.trim())),
    );
  const takeSecret = async () => {
    const secret = await dialog.getByLabel("Secret").inputValue();
    await checkDialog(page, "secret", violations);
    await dialog.getByRole("button", { name: "Copy" }).click();
    await dialog.getByText("Copied.").waitFor();
    await dialog.getByRole("button", { name: "Done" }).click();
    tables.push(await readTable());
    return { secret, clipboard: await page.evaluate(() => navigator.clipboard.readText()) };
  };

  await page.getByRole("button", { name: "Create a key" }).click();
  await dialog.getByLabel("Name").fill("web");
  await dialog.getByLabel("Rate").fill("60 per minute");
  await dialog.getByLabel("Concurrency").fill("8");
  await dialog.getByLabel("Budget").fill("5/day");
  await dialog.getByLabel("Endpoints").fill("fal-ai/flux*, fal-ai/kling/**");
  await dialog.getByRole("button", { name: "Create" }).click();
  const problem = dialog.getByRole("alert");
  await problem.getByText("rate").waitFor();
  const message = await problem.innerText();
  await checkDialog(page, "create", violations);
  await dialog.getByLabel("Rate").fill("60/minute");
  await page.keyboard.press("Enter");
  const created = await takeSecret();

  await page.getByRole("button", { name: "Rotate the key web" }).click();
  await dialog.getByLabel("Grace period").fill("1h");
  await checkDialog(page, "rotate", violations);
  await dialog.getByRole("button", { name: "Rotate" }).click();
  const rotated = await takeSecret();

  await page.getByRole("button", { name: "Revoke the key web" }).click();
  await checkDialog(page, "revoke", violations);
  await dialog.getByRole("button", { name: "Cancel" }).click();
  tables.push(await readTable());
  await page.getByRole("button", { name: "Revoke the key web" }).click();
  await dialog.getByRole("button", { name: "Revoke" }).click();
  await page.locator("#announcer").getByText("revoked").waitFor({ state: "attached" });
  await page.getByRole("rowheader", { name: "web" }).waitFor({ state: "detached" });
  tables.push(await readTable());
  const html = await page.content();
  const isSecretLeft = [created, rotated].some(({ secret }) => html.includes(secret));
  return { message, created, rotated, tables, isSecretLeft, violations };
}

/** Check the open dialog, and take screenshots of it if `artefacts` is set. */
async function checkDialog(page, name, violations) {
  violations.push(...(await violationsInBothSchemes(page)));
  if (artefacts === null) {
    return;
  }
  for (const width of [360, 1440]) {
    await page.setViewportSize({ width, height: 900 });
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      await page.screenshot({ path: `${artefacts}/key-${name}-${colorScheme}-${width}.png` });
    }
  }
  await page.emulateMedia({ colorScheme: "light" });
}

async function waitForRange(page, range) {
  await page.locator(`html[data-range="${range}"]`).waitFor({ state: "attached" });
}

async function readNumbers(page) {
  const tiles = {};
  for (const id of ["calls", "errors", "hits", "spent", "saved", "latency", "in-flight"]) {
    tiles[id] = await page.locator(`#${id} dd`).allTextContents();
  }
  const rows = (id) =>
    page.locator(`#${id} tbody tr`).evaluateAll((elements) =>
      elements.map((row) => [...row.cells].map((cell) => cell.innerText.trim())),
    );
  return {
    tiles,
    scope: await page.locator("#scope").innerText(),
    isEmpty: await page.locator("#no-calls").isVisible(),
    endpoints: await rows("endpoints"),
    routes: await rows("routes"),
    principals: await rows("principals"),
    users: await rows("users"),
    live: await rows("live"),
    latest: await rows("latest"),
    failures: await rows("failures"),
    states: await page.locator("#state li").allInnerTexts(),
    points: await page.locator("#calls-chart tbody tr").count(),
    api: await page.locator(".api-call code").allTextContents(),
  };
}

/**
 * Return the points of the chart of calls that a screen reader announces for some keys, and the
 * tooltip.
 */
async function readChart(page) {
  const slider = page.getByRole("slider", { name: /^Calls/ });
  await slider.focus();
  const announced = [await slider.getAttribute("aria-valuetext")];
  for (const name of ["ArrowLeft", "Home", "End"]) {
    await page.keyboard.press(name);
    announced.push(await slider.getAttribute("aria-valuetext"));
  }
  const tooltip = await page.locator("#calls-chart .tooltip").innerText();
  return { announced, tooltip, starts: await readStarts(page, slider) };
}

/** Return the marks of starts: their lines, and the texts for keyboards, tables and pointers. */
async function readStarts(page, slider) {
  const announced = [];
  await page.keyboard.press("Home");
  for (let n = 0; n < (await page.locator("#calls-chart tbody tr").count()); n += 1) {
    announced.push(await slider.getAttribute("aria-valuetext"));
    await page.keyboard.press("ArrowRight");
  }
  // All at once: an update of the page draws the chart again.
  const lines = await page.locator("#calls-chart .starts path").evaluateAll((paths) =>
    paths.map((path) => {
      const { x, y, height } = path.getBoundingClientRect();
      return { className: path.getAttribute("class"), x, y: y + height / 2 };
    }),
  );
  const classes = lines.map(({ className }) => className);
  const hovered = [];
  const isDrawn = await page.locator("#calls-chart .plot > svg").isVisible(); // not without calls
  for (const { x, y } of isDrawn ? lines : []) {
    await page.mouse.move(x, y);
    hovered.push(await page.locator("#calls-chart .tooltip").innerText());
  }
  const cells = page.locator("#calls-chart tbody td:last-child");
  return {
    announced: announced.filter((text) => text.includes("started on")),
    classes,
    hovered,
    table: (await cells.allTextContents()).filter((text) => text !== ""),
    note: await page.locator("#starts-note").isVisible(),
    otherCharts: await page.locator("#errors-chart tbody td:last-child").allTextContents(),
  };
}

/** Filter the list of calls by the first failure, read a detail by keyboard, and export the calls. */
async function readCalls(page) {
  const show = page.getByRole("button", { name: /^Show the calls with/ }).first();
  if ((await show.count()) === 0) {
    return null;
  }
  const focused = await focusedAfterUpdate(page, show);
  await clickDuringUpdate(page, show);
  const chips = page.locator("#latest tbody .chip");
  await page.waitForFunction(() => document.querySelectorAll("#latest tbody .chip.good").length === 0);
  const filtered = await chips.allInnerTexts();
  const url = page.url();
  const toggle = page.locator("#latest .toggle").first();
  await toggle.press("Enter");
  const detail = page.locator("#latest .call-detail");
  const result = {
    focused,
    filtered,
    url,
    expanded: await toggle.getAttribute("aria-expanded"),
    steps: await detail.locator(".timeline li > :first-child").allInnerTexts(),
    facts: await detail.locator(".facts").innerText(),
    violations: await violationsInBothSchemes(page),
  };
  await detail.getByRole("button", { name: "Copy the Request id (fal.ai)" }).press("Enter");
  await detail.getByText("Copied").waitFor();
  result.copied = await page.evaluate(() => navigator.clipboard.readText());
  const download = page.waitForEvent("download");
  await page.getByRole("button", { name: "Export CSV" }).press("Enter");
  result.csv = await readDownload(await download);
  await page.getByRole("button", { name: "Clear filters" }).press("Enter");
  await page.locator("#latest tbody .chip.good").first().waitFor();
  return { ...result, cleared: page.url() };
}

/** Return the label of what has the focus after an update, if a button of a table had it before. */
async function focusedAfterUpdate(page, button) {
  await button.focus();
  await button.evaluate((element) => {
    element.dataset.isOld = "";
    window.dispatchEvent(new Event("falproxy:wake"));
  });
  await page.locator("[data-is-old]").waitFor({ state: "detached" });
  return page.evaluate(() => document.activeElement.getAttribute("aria-label"));
}

/** Click a button of a table, with an update between the press and the release of the mouse. */
async function clickDuringUpdate(page, button) {
  await button.hover();
  await page.mouse.down();
  await page.locator("#endpoints table").evaluate((table) => {
    table.dataset.isOld = "";
    window.dispatchEvent(new Event("falproxy:wake"));
  });
  await page.locator("[data-is-old]").waitFor({ state: "detached" });
  await page.waitForLoadState("networkidle");
  await page.mouse.up();
}

/** Return the file of each visible button for CSV, by its name. The list of calls is left out. */
async function exportTables(page) {
  const files = {};
  const buttons = page.getByRole("button", { name: /^Export .* as CSV$/ });
  for (let n = 0; n < (await buttons.count()); n += 1) {
    const download = page.waitForEvent("download");
    await buttons.nth(n).press("Enter");
    const file = await download;
    files[file.suggestedFilename()] = (await readDownload(file)).split("\r\n").slice(0, -1);
  }
  return files;
}

async function readDownload(download) {
  const pieces = [];
  for await (const piece of await download.createReadStream()) {
    pieces.push(piece);
  }
  return Buffer.concat(pieces).toString();
}

async function pauseUpdates(page) {
  const button = page.getByRole("button", { name: "Pause updates" });
  await button.click();
  const pressed = await button.getAttribute("aria-pressed");
  const text = await page.locator("#updated").innerText();
  await button.click();
  return { pressed, text };
}

async function violationsInBothSchemes(page) {
  const violations = [];
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
    for (const violation of await axeViolations(page)) {
      violations.push(`${colorScheme} ${violation}`);
    }
  }
  await page.emulateMedia({ colorScheme: "light" });
  return violations;
}

/**
 * Check that nothing overflows a narrow or a wide window. Takes screenshots if `artefacts` is set.
 */
async function checkWidths(page) {
  for (const width of [360, 1440]) {
    await page.setViewportSize({ width, height: 900 });
    await waitForResize(page);
    const overflowing = await page.evaluate(() => {
      const { scrollWidth, clientWidth } = document.documentElement;
      const isOutside = (element) => element.getBoundingClientRect().right > clientWidth + 1;
      const outside = [...document.querySelectorAll("body *")].filter(isOutside);
      return scrollWidth > clientWidth ? outside.map(({ outerHTML }) => outerHTML.slice(0, 120)) : [];
    });
    if (overflowing.length > 0) {
      throw new Error(`the page is too wide at ${width}: ${overflowing.slice(0, 5).join("\n")}`);
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

/** Wait until the charts are rendered for the new width. A timeout is reported by `checkWidths`. */
async function waitForResize(page) {
  const hasFit = () => document.documentElement.scrollWidth <= document.documentElement.clientWidth;
  await page.waitForFunction(hasFit, null, { timeout: 5000 }).catch(() => {});
}
