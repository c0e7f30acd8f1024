/** The life of a job: sent once, asked about until it has ended. */
import { Refusal, Silence, cancel, mayBeTaken, submit } from "./fal_client.js";
import { follow } from "./job_polling.js";
import { isRunning } from "./jobs.js";
import { pause } from "./interruptible_sleep.js";
import { thumbnail } from "./image_files.js";
import { alone, canBeAlone } from "./tab_coordination.js";
import { explain } from "./error_messages.js";

const TRIES = 5; // of a submit that was turned away for now, which costs nothing
const PATIENCE = 120; // seconds that it waits for one
const LOST = {
  title: "The answer was lost",
  action:
    "fal may have taken this job, and charge for it. It is not sent again by itself: send it again if you accept that.",
};
const NOT_SENT = {
  title: "The page was closed before this was sent",
  action: "Nothing was bought.",
};

export class Runner {
  #jobs;
  #leaving = new Map(); // job id → what stops it before it is sent

  /** @param {import("./jobs.js").Jobs} jobs */
  constructor(jobs) {
    this.#jobs = jobs;
  }

  /**
   * Sends a job and sees to it.
   *
   * @param {import("./jobs.js").Job} job
   * @param {(signal: AbortSignal) => Promise<object>} makeInput uploads what has to be
   */
  start(job, makeInput) {
    return this.#work(job, async () => {
      if (await this.#send(job, makeInput)) {
        await this.#see(job);
      }
    });
  }

  /** Goes on with a job that this page, or another tab, has begun. */
  resume(job) {
    return this.#work(job, async () => {
      await this.#jobs.refresh(job);
      if (!isRunning(job)) {
        return; // the other tab has seen to it
      }
      if (job.requestId === null) {
        if (!canBeAlone && Date.now() - job.created < PATIENCE * 1000) {
          return; // another tab may be about to send it
        }
        const wasSent = job.state === "sending";
        await this.#end(job, wasSent ? "unknown" : "failed", wasSent ? LOST : NOT_SENT);
        return;
      }
      await this.#see(job);
    });
  }

  /** Stops a job: before it is sent at once, later as soon as fal agrees. */
  async cancel(job) {
    await this.#jobs.save(job, { isCancelling: true });
    this.#leaving.get(job.id)?.abort();
    if (job.requestId !== null) {
      await this.#askForEnd(job);
    }
  }

  async #work(job, work) {
    try {
      await alone(job.id, work);
    } catch (error) {
      if (this.#jobs.get(job.id) === job && isRunning(job)) {
        await this.#end(job, job.requestId === null ? "unknown" : "failed", explain(error));
      }
    }
  }

  async #send(job, makeInput) {
    const leaving = new AbortController();
    this.#leaving.set(job.id, leaving);
    let input;
    try {
      input = await makeInput(leaving.signal);
    } catch (error) {
      await (leaving.signal.aborted
        ? this.#end(job, "cancelled")
        : this.#end(job, "failed", explain(error)));
      return false;
    }
    for (let tries = 1; ; tries += 1) {
      try {
        await this.#jobs.save(job, { state: "sending", trouble: null });
        const { requestId, cacheStatus } = await submit(job.endpoint, input);
        await this.#jobs.save(job, { requestId, cacheStatus, state: "queued" });
        break;
      } catch (error) {
        if (!(await this.#mayTryAgain(job, error, tries, leaving.signal))) {
          return false;
        }
      }
    }
    this.#leaving.delete(job.id);
    if (job.isCancelling) {
      await this.#askForEnd(job); // while the answer was on its way
    }
    return true;
  }

  /** A submit that was turned away for a while was not taken: it may be sent again. */
  async #mayTryAgain(job, error, tries, signal) {
    const isForNow = error instanceof Refusal && error.status === 429 && error.retryAfter !== null;
    if (isForNow && tries < TRIES && error.retryAfter <= PATIENCE) {
      const trouble = `Too many calls just now: it is sent in ${Math.ceil(error.retryAfter)} s.`;
      await this.#jobs.save(job, { state: "preparing", trouble });
      try {
        await pause(1000 * Math.max(1, error.retryAfter), signal);
        return true;
      } catch {
        await this.#end(job, "cancelled");
        return false;
      }
    }
    if (mayBeTaken(error)) {
      const detail = error instanceof Silence ? "" : explain(error).detail;
      await this.#end(job, "unknown", { ...LOST, detail });
    } else {
      await this.#end(job, "failed", explain(error));
    }
    return false;
  }

  async #see(job) {
    const ending = await follow(job, this.#jobs);
    await this.#jobs.save(job, { ...ending, ended: Date.now(), position: null, trouble: null });
    const url = job.images[0]?.url;
    const thumb = url === undefined ? null : await thumbnail(url);
    if (thumb !== null && this.#jobs.get(job.id) === job) {
      await this.#jobs.save(job, { thumb });
    }
  }

  async #askForEnd(job) {
    try {
      await cancel(job.endpoint, job.requestId);
    } catch (error) {
      const isOver = error instanceof Refusal && [400, 404].includes(error.status);
      if (!isOver) {
        const { title } = explain(error);
        await this.#jobs.save(job, {
          isCancelling: false,
          trouble: `It could not be cancelled: ${title}.`,
        });
        return;
      }
    }
    window.dispatchEvent(new Event("falproxy:wake"));
  }

  async #end(job, state, problem = null) {
    this.#leaving.delete(job.id);
    await this.#jobs.save(job, {
      state,
      problem,
      ended: Date.now(),
      trouble: null,
      position: null,
    });
  }
}
