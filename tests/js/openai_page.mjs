/**
 * Script of a page of another origin that calls the proxy with OpenAI's client. browser.mjs calls
 * `window.play` in it.
 */
import OpenAI from "openai";

const { proxyUrl, accessKey } = document.currentScript.dataset;

const client = new OpenAI({
  baseURL: `${new URL(proxyUrl).origin}/v1`,
  apiKey: accessKey,
  organization: "org-1",
  dangerouslyAllowBrowser: true,
});

async function photo() {
  const canvas = new OffscreenCanvas(64, 48);
  canvas.getContext("2d").fillRect(0, 0, 32, 48);
  return new File([await canvas.convertToBlob({ type: "image/png" })], "photo.png");
}

const SCENARIOS = {
  models: async () => (await client.models.list()).data.map(({ id }) => id),
  generate: (options) => client.images.generate(options),
  edit: async (options) => client.images.edit({ ...options, image: await photo() }),
  withHeaders: async (options) => {
    const { response } = await client.images.generate(options).withResponse();
    return Object.fromEntries(response.headers);
  },
  stream: async (options) => {
    const types = [];
    for await (const { type } of await client.images.generate({ ...options, stream: true })) {
      types.push(type);
    }
    return types;
  },
};

/** Play the scenario in a name such as `generate {"prompt": "a heron"}`. */
window.play = async (call) => {
  const [, name, options] = call.match(/^(\w+) ?(.*)$/);
  try {
    return { result: await SCENARIOS[name](JSON.parse(options || "{}")) };
  } catch (error) {
    const { status, code, message } = error;
    return { error: { name: error.constructor.name, status, code, message } };
  }
};
