/** The browser: Debian's Chromium, headless, with a fresh profile, and silent on the network. */
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

/** A running browser; playwright gives it a user data directory of its own and removes it. */
export function launch() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    headless: true,
    args: FLAGS,
  });
}

/**
 * What `visit(page)` returns, for a page in a profile of its own. Whatever goes wrong inside the page
 * unnoticed by its own code fails the visit.
 */
export async function withPage(browser, options, visit) {
  const context = await browser.newContext(options);
  const crashes = [];
  try {
    const page = await context.newPage();
    page.on("pageerror", (error) => crashes.push(error));
    const result = await visit(page);
    if (crashes.length > 0) {
      throw crashes[0];
    }
    return result;
  } finally {
    await context.close();
  }
}
