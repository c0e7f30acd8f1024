/**
 * Submits a job with an Idempotency-Key, as examples/js-client does, and prints its result:
 *
 *     GATEWAY=<origin> node keyed_submit.mjs <endpoint> <prompt>
 */
import { createFalClient } from "@fal-ai/client";

const [endpoint, prompt] = process.argv.slice(2);
const proxyUrl = { url: `${process.env.GATEWAY}/api/fal/proxy`, when: "always" };
const fal = createFalClient({ proxyUrl });
const { request_id: requestId } = await fal.queue.submit(endpoint, {
  input: { prompt },
  headers: { "Idempotency-Key": "k" },
});
await fal.queue.subscribeToStatus(endpoint, { requestId, mode: "polling" });
const { data } = await fal.queue.result(endpoint, { requestId });
process.stdout.write(`${JSON.stringify(data)}\n`);
