/**
 * Generates one image with Vercel's AI SDK, which supports a base URL but no proxy:
 *
 *     GATEWAY=<origin> ACCESS_KEY=<secret> node ai_sdk.mjs <endpoint>
 *
 * Reads the options of generateImage from stdin, as JSON. The last line of the output is the image
 * or the error, as JSON.
 */
import { json } from "node:stream/consumers";
import { createFal } from "@ai-sdk/fal";
import { generateImage } from "ai";

const [endpoint] = process.argv.slice(2);
const { GATEWAY: gateway, ACCESS_KEY: apiKey } = process.env;

const fal = createFal({ baseURL: `${gateway}/api/fal/run`, apiKey });

async function run(options) {
  try {
    const { image, responses, warnings } = await generateImage({
      model: fal.image(endpoint),
      maxRetries: 0,
      ...options,
    });
    const [{ headers }] = responses;
    return { image: image.base64, mediaType: image.mediaType, headers, warnings };
  } catch (error) {
    const { name, message, statusCode, isRetryable, data } = error;
    return { error: { name, message, statusCode, isRetryable, data } };
  }
}

process.stdout.write(`${JSON.stringify(await run(await json(process.stdin)))}\n`);
