/**
 * Plays OpenAI's own client against the proxy:
 *
 *     GATEWAY=<origin> ACCESS_KEY=<secret> node openai.mjs <scenario>
 *
 * Standard input is the options of the call, as JSON; the last line of the output is what came of
 * it, or the error, as JSON too.
 */
import { json } from "node:stream/consumers";
import OpenAI, { toFile } from "openai";

const [scenario] = process.argv.slice(2);
const { GATEWAY: gateway, ACCESS_KEY: apiKey } = process.env;

const client = new OpenAI({ baseURL: `${gateway}/v1`, apiKey });

const file = (base64, place) =>
  toFile(Buffer.from(base64, "base64"), `${place}.png`, { type: "image/png" });

/** Files come as base64: one, or a list. */
async function withFiles({ image, mask, ...options }) {
  if (image !== undefined) {
    options.image = Array.isArray(image)
      ? await Promise.all(image.map(file))
      : await file(image, "image");
  }
  if (mask !== undefined) options.mask = await file(mask, "mask");
  return options;
}

async function events(stream) {
  const seen = [];
  for await (const event of stream) seen.push(event);
  return seen;
}

const SCENARIOS = {
  generate: (options) => client.images.generate(options),
  edit: async (options) => client.images.edit(await withFiles(options)),
  stream: async (options) => events(await client.images.generate({ ...options, stream: true })),
  streamEdit: async (options) =>
    events(await client.images.edit({ ...(await withFiles(options)), stream: true })),
  models: () => events(client.models.list()),
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
