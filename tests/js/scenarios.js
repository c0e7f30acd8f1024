/**
 * Scenarios: uses of @fal-ai/client, one exported function each. They run in Node and in browsers,
 * and return results that the tests in Python check.
 *
 * Every scenario takes `{fal, gateway, statuses}`: the configured client, the gateway's origin, and
 * the list of HTTP statuses that the client has received. The result must be serializable as JSON.
 */
const DEV = "fal-ai/flux/dev";
const KONTEXT = "fal-ai/flux-pro/kontext";
const SCHNELL = "fal-ai/flux/schnell";
const LIGHTNING = "fal-ai/fast-lightning-sdxl";
const EDIT = { prompt: "make it winter", seed: 21 };
const SLOW = { prompt: "!delay 1.2 make it winter" };
const HERON = { prompt: "a heron at dawn", seed: 7, image_size: "square" };
const POLLING = { mode: "polling", pollInterval: 20 };

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
    // A copy: in streaming mode the client appends to the list of logs later.
    onQueueUpdate: (update) => updates.push(structuredClone(update)),
  });
  return { ...result, enqueued, updates };
}

export async function submitStatusResult({ fal }) {
  const submitted = await fal.queue.submit(DEV, { input: { prompt: "a red kite", seed: 3 } });
  const requestId = submitted.request_id;
  const last = await waitForCompletion(fal, DEV, requestId);
  return { submitted, last, result: await fal.queue.result(DEV, { requestId }) };
}

export async function cancelRunning({ fal }) {
  const { request_id: requestId } = await fal.queue.submit(DEV, {
    input: { prompt: "!delay 5 a slow sunset" },
  });
  await waitForStatus(fal, DEV, requestId, "IN_PROGRESS");
  const cancelledAt = performance.now();
  await fal.queue.cancel(DEV, { requestId });
  await waitForCompletion(fal, DEV, requestId);
  const milliseconds = performance.now() - cancelledAt;
  return { requestId, milliseconds, error: await errorOf(fal.queue.result(DEV, { requestId })) };
}

export async function cancelTooLate({ fal }) {
  const { requestId } = await fal.subscribe(DEV, { input: { prompt: "a quick fox" } });
  return errorOf(fal.queue.cancel(DEV, { requestId }));
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
  return errorOf(stream.done());
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

/** A Blob as an input: the client uploads it and sends its URL. */
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
  return errorOf(fal.run(DEV, { input: { prompt: "a cat", guidance_scale: 99 } }));
}

export async function contentPolicy({ fal }) {
  return errorOf(fal.run(DEV, { input: { prompt: "!error 422 content_policy_violation" } }));
}

/** In the queue the submit succeeds, and the result is the error. */
export async function contentPolicyInQueue({ fal }) {
  const input = { prompt: "!error 422 content_policy_violation" };
  return errorOf(fal.subscribe(DEV, { input, pollInterval: 20 }));
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
  const error = await errorOf(
    fal.run(DEV, {
      input: { prompt: "!delay 5 an aborted storm" },
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
        input: { prompt: `image number ${seed}`, seed, image_size: "square" },
        pollInterval: 100,
        onQueueUpdate: ({ queue_position: position }) => positions.push(position ?? 0),
      }),
    ),
  );
  return { results, longestWait: Math.max(...positions) };
}

/** A host whose name ends like fal's. The client accepts it, the proxy must not. */
export async function lookalikeHost({ fal }) {
  return errorOf(fal.run("https://notfal.run/fal-ai/flux/dev", { input: { prompt: "a wolf" } }));
}

/** The same edit with its image in every form, by every method of the client. */
export async function editInAllWays({ fal, gateway }) {
  const photo = await fixture(gateway, "photo.png");
  const images = {
    upload: await fal.storage.upload(photo),
    data: await dataUri(photo),
    blob: photo,
  };
  const edits = [];
  for (const [form, image] of Object.entries(images)) {
    for (const [way, edit] of Object.entries(METHODS)) {
      edits.push({ form, way, ...(await edit(fal, { ...EDIT, image_url: image })) });
    }
  }
  return edits;
}

export async function editWithAnotherSeed({ fal, gateway }) {
  const image = await dataUri(await fixture(gateway, "photo.png"));
  return fal.run(KONTEXT, { input: { ...EDIT, seed: 22, image_url: image } });
}

