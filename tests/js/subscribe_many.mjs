/**
 * Subscribes to many jobs at once, with the client's own rules for retries:
 * GATEWAY=<origin> ACCESS_KEY=<key> CALLS=<number> SHARED_BY=<number> node subscribe_many.mjs
 * SHARED_BY: calls in a row that are equal; 0 if all calls of all clients differ.
 * The output is a list of errors, null for each call that succeeded.
 */
import { fal } from "@fal-ai/client";

const { GATEWAY, ACCESS_KEY, CALLS, SHARED_BY } = process.env;

fal.config({
  proxyUrl: { url: `${GATEWAY}/api/fal/proxy`, when: "always" },
  credentials: ACCESS_KEY,
  suppressLocalCredentialsWarning: true,
});

async function subscribe(number) {
  await new Promise((resolve) => setTimeout(resolve, 100 * number));
  const group = Number(SHARED_BY) ? Math.floor(number / Number(SHARED_BY)) : number;
  const name = Number(SHARED_BY) ? "shared" : "js";
  const prompt = `!delay ${2 + (group % 4)} ${name} ${group}`;
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
