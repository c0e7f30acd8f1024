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

/** The same edit with its picture in every form, by every way to call a model. */
export async function editInAllWays({ fal, gateway }) {
  const photo = await fixture(gateway, "photo.png");
  const pictures = {
    upload: await fal.storage.upload(photo),
    data: await dataUri(photo),
    blob: photo,
  };
  const edits = [];
  for (const [form, picture] of Object.entries(pictures)) {
    for (const [way, edit] of Object.entries(WAYS)) {
      edits.push({ form, way, ...(await edit(fal, { ...EDIT, image_url: picture })) });
    }
  }
  return edits;
}

export async function editWithAnotherSeed({ fal, gateway }) {
  const picture = await dataUri(await fixture(gateway, "photo.png"));
  return fal.run(KONTEXT, { input: { ...EDIT, seed: 22, image_url: picture } });
}

/** Makes an edit twice, and asks all there is to ask about the second. */
export async function askAboutAnEdit({ fal, gateway, statuses }) {
  const input = await editInput(gateway);
  const first = await WAYS.polling(fal, input);
  const polled = await WAYS.polling(fal, input);
  const streamed = await WAYS.streaming(fal, input);
  const submitted = await fal.queue.submit(KONTEXT, { input });
  const requestId = submitted.request_id;
  await completed(fal, KONTEXT, requestId);
  statuses.length = 0;
  const answers = {
    status: await fal.queue.status(KONTEXT, { requestId }),
    statusWithLogs: await fal.queue.status(KONTEXT, { requestId, logs: true }),
    events: await eventsOf(fal, requestId),
    result: await fal.queue.result(KONTEXT, { requestId }),
    cancel: await failure(fal.queue.cancel(KONTEXT, { requestId })),
    resultAfterwards: await fal.queue.result(KONTEXT, { requestId }),
  };
  return { first, polled, streamed, submitted, ...answers, statuses };
}

/** Of two that share a job, the one that has it from fal cancels. */
export async function shareAndCancelTheFirst({ fal, gateway }) {
  return shareAndCancel(fal, gateway, 0);
}

export async function shareAndCancelTheSecond({ fal, gateway }) {
  return shareAndCancel(fal, gateway, 1);
}

async function shareAndCancel(fal, gateway, place) {
  const ids = await shared(fal, gateway);
  const [requestId] = ids.splice(place, 1);
  await fal.queue.cancel(KONTEXT, { requestId });
  const cancelled = {
    last: await completed(fal, KONTEXT, requestId),
    events: await eventsOf(fal, requestId),
    error: await failure(fal.queue.result(KONTEXT, { requestId })),
    again: await failure(fal.queue.cancel(KONTEXT, { requestId })),
  };
  const kept = { requestId: ids[0] };
  const last = await completed(fal, KONTEXT, kept.requestId);
  return { requestId, cancelled, kept: { last, ...(await fal.queue.result(KONTEXT, kept)) } };
}

export async function shareAndCancelBoth({ fal, gateway }) {
  const ids = await shared(fal, gateway);
  const ends = [];
  for (const requestId of ids) {
    await fal.queue.cancel(KONTEXT, { requestId });
  }
  for (const requestId of ids) {
    const last = await completed(fal, KONTEXT, requestId);
    ends.push({ last, error: await failure(fal.queue.result(KONTEXT, { requestId })) });
  }
  return ends;
}

/** The ids of two equal submits at once, fal's own first: its UUIDs are of version 4. */
async function shared(fal, gateway) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const submits = [1, 2].map(() => fal.queue.submit(KONTEXT, { input }));
  const ids = (await Promise.all(submits)).map((submitted) => submitted.request_id);
  return ids.sort((one, other) => one[14] - other[14]);
}

export async function editSlowly({ fal, gateway }) {
  return WAYS.streaming(fal, { ...(await editInput(gateway)), ...SLOW });
}

/** The same edit by every way at once; what goes through the queue is there first. */
export async function editInAllWaysAtOnce({ fal, gateway }) {
  return inTurn(gateway, [WAYS.queue, WAYS.polling, WAYS.streaming, WAYS.run], fal);
}

/** As before, but a direct call is first, which has no job that others could ask about. */
export async function editByRunFirst({ fal, gateway }) {
  return inTurn(gateway, [WAYS.run, WAYS.queue, WAYS.polling, WAYS.streaming], fal);
}

async function inTurn(gateway, ways, fal) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const edits = [];
  for (const way of ways) {
    edits.push(way(fal, input));
    await new Promise((resolve) => setTimeout(resolve, 80));
  }
  return Promise.all(edits);
}

/** A submit that waits for an equal run, and is cancelled. */
export async function cancelWhatWaitsForARun({ fal, gateway }) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const running = fal.run(KONTEXT, { input });
  await new Promise((resolve) => setTimeout(resolve, 150));
  const { request_id: requestId } = await fal.queue.submit(KONTEXT, { input });
  const before = await fal.queue.status(KONTEXT, { requestId });
  await fal.queue.cancel(KONTEXT, { requestId });
  const last = await fal.queue.status(KONTEXT, { requestId });
  const error = await failure(fal.queue.result(KONTEXT, { requestId }));
  return { before, last, error, run: await running };
}

/** Three equal runs, of which the one that was first is aborted. */
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

async function abortOne(gateway, place, call) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const controller = new AbortController();
  const calls = [];
  for (const at of [0, 1, 2]) {
    const signal = at === place ? controller.signal : undefined;
    calls.push(call(input, { abortSignal: signal }));
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  const failing = failure(calls[place]);
  controller.abort();
  const others = await Promise.all(calls.filter((_, at) => at !== place));
  return { error: await failing, others };
}

