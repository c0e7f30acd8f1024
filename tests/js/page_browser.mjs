/**
 * Drives the page in Chromium for test_page_browser.py. Reads requests from stdin, one JSON a line:
 * `{session, action, ...}`, and writes a line `{result}` or `{error}` for each. A session is a
 * browser context with its own storage; the actions `open` and `close` create and end it.
 */
import { createInterface } from "node:readline";
import { launch } from "./chromium.mjs";
import * as actions from "./page_actions.mjs";

const TIMEOUT = 30_000; // ms
const browser = await launch();
const sessions = new Map();

async function open({ session, width = 1440, height = 900, colorScheme = "light", isTouch = false }) {
  const context = await browser.newContext({
    viewport: { width, height },
    colorScheme,
    reducedMotion: "reduce",
    hasTouch: isTouch,
    acceptDownloads: true,
    permissions: ["clipboard-read", "clipboard-write"],
  });
  context.setDefaultTimeout(TIMEOUT);
  const opened = { context, pages: [], requests: [], consoleErrors: [], pageErrors: [] };
  context.on("page", (page) => {
    page.on("pageerror", (error) => opened.pageErrors.push(error.stack));
    page.on(
      "console",
      (message) => message.type() === "error" && opened.consoleErrors.push(message.text()),
    );
    page.on("request", (request) => {
      opened.requests.push({
        url: request.url(),
        method: request.method(),
        target: request.headers()["x-fal-target-url"] ?? null,
      });
    });
  });
  opened.pages.push(await context.newPage());
  sessions.set(session, opened);
}

/** Close a session. Return its uncaught errors. */
async function close({ session }) {
  const { context, pageErrors } = sessions.get(session);
  sessions.delete(session);
  await context.close();
  return pageErrors;
}

async function perform({ action, ...request }) {
  if (action === "open") {
    return open(request);
  }
  if (action === "close") {
    return close(request);
  }
  const session = sessions.get(request.session);
  const page = session.pages[request.tab ?? 0];
  return actions[action]({ ...request, session, page });
}

for await (const line of createInterface({ input: process.stdin })) {
  let response;
  try {
    response = { result: (await perform(JSON.parse(line))) ?? null };
  } catch (error) {
    response = { error: error.stack };
  }
  process.stdout.write(`${JSON.stringify(response)}\n`);
}
await browser.close();