/** Run an edit twice, and call all queue methods for the second. */
export async function askAboutAnEdit({ fal, gateway, statuses }) {
  const input = await editInput(gateway);
  const first = await METHODS.polling(fal, input);
  const polled = await METHODS.polling(fal, input);
  const streamed = await METHODS.streaming(fal, input);
  const submitted = await fal.queue.submit(KONTEXT, { input });
  const requestId = submitted.request_id;
  await waitForCompletion(fal, KONTEXT, requestId);
  statuses.length = 0;
  const responses = {
    status: await fal.queue.status(KONTEXT, { requestId }),
    statusWithLogs: await fal.queue.status(KONTEXT, { requestId, logs: true }),
    events: await eventsOf(fal, requestId),
    result: await fal.queue.result(KONTEXT, { requestId }),
    cancel: await errorOf(fal.queue.cancel(KONTEXT, { requestId })),
    resultAfterwards: await fal.queue.result(KONTEXT, { requestId }),
  };
  return { first, polled, streamed, submitted, ...responses, statuses };
}

/** Of two requests that share a job, cancel the one with fal's request id. */
export async function shareAndCancelTheFirst({ fal, gateway }) {
  return shareAndCancel(fal, gateway, 0);
}

export async function shareAndCancelTheSecond({ fal, gateway }) {
  return shareAndCancel(fal, gateway, 1);
}

async function shareAndCancel(fal, gateway, index) {
  const ids = await submitTwice(fal, gateway);
  const [requestId] = ids.splice(index, 1);
  await fal.queue.cancel(KONTEXT, { requestId });
  const cancelled = {
    last: await waitForCompletion(fal, KONTEXT, requestId),
    events: await eventsOf(fal, requestId),
    error: await errorOf(fal.queue.result(KONTEXT, { requestId })),
    again: await errorOf(fal.queue.cancel(KONTEXT, { requestId })),
  };
  const kept = { requestId: ids[0] };
  const last = await waitForCompletion(fal, KONTEXT, kept.requestId);
  return { requestId, cancelled, kept: { last, ...(await fal.queue.result(KONTEXT, kept)) } };
}

export async function shareAndCancelBoth({ fal, gateway }) {
  const ids = await submitTwice(fal, gateway);
  const results = [];
  for (const requestId of ids) {
    await fal.queue.cancel(KONTEXT, { requestId });
  }
  for (const requestId of ids) {
    const last = await waitForCompletion(fal, KONTEXT, requestId);
    results.push({ last, error: await errorOf(fal.queue.result(KONTEXT, { requestId })) });
  }
  return results;
}

/**
 * Return the ids of two identical concurrent submits, fal's own first: its UUIDs are of version 4.
 */
async function submitTwice(fal, gateway) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const submits = [1, 2].map(() => fal.queue.submit(KONTEXT, { input }));
  const ids = (await Promise.all(submits)).map((submitted) => submitted.request_id);
  return ids.sort((one, other) => one[14] - other[14]);
}

export async function editSlowly({ fal, gateway }) {
  return METHODS.streaming(fal, { ...(await editInput(gateway)), ...SLOW });
}

/** The same edit by every method, concurrently. The first one uses the queue. */
export async function editInAllWaysAtOnce({ fal, gateway }) {
  return startInOrder(fal, gateway, ["queue", "polling", "streaming", "run"]);
}

/** The same, but the first one is a direct call, which has no request id in the queue. */
export async function editByRunFirst({ fal, gateway }) {
  return startInOrder(fal, gateway, ["run", "queue", "polling", "streaming"]);
}

/** Start the same edit by several methods, 80 ms apart; the first one leads by more. */
async function startInOrder(fal, gateway, methods) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const edits = [];
  for (const method of methods) {
    edits.push(METHODS[method](fal, input));
    await new Promise((resolve) => setTimeout(resolve, edits.length === 1 ? 400 : 80));
  }
  return Promise.all(edits);
}

/** Cancel a submit that waits for an identical run. */
export async function cancelWhatWaitsForARun({ fal, gateway }) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const running = fal.run(KONTEXT, { input });
  await new Promise((resolve) => setTimeout(resolve, 150));
  const { request_id: requestId } = await fal.queue.submit(KONTEXT, { input });
  const before = await fal.queue.status(KONTEXT, { requestId });
  await fal.queue.cancel(KONTEXT, { requestId });
  const last = await fal.queue.status(KONTEXT, { requestId });
  const error = await errorOf(fal.queue.result(KONTEXT, { requestId }));
  return { before, last, error, run: await running };
}

