/** Running of a job: submit it once, then poll until it has ended. */
import { explainError } from "./error_messages.js";
import {
  NoResponseError,
  ResponseError,
  cancelJob,
  mayHaveBeenAccepted,
  submitJob,
} from "./fal_client.js";
import { createThumbnail } from "./image_files.js";
import { interruptibleSleep } from "./interruptible_sleep.js";
import { pollUntilEnded } from "./job_polling.js";
import { isRunning } from "./jobs.js";
import { isImage } from "./media.js";
import { checkReachable } from "./proxy_status.js";
import { hasTabLocks, withTabLock } from "./tab_coordination.js";

const SUBMITS_MAX = 5; // after 429s, which cost nothing
const RETRY_AFTER_MAX = 120; // seconds; a 429 with a longer Retry-After is final
const RESPONSE_LOST = {
  title: "The response was lost",
  action:
    "fal may have accepted this job and may charge for it. It is not sent again automatically: " +
    "send it again if you accept that.",
};
const NOT_SENT = {
  title: "The page was closed before this was sent",
  action: "Nothing was charged.",
};
const HELD = "The proxy does not respond. Nothing was sent: this is sent as soon as it is back.";
const HELD_CHECK_INTERVAL = 4000; // ms; the page is also woken when the proxy is back

export class JobRunner {
  #jobs;
  #submitControllers = new Map(); // job id → AbortController, until the job is submitted

  /** @param {import("./jobs.js").Jobs} jobs */
  constructor(jobs) {
    this.#jobs = jobs;
  }

  /**
   * @param {import("./jobs.js").Job} job
   * @param {(signal: AbortSignal) => Promise<object>} makeInput uploads the files and returns the input;
   *   called while the proxy is reachable
   */
  start(job, makeInput) {
    return this.#runExclusively(job, async () => {
      if (await this.#submit(job, makeInput)) {
        await this.#pollToEnd(job);
      }
    });
  }

  /** Continue a job of another tab, or from before a reload. */
  resume(job) {
    return this.#runExclusively(job, async () => {
      await this.#jobs.reload(job);
      if (!isRunning(job)) {
        return; // the other tab has finished it
      }
      if (job.requestId === null) {
        if (!hasTabLocks && Date.now() - job.created < RETRY_AFTER_MAX * 1000) {
          return; // another tab may be about to submit it
        }
        const wasSent = job.state === "sending";
        const problem = wasSent ? RESPONSE_LOST : NOT_SENT;
        await this.#finish(job, wasSent ? "unknown" : "failed", problem);
        return;
      }
      await this.#pollToEnd(job);
    });
  }

  async cancel(job) {
    await this.#jobs.saveChanges(job, { isCancelling: true });
    this.#submitControllers.get(job.id)?.abort();
    if (job.requestId !== null) {
      await this.#cancelAtFal(job);
    }
  }

  async #runExclusively(job, run) {
    try {
      await withTabLock(job.id, run);
    } catch (error) {
      if (this.#jobs.get(job.id) === job && isRunning(job)) {
        const state = job.requestId === null ? "unknown" : "failed";
        await this.#finish(job, state, explainError(error));
      }
    }
  }

  /** Return true if fal has accepted the job; otherwise it has ended. */
  async #submit(job, makeInput) {
    const controller = new AbortController();
    this.#submitControllers.set(job.id, controller);
    const { signal } = controller;
    let input;
    try {
      await this.#waitForProxy(job, signal);
      input = await makeInput(signal);
      await this.#waitForProxy(job, signal);
    } catch (error) {
      await (signal.aborted
        ? this.#finish(job, "cancelled")
        : this.#finish(job, "failed", explainError(error)));
      return false;
    }
    for (let attempt = 1; ; attempt += 1) {
      try {
        await this.#jobs.saveChanges(job, { state: "sending", warning: null });
        const { requestId, cacheStatus } = await submitJob(job.endpoint, input);
        await this.#jobs.saveChanges(job, { requestId, cacheStatus, state: "queued" });
        break;
      } catch (error) {
        if (!(await this.#waitForRetry(job, error, attempt, signal))) {
          return false;
        }
      }
    }
    this.#submitControllers.delete(job.id);
    if (job.isCancelling) {
      await this.#cancelAtFal(job); // cancelled during the submit
    }
    return true;
  }

  /** Hold the job until the proxy responds. Rejects if it is cancelled before. */
  async #waitForProxy(job, signal) {
    while (!(await checkReachable(signal))) {
      signal.throwIfAborted();
      await this.#jobs.saveChanges(job, { state: "preparing", warning: HELD, isHeld: true });
      await interruptibleSleep(HELD_CHECK_INTERVAL, signal);
    }
    signal.throwIfAborted();
    if (job.isHeld) {
      await this.#jobs.saveChanges(job, { warning: null, isHeld: false });
    }
  }

  /**
   * After a 429 with `Retry-After`, which fal has not accepted, wait and return true. Otherwise end
   * the job and return false.
   */
  async #waitForRetry(job, error, attempt, signal) {
    const isRetryable =
      error instanceof ResponseError && error.status === 429 && error.retryAfter !== null;
    if (isRetryable && attempt < SUBMITS_MAX && error.retryAfter <= RETRY_AFTER_MAX) {
      const seconds = Math.ceil(error.retryAfter);
      const warning = `Too many requests at the moment: the job is sent in ${seconds} s.`;
      await this.#jobs.saveChanges(job, { state: "preparing", warning });
      try {
        await interruptibleSleep(1000 * Math.max(1, error.retryAfter), signal);
        await this.#waitForProxy(job, signal);
        return true;
      } catch {
        await this.#finish(job, "cancelled");
        return false;
      }
    }
    if (mayHaveBeenAccepted(error)) {
      const detail = error instanceof NoResponseError ? "" : explainError(error).detail;
      await this.#finish(job, "unknown", { ...RESPONSE_LOST, detail });
    } else {
      await this.#finish(job, "failed", explainError(error));
    }
    return false;
  }

  async #pollToEnd(job) {
    const finalState = await pollUntilEnded(job, this.#jobs);
    await this.#jobs.saveChanges(job, {
      ...finalState,
      ended: Date.now(),
      position: null,
      warning: null,
    });
    const [file] = job.images;
    const thumb = file !== undefined && isImage(file) ? await createThumbnail(file.url) : null;
    if (thumb !== null && this.#jobs.get(job.id) === job) {
      await this.#jobs.saveChanges(job, { thumb });
    }
  }

  async #cancelAtFal(job) {
    try {
      await cancelJob(job.endpoint, job.requestId);
    } catch (error) {
      const hasEnded = error instanceof ResponseError && [400, 404].includes(error.status);
      if (!hasEnded) {
        const { title } = explainError(error);
        await this.#jobs.saveChanges(job, {
          isCancelling: false,
          warning: `It could not be cancelled: ${title}.`,
        });
        return;
      }
    }
    window.dispatchEvent(new Event("falproxy:wake")); // poll now
  }

  async #finish(job, state, problem = null) {
    this.#submitControllers.delete(job.id);
    await this.#jobs.saveChanges(job, {
      state,
      problem,
      ended: Date.now(),
      warning: null,
      position: null,
    });
  }
}
