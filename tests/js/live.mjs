/**
 * Scenarios of live video that test_live_browser.py checks: the page live.html of
 * examples/js-client. Each takes `{page, gateway}`.
 */

/** Start a session, and return the colors of the video, the positions of its square, and the phases. */
export async function watch({ page, gateway, endpoint, prompt = "", frames = 3 }) {
  await open(page, gateway);
  await page.getByLabel("Model").selectOption(endpoint);
  await page.getByLabel("Prompt").fill(prompt);
  await page.getByRole("button", { name: "Start" }).click();
  await page.locator("#status[data-phase=live]").waitFor();
  const seen = await page.evaluate(readFrames, frames);
  return { ...seen, headline: await page.locator("#headline").innerText() };
}

/** Watch until the color changes after a prompt. */
export async function sendPrompt({ page, gateway, endpoint, prompt }) {
  const before = await watch({ page, gateway, endpoint });
  await page.getByLabel("Prompt").fill(prompt);
  await page.getByRole("button", { name: "Send prompt" }).click();
  await page.waitForFunction(
    ([read, color]) => {
      const now = eval(`(${read})`)();
      return now.some((value, index) => Math.abs(value - color[index]) > 30);
    },
    [readColor.toString(), before.colors[0]],
  );
  await page.waitForTimeout(500); // until the new color is encoded well
  const color = await page.evaluate(readColor);
  await page.getByRole("button", { name: "Stop" }).click();
  return { before: before.colors[0], after: color, end: await ending(page) };
}

/** Start a session, and wait until the proxy ends it. */
export async function waitForEnd({ page, gateway, endpoint }) {
  await open(page, gateway);
  await page.getByLabel("Model").selectOption(endpoint);
  await page.getByRole("button", { name: "Start" }).click();
  await page.locator("#status:is([data-phase=ended], [data-phase=failed])").waitFor();
  return ending(page);
}

async function open(page, gateway) {
  await page.goto(`${gateway}/example/live.html`);
}

async function ending(page) {
  return {
    phase: await page.locator("#status").getAttribute("data-phase"),
    headline: await page.locator("#headline").innerText(),
    button: await page.locator("#start").innerText(),
  };
}

/** Return the color in the upper left corner of the video. */
function readColor() {
  const video = document.querySelector("#video");
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  const context = canvas.getContext("2d");
  context.drawImage(video, 0, 0);
  return [...context.getImageData(10, 10, 1, 1).data].slice(0, 3);
}

/** Return the size of the video, and for each of some frames a corner's color and the left edge of the white square. */
async function readFrames(count) {
  const video = document.querySelector("#video");
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const colors = [];
  const edges = [];
  while (edges.length < count) {
    await new Promise((resolve) => video.requestVideoFrameCallback(resolve));
    context.drawImage(video, 0, 0);
    const { data } = context.getImageData(0, canvas.height / 2, canvas.width, 1);
    const isWhite = (x) => data[4 * x] > 215 && data[4 * x + 1] > 215 && data[4 * x + 2] > 215;
    const edge = [...Array(canvas.width).keys()].findIndex(isWhite);
    if (edges.at(-1) !== edge) {
      edges.push(edge);
      colors.push([...context.getImageData(10, 10, 1, 1).data].slice(0, 3));
    }
  }
  return { width: video.videoWidth, height: video.videoHeight, colors, edges };
}
