/**
 * What a person does at the page of examples/js-client, one function a thing. Like the scenarios they
 * only report. Each takes `{page, gateway, shoot}`; `shoot(name)` keeps a screenshot for the curious.
 */

export async function editsAPicture({ page, gateway, shoot }) {
  const origins = new Set();
  page.on("request", (request) => origins.add(new URL(request.url()).origin));
  await open(page, gateway);
  await shoot("empty");
  await choosePicture(page, gateway);
  await page.getByLabel("Prompt").fill("!delay 1 make it winter");
  await page.getByRole("button", { name: "Generate" }).click();
  await page.locator("#status[data-phase=running]").waitFor();
  await page.locator("#log li").first().waitFor();
  await shoot("running");
  return {
    ...(await ended(page)),
    picture: await picture(page, shoot),
    origins: [...origins].filter((origin) => origin !== "null"), // blob: and data: have none
  };
}

export async function paintsFromWords({ page, gateway, shoot }) {
  await open(page, gateway);
  await page.getByRole("radio", { name: "FLUX dev" }).check();
  await page.getByLabel("Prompt").fill("a lighthouse in thick fog");
  // As a person without a mouse would.
  await page.keyboard.press("Control+Enter");
  return { ...(await ended(page)), picture: await picture(page, shoot) };
}

export async function cancels({ page, gateway, shoot }) {
  await open(page, gateway);
  await page.getByRole("radio", { name: "FLUX dev" }).check();
  await page.getByLabel("Prompt").fill("!delay 20 a very slow painting");
  await page.getByRole("button", { name: "Generate" }).click();
  await page.locator("#status[data-phase=running]").waitFor();
  await page.getByRole("button", { name: "Cancel" }).click();
  const end = await ended(page);
  await shoot("cancelled");
  const focused = await page.evaluate(() => document.activeElement.textContent);
  return { ...end, focused };
}

export async function meetsAnError({ page, gateway, shoot }) {
  await open(page, gateway);
  await page.getByRole("radio", { name: "FLUX dev" }).check();
  await page.getByLabel("Prompt").fill("!error 422 content_policy_violation");
  await page.getByRole("button", { name: "Generate" }).click();
  const end = await ended(page);
  await shoot("error");
  return {
    ...end,
    alert: await page.getByRole("alert").innerText(),
    besidePrompt: await page.locator("#prompt-problem").innerText(),
    invalid: await page.getByLabel("Prompt").getAttribute("aria-invalid"),
  };
}

export async function losesTheProxy({ page, gateway, shoot }) {
  await open(page, gateway);
  await page.route("**/api/fal/proxy", (route) => route.abort());
  await page.getByRole("radio", { name: "FLUX dev" }).check();
  await page.getByLabel("Prompt").fill("a lost letter");
  await page.getByRole("button", { name: "Generate" }).click();
  const end = await ended(page);
  await shoot("unreachable");
  return { ...end, alert: await page.getByRole("alert").innerText() };
}

export async function forgetsThePicture({ page, gateway, shoot }) {
  await open(page, gateway);
  await page.getByLabel("Prompt").fill("make it winter");
  await page.getByRole("button", { name: "Generate" }).click();
  await shoot("incomplete");
  return {
    besidePicture: await page.locator("#picture-problem").innerText(),
    focused: await page.evaluate(() => document.activeElement.id),
  };
}

/** Every stop of the Tab key, and whether anything sticks out of a narrow screen. */
export async function worksByKeyboard({ page, gateway }) {
  await open(page, gateway);
  const stops = [];
  for (let presses = 0; presses < 4; presses += 1) {
    await page.keyboard.press("Tab");
    stops.push(await page.evaluate(() => document.activeElement.id || document.activeElement.name));
  }
  const overflow = await page.evaluate(
    () => document.documentElement.scrollWidth - document.documentElement.clientWidth,
  );
  return { stops, overflow };
}

async function open(page, gateway) {
  await page.goto(`${gateway}/example/index.html`);
  await page.evaluate(() => {
    const status = document.querySelector("#status");
    window.seen = [];
    new MutationObserver(() =>
      window.seen.push(`${status.dataset.phase}: ${document.querySelector("#headline").innerText}`),
    ).observe(status, { subtree: true, childList: true, attributeFilter: ["data-phase"] });
  });
}

async function choosePicture(page, gateway) {
  const response = await page.request.get(`${gateway}/fixtures/photo.png`);
  const buffer = await response.body();
  const file = { name: "photo.png", mimeType: "image/png", buffer };
  await page.getByLabel("Your picture").setInputFiles(file);
  await page.locator("#preview").waitFor();
}

/** Waits for the end; the phases seen until then, each once, with the last headline of each. */
async function ended(page) {
  const over = ["done", "failed", "cancelled"].map((phase) => `#status[data-phase=${phase}]`);
  await page.locator(over.join(", ")).waitFor();
  return {
    headline: await page.locator("#headline").innerText(),
    clock: await page.locator("#clock").innerText(),
    logs: await page.locator("#log li").allInnerTexts(),
    phases: await page.evaluate(() => [...new Set(window.seen)]),
    busy: await page.getByRole("button", { name: "Generate" }).isDisabled(),
  };
}

async function picture(page, shoot) {
  const image = page.locator("#image");
  await image.waitFor();
  await shoot("picture");
  return image.evaluate(({ src, alt, naturalWidth, naturalHeight }) => {
    return { src, alt, width: naturalWidth, height: naturalHeight };
  });
}
