/** Uses of stored videos and sounds in Chromium, for test_media_browser.py. */

/** Play a file in a page of another origin, or of the document `from`, seek, and play on. */
export async function play({ page, url, kind, from }) {
  if (from !== undefined) await page.goto(from);
  const responses = recordResponses(page, url);
  await page.setContent(`<${kind} crossorigin="anonymous"></${kind}>`);
  const played = await page.evaluate(
    async ([selector, source]) => {
      const player = document.querySelector(selector);
      const until = (condition) =>
        new Promise((resolve, reject) => {
          player.addEventListener("error", () => reject(new Error(player.error.message)));
          const check = () => (condition() ? resolve() : setTimeout(check, 20));
          check();
        });
      const frame = () => {
        const canvas = new OffscreenCanvas(64, 64);
        const context = canvas.getContext("2d");
        context.drawImage(player, 0, 0, 64, 64);
        return context.getImageData(0, 0, 64, 64).data.join();
      };
      player.muted = true;
      player.src = source;
      await player.play();
      await until(() => player.currentTime > 0.3);
      const early = player.currentTime;
      const frames = selector === "video" ? [frame()] : [];
      const end = player.duration - 0.6;
      player.currentTime = end;
      await until(() => player.currentTime > end + 0.1);
      if (selector === "video") {
        frames.push(frame());
      }
      const { currentTime, duration, videoWidth, videoHeight } = player;
      return {
        early,
        late: currentTime,
        duration,
        size: [videoWidth, videoHeight],
        frames: new Set(frames).size,
      };
    },
    [kind, url],
  );
  return { ...played, responses };
}

/**
 * Open a file as a document, as a click on its URL does, and play it. The document is sandboxed: it has
 * no timers, so that its state is polled from here.
 */
export async function open({ page, url }) {
  await page.goto(url, { waitUntil: "commit" });
  const read = (name) => page.evaluate((key) => document.querySelector("video")?.[key] ?? 0, name);
  await above(() => read("readyState"), 1);
  await page.click("video");
  return above(() => read("currentTime"), 0.3);
}

/** Poll until a value is larger than a limit, and return it. */
async function above(read, limit, timeout = 10_000) {
  const end = performance.now() + timeout;
  for (;;) {
    const value = await read();
    if (value > limit) {
      return value;
    }
    if (performance.now() > end) {
      throw new Error(`still ${value}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** Decode a sound with Web Audio, which fetches it from another origin. */
export async function decode({ page, url }) {
  return page.evaluate(async (source) => {
    const response = await fetch(source);
    const context = new OfflineAudioContext(1, 1, 16_000);
    const decoded = await context.decodeAudioData(await response.arrayBuffer());
    const loudest = Math.max(...decoded.getChannelData(0).slice(0, 16_000).map(Math.abs));
    return { duration: decoded.duration, loudest, type: response.headers.get("content-type") };
  }, url);
}

/** Read a part of a file as scripts do, with the headers that they may see. */
export async function fetchRange({ page, url, range }) {
  return page.evaluate(
    async ([source, value]) => {
      const response = await fetch(source, { headers: { Range: value } });
      return {
        status: response.status,
        size: (await response.arrayBuffer()).byteLength,
        contentRange: response.headers.get("content-range"),
        acceptRanges: response.headers.get("accept-ranges"),
        etag: response.headers.get("etag"),
      };
    },
    [url, range],
  );
}

function recordResponses(page, url) {
  const responses = [];
  page.on("response", async (response) => {
    if (response.url() === url) {
      const range = (await response.request().allHeaders()).range ?? null;
      responses.push({ status: response.status(), range });
    }
  });
  return responses;
}
