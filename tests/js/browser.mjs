/**
 * Plays scenarios in one Chromium process. By hand:
 *
 *     GATEWAY=<origin> SANDBOX=<origin> node browser.mjs <scenario...>
 *
 * prints one JSON line for each. Without arguments it reads requests from stdin, one JSON a line,
 * `{scenario, gateway, sandbox, ...}`, and writes a line `{result}` or `{error}` for each. A
 * scenario is the name of a function of scenarios.js, or `dashboard.<name>`, `example.<name>`,
 * `live.<name>` or `media.<name>` for one of dashboard.mjs, example.mjs, live.mjs or media.mjs.
 */
import { createInterface } from "node:readline";
import { launch, withPage } from "./chromium.mjs";
import * as dashboard from "./dashboard.mjs";
import * as example from "./example.mjs";
import * as live from "./live.mjs";
import * as media from "./media.mjs";

const browser = await launch();

async function handle({ scenario, ...request }) {
  try {
    const [prefix, name] = scenario.split(".");
    return { result: await players[name ? prefix : "page"](name ?? prefix, request) };
  } catch (error) {
    return { error: error.stack };
  }
}

const players = {
  page: playInPage,
  dashboard: (name, request) =>
    withPage(browser, dashboard.CONTEXT_OPTIONS, (page) => dashboard[name]({ page, ...request })),
  example: (name, request) => visitExample(example[name], request),
  live: (name, request) => visitExample(live[name], request),
  media: useFile,
};

function useFile(name, request) {
  return withPage(browser, {}, (page) => {
    page.setDefaultTimeout(20_000);
    return media[name]({ page, ...request });
  });
}

function playInPage(scenario, { gateway, sandbox }) {
  return withPage(browser, {}, async (page) => {
    await page.goto(`${gateway}/scenarios/index.html`);
    return page.evaluate(
      ([name, origins]) => window.play(name, origins),
      [scenario, { gateway, sandbox }],
    );
  });
}

function visitExample(visit, { gateway, width = 1440, colorScheme = "light", ...inputs }) {
  const options = { viewport: { width, height: 900 }, colorScheme, reducedMotion: "reduce" };
  return withPage(browser, options, (page) => {
    page.setDefaultTimeout(20_000);
    const screenshot = async (name) => {
      if (process.env.ARTEFACTS) {
        const path = `${process.env.ARTEFACTS}/example-${name}-${colorScheme}-${width}.png`;
        await page.screenshot({ path, fullPage: true });
      }
    };
    return visit({ page, gateway, screenshot, ...inputs });
  });
}

async function* requests() {
  const { GATEWAY: gateway, SANDBOX: sandbox } = process.env;
  const scenarios = process.argv.slice(2);
  yield* scenarios.map((scenario) => ({ scenario, gateway, sandbox }));
  if (scenarios.length === 0) {
    for await (const line of createInterface({ input: process.stdin })) {
      yield JSON.parse(line);
    }
  }
}

for await (const request of requests()) {
  process.stdout.write(`${JSON.stringify(await handle(request))}\n`);
}
await browser.close();