/** Abort the first of three identical runs. */
export async function abortTheFirstOfEqualRuns({ fal, gateway }) {
  return abortOne(gateway, 0, (input, options) => fal.run(KONTEXT, { input, ...options }));
}

export async function abortALaterOneOfEqualRuns({ fal, gateway }) {
  return abortOne(gateway, 1, (input, options) => fal.run(KONTEXT, { input, ...options }));
}

export async function abortTheFirstOfEqualSubscriptions({ fal, gateway }) {
  const subscribe = (input, options) => fal.subscribe(KONTEXT, { input, ...options, ...POLLING });
  return abortOne(gateway, 0, subscribe);
}

export async function abortALaterOneOfEqualSubscriptions({ fal, gateway }) {
  const subscribe = (input, options) => fal.subscribe(KONTEXT, { input, ...options, ...POLLING });
  return abortOne(gateway, 1, subscribe);
}

async function abortOne(gateway, index, call) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const controller = new AbortController();
  const calls = [];
  for (const n of [0, 1, 2]) {
    const signal = n === index ? controller.signal : undefined;
    calls.push(call(input, { abortSignal: signal }));
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  const failing = errorOf(calls[index]);
  controller.abort();
  const others = await Promise.all(calls.filter((_, n) => n !== index));
  return { error: await failing, others };
}

/** Abort a run, and run the same again. */
export async function abortAndEditAgain({ fal, gateway }) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const controller = new AbortController();
  const failing = errorOf(fal.run(KONTEXT, { input, abortSignal: controller.signal }));
  setTimeout(() => controller.abort(), 300);
  return { error: await failing, again: await fal.run(KONTEXT, { input }) };
}

/** Edit a file that is not an image, and a URL of a private address, by every method. */
export async function editInvalidImages({ fal }) {
  const images = { page: await dataUri(htmlAsImage()), inside: "http://127.0.0.1:9/photo.png" };
  const failures = [];
  for (const [form, image] of Object.entries(images)) {
    for (const [way, edit] of Object.entries(METHODS)) {
      const error = await errorOf(edit(fal, { ...EDIT, image_url: image }));
      failures.push({ form, way, ...error });
    }
  }
  return failures;
}

export async function editAnUploadedPage({ fal }) {
  return errorOf(fal.run(KONTEXT, { input: { ...EDIT, image_url: htmlAsImage() } }));
}

/** Generate the same image by every method, and another one as the end of a stream. */
export async function makeInAllWays({ fal }) {
  const input = HERON;
  const results = { run: await fal.run(DEV, { input }) };
  results.polling = await fal.subscribe(DEV, { input, ...POLLING });
  results.streaming = await fal.subscribe(DEV, { input, mode: "streaming" });
  const { request_id: requestId } = await fal.queue.submit(DEV, { input });
  await waitForCompletion(fal, DEV, requestId);
  results.submit = await fal.queue.result(DEV, { requestId });
  results.result = await fal.queue.result(DEV, { requestId });
  results.stream = { data: await (await fal.stream(SCHNELL, { input })).done() };
  return Object.entries(results).map(([way, { data, requestId: id }]) => ({ way, id, data }));
}

/** Submit a job and fetch its result once. */
export async function makeByQueue({ fal, gateway }) {
  const { endpoint, ...input } = await fetchParameters(gateway);
  const { request_id: id } = await fal.queue.submit(endpoint, { input });
  await waitForCompletion(fal, endpoint, id);
  const { data } = await fal.queue.result(endpoint, { requestId: id });
  return { id, data };
}

export async function resultOf({ fal, gateway }) {
  const { endpoint, request_id: requestId } = await fetchParameters(gateway);
  return (await fal.queue.result(endpoint, { requestId })).data;
}

export async function resultFiftyTimes({ fal }) {
  const { request_id: requestId } = await fal.queue.submit(DEV, { input: HERON });
  await waitForCompletion(fal, DEV, requestId);
  const requests = Array.from({ length: 50 }, () => fal.queue.result(DEV, { requestId }));
  return (await Promise.all(requests)).map(({ data }) => data);
}

/** Generate an image, and edit it twice in the same way. */
export async function editWhatWasMade({ fal }) {
  const { data: made } = await fal.run(DEV, { input: HERON });
  const input = { ...EDIT, image_url: made.images[0].url };
  const { data: edited } = await fal.subscribe(KONTEXT, { input, ...POLLING });
  const { data: again } = await fal.run(KONTEXT, { input });
  return { made, edited, again };
}

