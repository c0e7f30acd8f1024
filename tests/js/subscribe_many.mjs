/**
 * Subscribes to many jobs at once, with the client's own rules for retries:
 * GATEWAY=<origin> ACCESS_KEY=<key> CALLS=<number> node subscribe_many.mjs
 * The output is a list of errors, null for each call that succeeded.
 */
import { fal } from "@fal-ai/client";

const { GATEWAY, ACCESS_KEY, CALLS } = process.env;

fal.config({
  proxyUrl: { url: `${GATEWAY}/api/fal/proxy`, when: "always" },
  credentials: ACCESS_KEY,
  suppressLocalCredentialsWarning: true,
});

async function subscribe(number) {
  await new Promise((resolve) => setTimeout(resolve, 100 * number));
  const prompt = `!delay ${2 + (number % 4)} js ${number}`;
  const input = { prompt, image_size: { width: 64, height: 64 } };
  try {
    await fal.subscribe("fal-ai/flux/dev", { input });
    return null;
  } catch (error) {
    return `${error.status ?? ""} ${error.message} ${JSON.stringify(error.body ?? null)}`;
  }
}

const errors = await Promise.all([...Array(Number(CALLS)).keys()].map(subscribe));
process.stdout.write(`${JSON.stringify(errors)}\n`, () => process.exit(0));
