/**
 * Plays scenarios in Chromium, started once for all of them. By hand:
 *
 *     GATEWAY=<origin> SANDBOX=<origin> node browser.mjs <scenario...>
 *
 * prints one JSON line for each. Without a name it reads requests from stdin, one JSON a line,
 * `{scenario, gateway, sandbox, ...}`, and answers each with a line `{result}` or `{error}`. A
 * scenario is a function of scenarios.js, or `example.<name>` for one of example.mjs.
 */
import { createInterface } from "node:readline";
import { launch, withPage } from "./chromium.mjs";
import * as example from "./example.mjs";

const browser = await launch();

async function answer({ scenario, ...request }) {
  try {
    const [prefix, name] = scenario.split(".");
    return { result: await (name ? visitExample(name, request) : playInPage(prefix, request)) };
  } catch (error) {
    return { error: error.stack };
  }
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

function visitExample(name, { gateway, width = 1440, colorScheme = "light" }) {
  const options = { viewport: { width, height: 900 }, colorScheme, reducedMotion: "reduce" };
  return withPage(browser, options, (page) => {
    page.setDefaultTimeout(20_000);
    const shoot = async (moment) => {
      if (process.env.ARTEFACTS) {
        const path = `${process.env.ARTEFACTS}/example-${moment}-${colorScheme}-${width}.png`;
        await page.screenshot({ path, fullPage: true });
      }
    };
    return example[name]({ page, gateway, shoot });
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
  process.stdout.write(`${JSON.stringify(await answer(request))}\n`);
}
await browser.close();
