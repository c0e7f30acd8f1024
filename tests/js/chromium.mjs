/** Debian's Chromium, headless, without background network traffic. */
import { chromium } from "playwright-core";

const FLAGS = [
  "--no-sandbox", // the tests may run as root, in a container
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

/** Start the browser. Playwright creates a temporary profile for it. */
export function launch() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    headless: true,
    args: FLAGS,
  });
}

/**
 * Call `visit` with a page in a new browser context, and return its result. Throws if the page has
 * an uncaught error.
 */
export async function withPage(browser, options, visit) {
  const context = await browser.newContext(options);
  const pageErrors = [];
  try {
    const page = await context.newPage();
    page.on("pageerror", (error) => pageErrors.push(error));
    const result = await visit(page);
    if (pageErrors.length > 0) {
      throw pageErrors[0];
    }
    return result;
  } finally {
    await context.close();
  }
}
