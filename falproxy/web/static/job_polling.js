/** Polling of a submitted job until it has ended. */
import { safeUrl } from "./dom.js";
import { explainError } from "./error_messages.js";
import { NoResponseError, ResponseError, fetchResult, fetchStatus } from "./fal_client.js";
import { interruptibleSleep } from "./interruptible_sleep.js";
import { kindOf } from "./media.js";

const OUTPUT_MAX = 50_000; // characters of the JSON of a result that is stored
const LOG_LINES_MAX = 200;
const RETRY_DELAY_MAX = 15_000; // ms
const NOT_FOUND_MAX = 4; // 404s before the job counts as failed: a restart may take a moment
const NOT_FOUND_DELAY = 1500; // ms
const RETRIES_MAX = 8; // of a 5xx from fal, before the job counts as failed
const CANCEL_TIMEOUT = 30_000; // ms until a job counts as cancelled without fal's confirmation
const RETRYABLE = new Set([401, 408, 425, 429, 500, 502, 503, 504]); // do not concern the job itself

/**
 * @param {import("./jobs.js").Job} job
 * @param {import("./jobs.js").Jobs} jobs receives each change
 * @returns {Promise<Partial<import("./jobs.js").Job>>} its final state
 */
export async function pollUntilEnded(job, jobs) {
  const poller = new JobPoller(job, jobs);
  let cancelledAt = null;
  for (;;) {
    const status = await poller.requestWithRetries(() => fetchStatus(job.endpoint, job.requestId));
    if (status instanceof ResponseError) {
      return job.isCancelling ? { state: "cancelled" } : failedState(status);
    }
    poller.applyLog(status);
    if (status.status === "COMPLETED") {
      return completedState(status, poller, job);
    }
    await poller.applyStatus(status);
    cancelledAt = job.isCancelling ? (cancelledAt ?? Date.now()) : null;
    if (cancelledAt !== null && Date.now() - cancelledAt > CANCEL_TIMEOUT) {
      return { state: "cancelled" };
    }
    await interruptibleSleep(pollInterval(job));
  }
}

/** ms; long jobs are polled less often. */
function pollInterval(job) {
  const seconds = (Date.now() - job.created) / 1000;
  return seconds < 4 ? 300 : seconds < 15 ? 500 : seconds < 60 ? 1000 : 2000;
}

async function completedState(status, poller, job) {
  const hasFailed = Boolean(status.error) || Boolean(status.error_type);
  // Also that of a cancelled job: with it, the proxy records the end of the job and its cost.
  const result = await poller.requestWithRetries(
    () => fetchResult(job.endpoint, job.requestId),
    hasFailed,
  );
  if (result instanceof ResponseError) {
    const isCancelled =
      result.status === 499 ||
      [status.error_type, result.document?.error_type].includes("client_cancelled");
    return isCancelled ? { state: "cancelled" } : failedState(result);
  }
  const images = resultImages(result);
  if (images.length === 0) {
    const problem = {
      title: "The model's response has no file",
      action: "Choose another model.",
      detail: "",
      fields: [],
    };
    return { state: "failed", problem };
  }
  const isHidden =
    Array.isArray(result.has_nsfw_concepts) && result.has_nsfw_concepts.some(Boolean);
  const seed = Number.isFinite(result.seed) ? result.seed : null;
  const output = JSON.stringify(result).length <= OUTPUT_MAX ? result : null;
  return { state: "done", images, seed, isHidden, output };
}

function failedState(error) {
  return { state: "failed", problem: explainError(error) };
}

/** Return `images`, `image`, or the first other field with objects that have a `url`, such as `video`. */
function resultImages(result) {
  const values = Object.values(result ?? {});
  const candidates = [result?.images, result?.image, ...values].map((value) =>
    [value].flat().filter((item) => safeUrl(item?.url) !== null),
  );
  const images = candidates.find((items) => items.length > 0) ?? [];
  return images.map(({ url, width, height, ...file }) => ({
    url: safeUrl(url),
    kind: kindOf({ url, ...file }),
    width: Number.isFinite(width) ? width : null,
    height: Number.isFinite(height) ? height : null,
  }));
}

class JobPoller {
  #notFoundCount = 0;

  constructor(job, jobs) {
    this.job = job;
    this.jobs = jobs;
  }

  /**
   * Send a request, and retry it without limit after errors that do not concern the job.
   *
   * @param {() => Promise<object>} sendRequest
   * @param {boolean} [isFailureExpected] whether a 5xx from fal is the job's result, or any error
   *   with fal's request id: it is not retried
   * @returns {Promise<object | ResponseError>} the document, or the error of the job
   */
  async requestWithRetries(sendRequest, isFailureExpected = false) {
    for (let attempt = 0; ; attempt += 1) {
      try {
        const document = await sendRequest();
        this.#notFoundCount = 0;
        this.#showWarning(null);
        return document;
      } catch (error) {
        if (isNotFound(error)) {
          this.#notFoundCount += 1;
        }
        const isJobResult = isFailureExpected && error.hasRequestId === true;
        if (isJobResult || this.#isJobError(error, isFailureExpected || attempt >= RETRIES_MAX)) {
          return error;
        }
        this.#showWarning(warningFor(error));
        await interruptibleSleep(retryDelay(error, attempt));
      }
    }
  }

  /** Show the log so far, also that of the last status. */
  applyLog(status) {
    const lines = logLines(status.logs);
    if (lines.length > 0) {
      this.jobs.showChanges(this.job, { lines });
    }
  }

  async applyStatus(status) {
    const state = status.status === "IN_PROGRESS" ? "running" : "queued";
    const position = Number.isInteger(status.queue_position) ? status.queue_position : null;
    if (state !== this.job.state || position !== this.job.position) {
      await this.jobs.saveChanges(this.job, { state, position });
    }
  }

  #isJobError(error, isServerErrorFinal) {
    if (!(error instanceof ResponseError)) {
      return false;
    }
    if (isNotFound(error)) {
      return this.job.isCancelling || this.#notFoundCount >= NOT_FOUND_MAX;
    }
    const isFromFal = error.type === null; // errors of the proxy have a type
    return !RETRYABLE.has(error.status) || (isServerErrorFinal && error.status >= 500 && isFromFal);
  }

  #showWarning(warning) {
    if ((this.job.warning ?? null) !== warning) {
      this.jobs.showChanges(this.job, { warning });
    }
  }
}

function isNotFound(error) {
  return error instanceof ResponseError && error.status === 404;
}

function warningFor(error) {
  if (error instanceof NoResponseError) {
    return "The proxy does not respond. Retrying; the job itself continues at fal.";
  }
  if (error instanceof ResponseError && error.status === 401) {
    return "The proxy requires an access key to show the status.";
  }
  if (isNotFound(error)) {
    return "The job is not found. Retrying.";
  }
  return `${explainError(error).title}. Retrying.`;
}

function retryDelay(error, attempt) {
  if (error instanceof ResponseError && error.retryAfter !== null) {
    return 1000 * Math.max(0.5, error.retryAfter);
  }
  if (error instanceof ResponseError && error.status === 401) {
    return 10 * 60_000; // interrupted when an access key is entered
  }
  if (isNotFound(error)) {
    return NOT_FOUND_DELAY;
  }
  return Math.min(RETRY_DELAY_MAX, 500 * 2 ** attempt) * (0.75 + Math.random() / 2);
}

function logLines(logs) {
  const lines = Array.isArray(logs) ? logs : [];
  return lines
    .map((line) => line?.message)
    .filter((text) => typeof text === "string")
    .slice(-LOG_LINES_MAX);
}
