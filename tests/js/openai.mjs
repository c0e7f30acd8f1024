/**
 * Plays OpenAI's own client against the proxy:
 *
 *     GATEWAY=<origin> ACCESS_KEY=<secret> node openai.mjs <scenario>
 *
 * Reads the options of the call from stdin, as JSON. The last line of the output is the result or
 * the error, as JSON.
 */
import { json } from "node:stream/consumers";
import OpenAI, { toFile } from "openai";

const [scenario] = process.argv.slice(2);
const { GATEWAY: gateway, ACCESS_KEY: apiKey } = process.env;

const client = new OpenAI({ baseURL: `${gateway}/v1`, apiKey });

const toImageFile = (base64, name) =>
  toFile(Buffer.from(base64, "base64"), `${name}.png`, { type: "image/png" });

/** Replace base64 images, one or a list, by files. */
async function withFiles({ image, mask, ...options }) {
  if (image !== undefined) {
    options.image = Array.isArray(image)
      ? await Promise.all(image.map(toImageFile))
      : await toImageFile(image, "image");
  }
  if (mask !== undefined) options.mask = await toImageFile(mask, "mask");
  return options;
}

async function collect(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

/** Create a video, poll it to its end, and download it. */
async function createVideo({ reference, ...options }) {
  if (reference !== undefined) options.input_reference = await toImageFile(reference, "reference");
  let video = await client.videos.create(options);
  const created = video;
  while (["queued", "in_progress"].includes(video.status)) {
    await new Promise((resolve) => setTimeout(resolve, 20));
    video = await client.videos.retrieve(video.id);
  }
  const listed = await collect(client.videos.list({ limit: 1 }));
  if (video.status !== "completed") return { created, video, listed };
  const response = await client.videos.downloadContent(video.id);
  const content = Buffer.from(await response.arrayBuffer()).toString("base64");
  const deleted = await client.videos.delete(video.id);
  return { created, video, listed, content, deleted };
}

async function createSpeech(options) {
  const response = await client.audio.speech.create(options);
  const type = response.headers.get("content-type");
  return { type, content: Buffer.from(await response.arrayBuffer()).toString("base64") };
}

const SCENARIOS = {
  video: createVideo,
  speech: createSpeech,
  generate: (options) => client.images.generate(options),
  generateWithKey: ({ key, ...options }) =>
    client.images.generate(options, { headers: { "Idempotency-Key": key } }),
  edit: async (options) => client.images.edit(await withFiles(options)),
  stream: async (options) => collect(await client.images.generate({ ...options, stream: true })),
  streamEdit: async (options) =>
    collect(await client.images.edit({ ...(await withFiles(options)), stream: true })),
  models: () => collect(client.models.list()),
  model: ({ id }) => client.models.retrieve(id),
};

async function play(options) {
  try {
    return { result: await SCENARIOS[scenario](options) };
  } catch (error) {
    const { status, code, param, type, message, requestID } = error;
    const { name } = error.constructor;
    return { error: { name, status, code, param, type, message, requestID } };
  }
}

process.stdout.write(`${JSON.stringify(await play(await json(process.stdin)))}\n`);
