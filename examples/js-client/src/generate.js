/** One picture from fal: upload, queue, result. The only module that talks to fal. */
import { fal } from "@fal-ai/client";

fal.config({ proxyUrl: "/api/fal/proxy" });

/** Where a chosen file already lies, so that a second try with it uploads nothing. */
const uploads = new WeakMap();

/**
 * fal's result, `{data, requestId}`. Rejects with the reason of `signal` once that is aborted.
 *
 * `onProgress` gets `{phase: "uploading" | "submitting"}` and then fal's queue statuses,
 * `{phase: "queued", position}` and `{phase: "running", logs}`.
 */
export async function generate({ model, prompt, picture, signal, onProgress }) {
  // What is still on its way after a cancel changes nothing on the page.
  const report = (progress) => signal.aborted || onProgress(progress);
  let imageUrl;
  if (picture) {
    report({ phase: "uploading" });
    imageUrl = await unlessAborted(signal, uploaded(picture));
  }
  report({ phase: "submitting" });
  // A submit is never aborted: a job that nobody knows the id of would run, and cost, regardless.
  const submitted = fal.queue.submit(model.id, { input: model.toInput({ prompt, imageUrl }) });
  cancelOnAbort(signal, model.id, submitted);
  const { request_id: requestId } = await unlessAborted(signal, submitted);
  const completed = fal.queue.subscribeToStatus(model.id, {
    requestId,
    logs: true,
    abortSignal: signal,
    onQueueUpdate: (update) => report(progress(update)),
  });
  await unlessAborted(signal, completed);
  return fal.queue.result(model.id, { requestId, abortSignal: signal });
}

async function uploaded(picture) {
  if (!uploads.has(picture)) {
    uploads.set(picture, await fal.storage.upload(picture));
  }
  return uploads.get(picture);
}

function progress(update) {
  return update.status === "IN_QUEUE"
    ? { phase: "queued", position: update.queue_position }
    : { phase: "running", logs: update.logs ?? [] };
}

function cancelOnAbort(signal, endpoint, submitted) {
  const cancel = async () => {
    try {
      const { request_id: requestId } = await submitted;
      await fal.queue.cancel(endpoint, { requestId });
    } catch {
      // The submit failed, or the job was already over: there is nothing left to cancel.
    }
  };
  signal.addEventListener("abort", cancel, { once: true });
}

/** The promise's outcome, or the reason of `signal` if that comes first. */
function unlessAborted(signal, promise) {
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) {
      abort();
    }
    signal.addEventListener("abort", abort, { once: true });
    promise.then(resolve, reject);
  });
}
