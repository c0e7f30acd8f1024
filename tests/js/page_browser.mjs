/**
 * A person at the page, moved step by step by test_page_browser.py. Requests come on stdin, one JSON a
 * line, `{visit, act, ...}`, and each is answered by a line `{result}` or `{error}`. A visit is a
 * browser profile of its own, which `open` begins and `leave` ends.
 */
import { createInterface } from "node:readline";
import { launch } from "./chromium.mjs";
import * as acts from "./page_actions.mjs";

const TIMEOUT = 30_000; // ms, on a slow machine
const browser = await launch();
const visits = new Map();

async function open({ visit, width = 1440, height = 900, scheme = "light", isTouch = false }) {
  const context = await browser.newContext({
    viewport: { width, height },
    colorScheme: scheme,
    reducedMotion: "reduce",
    hasTouch: isTouch,
    acceptDownloads: true,
    permissions: ["clipboard-read", "clipboard-write"],
  });
  context.setDefaultTimeout(TIMEOUT);
  const seen = { context, pages: [], requests: [], complaints: [], crashes: [] };
  context.on("page", (page) => {
    page.on("pageerror", (error) => seen.crashes.push(error.stack));
    page.on(
      "console",
      (message) => message.type() === "error" && seen.complaints.push(message.text()),
    );
    page.on("request", (request) => {
      seen.requests.push({
        url: request.url(),
        method: request.method(),
        target: request.headers()["x-fal-target-url"] ?? null,
      });
    });
  });
  seen.pages.push(await context.newPage());
  visits.set(visit, seen);
}

async function leave({ visit }) {
  const { context, crashes } = visits.get(visit);
  visits.delete(visit);
  await context.close();
  return crashes;
}

async function answer({ act, ...request }) {
  if (act === "open") {
    return open(request);
  }
  if (act === "leave") {
    return leave(request);
  }
  const seen = visits.get(request.visit);
  return acts[act]({ seen, page: seen.pages[request.tab ?? 0], ...request });
}

for await (const line of createInterface({ input: process.stdin })) {
  let said;
  try {
    said = { result: (await answer(JSON.parse(line))) ?? null };
  } catch (error) {
    said = { error: error.stack };
  }
  process.stdout.write(`${JSON.stringify(said)}\n`);
}
await browser.close();
