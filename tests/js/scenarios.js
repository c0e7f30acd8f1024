/**
 * What an app does with @fal-ai/client, one function a thing. The same code runs in Node and in a
 * browser, and only reports: what is right and what is wrong is decided by the tests in Python.
 *
 * Every scenario takes `{fal, gateway, statuses}`: the configured client, the gateway's origin, and
 * the HTTP statuses that the client has seen so far. What it returns must survive JSON.
 */
const DEV = "fal-ai/flux/dev";
const KONTEXT = "fal-ai/flux-pro/kontext";
const SCHNELL = "fal-ai/flux/schnell";
const LIGHTNING = "fal-ai/fast-lightning-sdxl";

export async function run({ fal }) {
  return fal.run(DEV, { input: { prompt: "a heron at dawn", seed: 7, image_size: "square" } });
}

export async function subscribeByPolling({ fal }) {
  return subscribe(fal, { mode: "polling", pollInterval: 20 });
}

export async function subscribeByStreaming({ fal }) {
  return subscribe(fal, { mode: "streaming" });
}

async function subscribe(fal, options) {
  const updates = [];
  let enqueued;
  const result = await fal.subscribe(DEV, {
    ...options,
    input: { prompt: "!delay 0.4 a paper boat on a river", seed: 11 },
    logs: true,
    onEnqueue: (requestId) => (enqueued = requestId),
    // A copy: in streaming mode the client goes on adding to the list of logs that it handed out.
    onQueueUpdate: (update) => updates.push(structuredClone(update)),
  });
  return { ...result, enqueued, updates };
}

export async function submitStatusResult({ fal }) {
  const submitted = await fal.queue.submit(DEV, { input: { prompt: "a red kite", seed: 3 } });
  const requestId = submitted.request_id;
  const last = await completed(fal, DEV, requestId);
  return { submitted, last, result: await fal.queue.result(DEV, { requestId }) };
}

export async function cancelRunning({ fal }) {
  const { request_id: requestId } = await fal.queue.submit(DEV, {
    input: { prompt: "!delay 5 a slow sunset" },
  });
  await reached(fal, DEV, requestId, "IN_PROGRESS");
  const cancelledAt = performance.now();
  await fal.queue.cancel(DEV, { requestId });
  await completed(fal, DEV, requestId);
  const milliseconds = performance.now() - cancelledAt;
  return { requestId, milliseconds, error: await failure(fal.queue.result(DEV, { requestId })) };
}

export async function cancelTooLate({ fal }) {
  const { requestId } = await fal.subscribe(DEV, { input: { prompt: "a quick fox" } });
  return failure(fal.queue.cancel(DEV, { requestId }));
}

export async function stream({ fal }) {
  const stream = await fal.stream(SCHNELL, { input: { prompt: "!delay 1 a storm", seed: 5 } });
  const startedAt = performance.now();
  const arrivals = [];
  stream.on("data", () => arrivals.push(performance.now() - startedAt));
  const data = await stream.done();
  return { data, arrivals, finished: performance.now() - startedAt };
}

export async function streamedError({ fal }) {
  const stream = await fal.stream(SCHNELL, { input: { prompt: "a storm", guidance_scale: 99 } });
  return failure(stream.done());
}

export async function uploadPhoto({ fal, gateway }) {
  return fal.storage.upload(await fixture(gateway, "photo.png"));
}

export async function uploadInParts({ fal, gateway }) {
  return fal.storage.upload(await fixture(gateway, "large.bin"));
}

export async function editUpload({ fal, gateway }) {
  const imageUrl = await fal.storage.upload(await fixture(gateway, "photo.png"));
  const input = { prompt: "make it winter", image_url: imageUrl, seed: 21 };
  return { imageUrl, ...(await fal.subscribe(KONTEXT, { input, pollInterval: 20 })) };
}

/** A Blob as an input: the client uploads it by itself and sends its URL. */
export async function editBlob({ fal, gateway }) {
  const input = {
    prompt: "make it summer",
    image_url: await fixture(gateway, "photo.png"),
    seed: 22,
  };
  return fal.run(KONTEXT, { input });
}

export async function realtime({ fal }) {
  return new Promise((resolve, reject) => {
    const connection = fal.realtime.connect(LIGHTNING, {
      throttleInterval: 0,
      onResult: (result) => {
        connection.close();
        resolve(result);
      },
      onError: reject,
    });
    connection.send({ prompt: "a neon street", seed: 9 });
  });
}

export async function invalidField({ fal }) {
  return failure(fal.run(DEV, { input: { prompt: "a cat", guidance_scale: 99 } }));
}

export async function contentPolicy({ fal }) {
  return failure(fal.run(DEV, { input: { prompt: "!error 422 content_policy_violation" } }));
}

/** Through the queue the submit goes well, and the result brings the error. */
export async function contentPolicyInQueue({ fal }) {
  const input = { prompt: "!error 422 content_policy_violation" };
  return failure(fal.subscribe(DEV, { input, pollInterval: 20 }));
}

export async function retryOf429({ fal, statuses }) {
  const input = { prompt: "!error 429 concurrent_requests_limit times=1 a busy day" };
  const { data } = await fal.run(DEV, { input });
  return { data, statuses };
}

export async function retryOf503({ fal, statuses }) {
  const input = { prompt: "!error 503 runner_connection_error times=2 a broken lamp" };
  const { data } = await fal.run(DEV, { input });
  return { data, statuses };
}

export async function abort({ fal }) {
  const controller = new AbortController();
  const startedAt = performance.now();
  setTimeout(() => controller.abort(), 300);
  const error = await failure(
    fal.run(DEV, {
      input: { prompt: "!delay 5 nobody waits for this" },
      abortSignal: controller.signal,
    }),
  );
  return { error, milliseconds: performance.now() - startedAt };
}

export async function fiftyAtOnce({ fal }) {
  const seeds = Array.from({ length: 50 }, (_, index) => 1000 + index);
  const positions = [];
  const results = await Promise.all(
    seeds.map((seed) =>
      fal.subscribe(DEV, {
        input: { prompt: `picture number ${seed}`, seed, image_size: "square" },
        pollInterval: 100,
        onQueueUpdate: ({ queue_position: position }) => positions.push(position ?? 0),
      }),
    ),
  );
  return { results, longestWait: Math.max(...positions) };
}

/** A host whose name merely ends like fal's. The client lets it pass, the proxy must not. */
export async function lookalikeHost({ fal }) {
  return failure(fal.run("https://notfal.run/fal-ai/flux/dev", { input: { prompt: "a wolf" } }));
}

async function reached(fal, endpoint, requestId, ...wanted) {
  for (;;) {
    const status = await fal.queue.status(endpoint, { requestId, logs: true });
    if (wanted.includes(status.status)) {
      return status;
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

async function completed(fal, endpoint, requestId) {
  return reached(fal, endpoint, requestId, "COMPLETED");
}

async function fixture(gateway, name) {
  const response = await fetch(`${gateway}/fixtures/${name}`);
  return response.blob();
}

/** The error that the promise ends with, as JSON; null when it ends well. */
async function failure(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    const { name, message, status, requestId, body, fieldErrors } = error;
    return { name, message, status, requestId, body, fieldErrors };
  }
}