/** A run that is aborted, and the same once more. */
export async function abortAndEditAgain({ fal, gateway }) {
  const input = { ...(await editInput(gateway)), ...SLOW };
  const controller = new AbortController();
  const failing = failure(fal.run(KONTEXT, { input, abortSignal: controller.signal }));
  setTimeout(() => controller.abort(), 300);
  return { error: await failing, again: await fal.run(KONTEXT, { input }) };
}

/** What is no picture, or nobody's to read, in every way to call a model. */
export async function editWhatIsNoPicture({ fal }) {
  const pictures = { page: await dataUri(page()), inside: "http://127.0.0.1:9/photo.png" };
  const failures = [];
  for (const [form, picture] of Object.entries(pictures)) {
    for (const [way, edit] of Object.entries(WAYS)) {
      const error = await failure(edit(fal, { ...EDIT, image_url: picture }));
      failures.push({ form, way, ...error });
    }
  }
  return failures;
}

export async function editAnUploadedPage({ fal }) {
  return failure(fal.run(KONTEXT, { input: { ...EDIT, image_url: page() } }));
}

/** The same picture by every way to call a model, and one more as the end of a stream. */
export async function makeInAllWays({ fal }) {
  const input = HERON;
  const made = { run: await fal.run(DEV, { input }) };
  made.polling = await fal.subscribe(DEV, { input, ...POLLING });
  made.streaming = await fal.subscribe(DEV, { input, mode: "streaming" });
  const { request_id: requestId } = await fal.queue.submit(DEV, { input });
  await completed(fal, DEV, requestId);
  made.submit = await fal.queue.result(DEV, { requestId });
  made.result = await fal.queue.result(DEV, { requestId });
  made.stream = { data: await (await fal.stream(SCHNELL, { input })).done() };
  return Object.entries(made).map(([way, { data, requestId: id }]) => ({ way, id, data }));
}

/** Its result is fetched once. */
export async function makeByQueue({ fal, gateway }) {
  const { endpoint, ...input } = await orderOf(gateway);
  const { request_id: id } = await fal.queue.submit(endpoint, { input });
  await completed(fal, endpoint, id);
  const { data } = await fal.queue.result(endpoint, { requestId: id });
  return { id, data };
}

export async function resultOf({ fal, gateway }) {
  const { endpoint, request_id: requestId } = await orderOf(gateway);
  return (await fal.queue.result(endpoint, { requestId })).data;
}

export async function resultFiftyTimes({ fal }) {
  const { request_id: requestId } = await fal.queue.submit(DEV, { input: HERON });
  await completed(fal, DEV, requestId);
  const asked = Array.from({ length: 50 }, () => fal.queue.result(DEV, { requestId }));
  return (await Promise.all(asked)).map(({ data }) => data);
}

/** Makes a picture, and edits what was made, twice the same. */
export async function editWhatWasMade({ fal }) {
  const { data: made } = await fal.run(DEV, { input: HERON });
  const input = { ...EDIT, image_url: made.images[0].url };
  const { data: edited } = await fal.subscribe(KONTEXT, { input, ...POLLING });
  const { data: again } = await fal.run(KONTEXT, { input });
  return { made, edited, again };
}

export async function makeByRun({ fal, gateway }) {
  const { endpoint, ...input } = await orderOf(gateway);
  return (await fal.run(endpoint, { input })).data;
}

export async function runError({ fal, gateway }) {
  const { endpoint, ...input } = await orderOf(gateway);
  return failure(fal.run(endpoint, { input }));
}

export async function resultError({ fal, gateway }) {
  const { endpoint, ...input } = await orderOf(gateway);
  const { request_id: requestId } = await fal.queue.submit(endpoint, { input });
  await completed(fal, endpoint, requestId);
  const error = await hurried(() => failure(fal.queue.result(endpoint, { requestId })));
  return { id: requestId, ...error };
}

export async function endlessStream({ fal, gateway }) {
  const stream = await fal.stream(SCHNELL, { input: await orderOf(gateway) });
  let events = 0;
  stream.on("data", () => (events += 1));
  return { ...(await failure(stream.done())), events };
}

/** In a page only: what was made is put on it. */
export async function showPicture({ fal }) {
  const { data } = await fal.run(DEV, { input: HERON });
  const picture = document.body.appendChild(new Image());
  picture.src = data.images[0].url;
  await picture.decode();
  const { naturalWidth: width, naturalHeight: height } = picture;
  return { data, page: location.origin, width, height };
}

const WAYS = {
  polling: (fal, input) => watched(fal, input, POLLING),
  streaming: (fal, input) => watched(fal, input, { mode: "streaming" }),
  queue: async (fal, input) => {
    const { request_id: requestId } = await fal.queue.submit(KONTEXT, { input });
    await completed(fal, KONTEXT, requestId);
    return fal.queue.result(KONTEXT, { requestId });
  },
  run: (fal, input) => fal.run(KONTEXT, { input }),
};

async function watched(fal, input, options) {
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

/** What the test wants of a scenario: the endpoint and the input of a call, or a request. */
async function orderOf(gateway) {
  return (await fetch(`${gateway}/fixtures/order.json`)).json();
}

/** Meanwhile the client's pauses between attempts, which are of seconds, are of milliseconds. */
async function hurried(action) {
  const { setTimeout } = globalThis;
  // Those of Node's own fetch are shorter, or come with an argument.
  globalThis.setTimeout = (call, delay, ...given) =>
    setTimeout(call, delay > 500 && given.length === 0 ? delay / 100 : delay, ...given);
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

/** A web page that says it is a picture. */
function page() {
  return new Blob(["<!doctype html><title>Not Found</title>"], { type: "image/png" });
}

async function dataUri(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const letters = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return `data:${blob.type};base64,${btoa(letters)}`;
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