export async function makeByRun({ fal, gateway }) {
  const { endpoint, ...input } = await fetchParameters(gateway);
  return (await fal.run(endpoint, { input })).data;
}

export async function runError({ fal, gateway }) {
  const { endpoint, ...input } = await fetchParameters(gateway);
  return errorOf(fal.run(endpoint, { input }));
}

export async function resultError({ fal, gateway }) {
  const { endpoint, ...input } = await fetchParameters(gateway);
  const { request_id: requestId } = await fal.queue.submit(endpoint, { input });
  await waitForCompletion(fal, endpoint, requestId);
  const error = await withShortDelays(() => errorOf(fal.queue.result(endpoint, { requestId })));
  return { id: requestId, ...error };
}

export async function endlessStream({ fal, gateway }) {
  const stream = await fal.stream(SCHNELL, { input: await fetchParameters(gateway) });
  let events = 0;
  stream.on("data", () => (events += 1));
  return { ...(await errorOf(stream.done())), events };
}

/** Show a generated image. Runs in a page only. */
export async function showImage({ fal }) {
  const { data } = await fal.run(DEV, { input: HERON });
  const image = document.body.appendChild(new Image());
  image.src = data.images[0].url;
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  return { data, page: location.origin, width, height };
}

const METHODS = {
  polling: (fal, input) => subscribeWithUpdates(fal, input, POLLING),
  streaming: (fal, input) => subscribeWithUpdates(fal, input, { mode: "streaming" }),
  queue: async (fal, input) => {
    const { request_id: requestId } = await fal.queue.submit(KONTEXT, { input });
    await waitForCompletion(fal, KONTEXT, requestId);
    return fal.queue.result(KONTEXT, { requestId });
  },
  run: (fal, input) => fal.run(KONTEXT, { input }),
};

async function subscribeWithUpdates(fal, input, options) {
  const updates = [];
  let enqueued;
  const result = await fal.subscribe(KONTEXT, {
    ...options,
    input,
    logs: true,
    onEnqueue: (requestId) => (enqueued = requestId),
    onQueueUpdate: (update) => updates.push(structuredClone(update)),
  });
  return { ...result, enqueued, updates };
}

/** Return the scenario's parameters from the test: an endpoint with an input, or a request id. */
async function fetchParameters(gateway) {
  return (await fetch(`${gateway}/fixtures/order.json`)).json();
}

/** Call a function while the client's retry delays are milliseconds instead of seconds. */
async function withShortDelays(action) {
  const { setTimeout } = globalThis;
  // Timers of Node's fetch are shorter or have an argument: they are not changed.
  globalThis.setTimeout = (callback, delay, ...args) =>
    setTimeout(callback, delay > 500 && args.length === 0 ? delay / 100 : delay, ...args);
  try {
    return await action();
  } finally {
    globalThis.setTimeout = setTimeout;
  }
}

async function editInput(gateway) {
  return { ...EDIT, image_url: await dataUri(await fixture(gateway, "photo.png")) };
}

async function eventsOf(fal, requestId) {
  const stream = await fal.queue.streamStatus(KONTEXT, { requestId, logs: true });
  const events = [];
  stream.on("data", (event) => events.push(event));
  await stream.done();
  return events;
}

/** Return an HTML page with the content type of an image. */
function htmlAsImage() {
  return new Blob(["<!doctype html><title>Not Found</title>"], { type: "image/png" });
}

async function dataUri(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const letters = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return `data:${blob.type};base64,${btoa(letters)}`;
}

async function waitForStatus(fal, endpoint, requestId, ...wanted) {
  for (;;) {
    const status = await fal.queue.status(endpoint, { requestId, logs: true });
    if (wanted.includes(status.status)) {
      return status;
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

async function waitForCompletion(fal, endpoint, requestId) {
  return waitForStatus(fal, endpoint, requestId, "COMPLETED");
}

async function fixture(gateway, name) {
  const response = await fetch(`${gateway}/fixtures/${name}`);
  return response.blob();
}

/** Return the error that a promise rejects with, as JSON, or null. */
async function errorOf(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    const { name, message, status, requestId, body, fieldErrors } = error;
    return { name, message, status, requestId, body, fieldErrors };
  }
}
