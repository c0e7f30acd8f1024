/**
 * Scenarios of a user on the page of examples/js-client. They return results that
 * test_js_browser.py checks. Each takes `{page, gateway, screenshot}`; `screenshot(name)` takes a
 * screenshot if ARTEFACTS is set.
 */

export async function editImage({ page, gateway, screenshot }) {
  const origins = new Set();
  page.on("request", (request) => origins.add(new URL(request.url()).origin));
  await open(page, gateway);
  await screenshot("empty");
  await chooseImage(page, gateway);
  await page.getByLabel("Prompt").fill("!delay 1 make it winter");
  await page.getByRole("button", { name: "Generate" }).click();
  await page.locator("#status[data-phase=running]").waitFor();
  await page.locator("#log p").first().waitFor();
  await screenshot("running");
  return {
    ...(await waitForEnd(page)),
    image: await readImage(page, screenshot),
    origins: [...origins].filter((origin) => origin !== "null"), // blob: and data: have none
  };
}

export async function generateFromText({ page, gateway, screenshot }) {
  await open(page, gateway);
  await page.getByRole("radio", { name: "FLUX dev" }).check();
  await page.getByLabel("Prompt").fill("a lighthouse in thick fog");
  await page.keyboard.press("Control+Enter");
  return { ...(await waitForEnd(page)), image: await readImage(page, screenshot) };
}

export async function cancelJob({ page, gateway, screenshot }) {
  await open(page, gateway);
  await page.getByRole("radio", { name: "FLUX dev" }).check();
  await page.getByLabel("Prompt").fill("!delay 20 a very slow painting");
  await page.getByRole("button", { name: "Generate" }).click();
  await page.locator("#status[data-phase=running]").waitFor();
  await page.getByRole("button", { name: "Cancel" }).click();
  const end = await waitForEnd(page);
  await screenshot("cancelled");
  const focused = await page.evaluate(() => document.activeElement.textContent);
  return { ...end, focused };
}

export async function causeAnError({ page, gateway, screenshot }) {
  await open(page, gateway);
  await page.getByRole("radio", { name: "FLUX dev" }).check();
  await page.getByLabel("Prompt").fill("!error 422 content_policy_violation");
  await page.getByRole("button", { name: "Generate" }).click();
  const end = await waitForEnd(page);
  await screenshot("error");
  return {
    ...end,
    alert: await page.getByRole("alert").innerText(),
    promptProblem: await page.locator("#prompt-problem").innerText(),
    invalid: await page.getByLabel("Prompt").getAttribute("aria-invalid"),
  };
}

export async function loseTheProxy({ page, gateway, screenshot }) {
  await open(page, gateway);
  await page.route("**/api/fal/proxy", (route) => route.abort());
  await page.getByRole("radio", { name: "FLUX dev" }).check();
  await page.getByLabel("Prompt").fill("a lost letter");
  await page.getByRole("button", { name: "Generate" }).click();
  const end = await waitForEnd(page);
  await screenshot("unreachable");
  return { ...end, alert: await page.getByRole("alert").innerText() };
}

export async function omitTheImage({ page, gateway, screenshot }) {
  await open(page, gateway);
  await page.getByLabel("Prompt").fill("make it winter");
  await page.getByRole("button", { name: "Generate" }).click();
  await screenshot("incomplete");
  return {
    imageProblem: await page.locator("#input-image-problem").innerText(),
    focused: await page.evaluate(() => document.activeElement.id),
  };
}

/** Return the elements that the Tab key focuses, and by how many pixels the page is too wide. */
export async function useKeyboard({ page, gateway }) {
  await open(page, gateway);
  const stops = [];
  for (let presses = 0; presses < 7; presses += 1) {
    await page.keyboard.press("Tab");
    stops.push(
      await page.evaluate(() => {
        const { id, name, innerText } = document.activeElement;
        return id || name || innerText.trim();
      }),
    );
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
    window.phases = [];
    new MutationObserver(() =>
      window.phases.push(`${status.dataset.phase}: ${document.querySelector("#headline").innerText}`),
    ).observe(status, { subtree: true, childList: true, attributeFilter: ["data-phase"] });
  });
}

async function chooseImage(page, gateway) {
  const response = await page.request.get(`${gateway}/fixtures/photo.png`);
  const buffer = await response.body();
  const file = { name: "photo.png", mimeType: "image/png", buffer };
  await page.getByLabel("Your image").setInputFiles(file);
  await page.locator("#preview").waitFor();
}

/** Wait until the job has ended. Return the final status and all phases with their headlines. */
async function waitForEnd(page) {
  const selectors = ["done", "failed", "cancelled"].map((phase) => `#status[data-phase=${phase}]`);
  await page.locator(selectors.join(", ")).waitFor();
  return {
    headline: await page.locator("#headline").innerText(),
    clock: await page.locator("#clock").innerText(),
    logs: await page.locator("#log p").allInnerTexts(),
    phases: await page.evaluate(() => [...new Set(window.phases)]),
    busy: await page.getByRole("button", { name: "Generate" }).isDisabled(),
  };
}

async function readImage(page, screenshot) {
  const image = page.locator("#result-image");
  await image.waitFor();
  await screenshot("image");
  return image.evaluate(({ src, alt, naturalWidth, naturalHeight }) => {
    return { src, alt, width: naturalWidth, height: naturalHeight };
  });
}
