/**
 * Asks for one picture with Vercel's AI SDK, which takes a base URL and knows of no proxy:
 *
 *     GATEWAY=<origin> ACCESS_KEY=<secret> node ai_sdk.mjs <endpoint>
 *
 * Standard input is the options of generateImage, as JSON; the last line of the output is the
 * picture, or the error, as JSON too.
 */
import { json } from "node:stream/consumers";
import { createFal } from "@ai-sdk/fal";
import { generateImage } from "ai";

const [endpoint] = process.argv.slice(2);
const { GATEWAY: gateway, ACCESS_KEY: apiKey } = process.env;

const fal = createFal({ baseURL: `${gateway}/api/fal/run`, apiKey });

async function play(options) {
  try {
    const { image, responses, warnings } = await generateImage({
      model: fal.image(endpoint),
      maxRetries: 0,
      ...options,
    });
    const [{ headers }] = responses;
    return { picture: image.base64, mediaType: image.mediaType, headers, warnings };
  } catch (error) {
    const { name, message, statusCode, isRetryable, data } = error;
    return { error: { name, message, statusCode, isRetryable, data } };
  }
}

process.stdout.write(`${JSON.stringify(await play(await json(process.stdin)))}\n`);
