/**
 * Calls a proxy inside another application with @fal-ai/client, as a signed-in user:
 * PROXY=<URL of /api/fal/proxy> COOKIE=<name=value> node mounted.mjs
 */
import { createFalClient } from "@fal-ai/client";

const { PROXY: url, COOKIE: cookie } = process.env;
const fal = createFalClient({
  proxyUrl: { url, when: "always" },
  requestMiddleware: async (request) => ({
    ...request,
    headers: { ...request.headers, cookie },
  }),
});

const input = { prompt: "a heron", image_size: "square" };
const first = await fal.subscribe("fal-ai/flux/dev", { input, mode: "polling", pollInterval: 20 });
const logs = [];
const second = await fal.subscribe("fal-ai/flux/dev", {
  input: { ...input, seed: 7 },
  mode: "streaming",
  onQueueUpdate: (update) => logs.push(update.status),
});
const photo = await fetch(first.data.images[0].url);
const image_url = await fal.storage.upload(await photo.blob());
const third = await fal.run("fal-ai/flux-pro/kontext", { input: { prompt: "autumn", image_url } });
const images = [first, second, third].map(({ data }) => data.images.length);
process.stdout.write(`${JSON.stringify({ images, last: logs.at(-1) })}\n`, () => process.exit(0));
