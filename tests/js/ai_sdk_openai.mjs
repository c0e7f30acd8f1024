/**
 * Generates or edits one image with the AI SDK's provider for OpenAI:
 *
 *     GATEWAY=<origin> ACCESS_KEY=<secret> node ai_sdk_openai.mjs <model>
 *
 * Reads the options of generateImage from stdin, as JSON. The last line of the output is the image
 * or the error, as JSON.
 */
import { json } from "node:stream/consumers";
import { createOpenAI } from "@ai-sdk/openai";
import { generateImage } from "ai";

const [name] = process.argv.slice(2);
const { GATEWAY: gateway, ACCESS_KEY: apiKey } = process.env;

const openai = createOpenAI({ baseURL: `${gateway}/v1`, apiKey });

async function run(options) {
  try {
    const { image, warnings } = await generateImage({ model: openai.image(name), ...options });
    return { image: image.base64, mediaType: image.mediaType, warnings };
  } catch (error) {
    const { name: type, message, statusCode, isRetryable } = error;
    return { error: { name: type, message, statusCode, isRetryable } };
  }
}

process.stdout.write(`${JSON.stringify(await run(await json(process.stdin)))}\n`);
