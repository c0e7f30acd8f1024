/** Generation of one image: upload, submit, status, result. The only module that calls fal. */
import { fal } from "@fal-ai/client";

fal.config({ proxyUrl: "/api/fal/proxy" });

/** URLs of uploaded files, so that a second run with the same file does not upload it again. */
const uploadedUrls = new WeakMap();

/**
 * Return fal's result, `{data, requestId}`. Rejects with the reason of `signal` if that is aborted.
 *
 * onProgress: receives `{phase: "uploading" | "submitting"}`, then `{phase: "queued", position}`
 * and `{phase: "running", logs}`.
 */
export async function generate({ model, prompt, image, signal, onProgress }) {
  // Responses that arrive after a cancel are not reported.
  const report = (progress) => signal.aborted || onProgress(progress);
  let imageUrl;
  if (image) {
    report({ phase: "uploading" });
    imageUrl = await unlessAborted(signal, uploadOnce(image));
  }
  report({ phase: "submitting" });
  // The submit is not aborted: fal might run, and charge for, a job whose id is not known here.
  const submitted = fal.queue.submit(model.id, {
    input: model.toInput({ prompt, imageUrl }),
    // fal's client repeats a submit whose response was lost. With a key, the proxy returns the
    // first job again, instead of a second one.
    headers: { "Idempotency-Key": newKey() },
  });
  cancelOnAbort(signal, model.id, submitted);
  const { request_id: requestId } = await unlessAborted(signal, submitted);
  const completed = fal.queue.subscribeToStatus(model.id, {
    requestId,
    logs: true,
    abortSignal: signal,
    onQueueUpdate: (update) => report(progressOf(update)),
  });
  await unlessAborted(signal, completed);
  return fal.queue.result(model.id, { requestId, abortSignal: signal });
}

/** Return a random key. `crypto.randomUUID` exists on pages with TLS and on localhost only. */
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function uploadOnce(file) {
  if (!uploadedUrls.has(file)) {
    uploadedUrls.set(file, await fal.storage.upload(file));
  }
  return uploadedUrls.get(file);
}

function progressOf(update) {
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
      // The submit failed, or the job has ended: there is nothing to cancel.
    }
  };
  signal.addEventListener("abort", cancel, { once: true });
}

/** Settle like `promise`, but reject with the reason of `signal` if that is aborted first. */
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
