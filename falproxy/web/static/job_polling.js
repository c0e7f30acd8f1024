/** Asking about a job until it has ended. It outlives a proxy that is away for a while. */
import { Refusal, Silence, resultOf, statusOf } from "./fal_client.js";
import { pause } from "./interruptible_sleep.js";
import { safeUrl } from "./dom.js";
import { explain } from "./error_messages.js";

const LINES = 200; // of fal's log that are kept at hand
const SLOWEST = 15_000; // ms between two questions to a proxy that does not answer
const UNKNOWN_MAX = 4; // times that fal may know nothing of a job: a restart may need a moment
const TRIES = 8; // after which a failure that comes from fal itself is believed
const GIVE_UP = 30_000; // ms after which a job that was cancelled counts as such
const BUSY = new Set([401, 408, 425, 429, 500, 502, 503, 504]); // say nothing about the job itself

/**
 * @param {import("./jobs.js").Job} job
 * @param {import("./jobs.js").Jobs} jobs is told of each change
 * @returns {Promise<Partial<import("./jobs.js").Job>>} how it ended
 */
export async function follow(job, jobs) {
  const told = new Teller(job, jobs);
  let cancelledAt = null;
  for (;;) {
    const status = await told.ask(() => statusOf(job.endpoint, job.requestId));
    if (status instanceof Refusal) {
      return job.isCancelling ? { state: "cancelled" } : failed(status);
    }
    if (status.status === "COMPLETED") {
      return ending(status, told, job);
    }
    await told.tell(status);
    cancelledAt = job.isCancelling ? (cancelledAt ?? Date.now()) : null;
    if (cancelledAt !== null && Date.now() - cancelledAt > GIVE_UP) {
      return { state: "cancelled" };
    }
    await pause(cadence(job));
  }
}

/** ms until the next question: the longer a job takes, the less it matters. */
function cadence(job) {
  const seconds = (Date.now() - job.created) / 1000;
  return seconds < 15 ? 500 : seconds < 60 ? 1000 : 2000;
}

async function ending(status, told, job) {
  const hasFailed = Boolean(status.error) || Boolean(status.error_type);
  if (status.error_type === "client_cancelled") {
    return { state: "cancelled" };
  }
  const result = await told.ask(() => resultOf(job.endpoint, job.requestId), hasFailed);
  if (result instanceof Refusal) {
    const isCancelled = result.status === 499 || result.document?.error_type === "client_cancelled";
    return isCancelled ? { state: "cancelled" } : failed(result);
  }
  const images = picturesOf(result);
  if (images.length === 0) {
    const problem = {
      title: "The model's answer has no picture",
      action: "Choose another model.",
      detail: "",
      fields: [],
    };
    return { state: "failed", problem };
  }
  const isHidden =
    Array.isArray(result.has_nsfw_concepts) && result.has_nsfw_concepts.some(Boolean);
  const seed = Number.isFinite(result.seed) ? result.seed : null;
  return { state: "done", images, seed, isHidden };
}

function failed(refusal) {
  return { state: "failed", problem: explain(refusal) };
}

/** The pictures of a model's answer: `images`, `image`, or any object with a `url`. */
function picturesOf(result) {
  const values = Object.values(result ?? {});
  const found = [result?.images, result?.image, ...values].map((value) =>
    [value].flat().filter((one) => safeUrl(one?.url) !== null),
  );
  return (found.find((pictures) => pictures.length > 0) ?? []).map(({ url, width, height }) => ({
    url: safeUrl(url),
    width: Number.isFinite(width) ? width : null,
    height: Number.isFinite(height) ? height : null,
  }));
}

/** What is heard of a job, and what is done while nothing is. */
class Teller {
  #strange = 0;

  constructor(job, jobs) {
    this.job = job;
    this.jobs = jobs;
  }

  /**
   * The answer to a question, however long that takes; a Refusal that is about the job itself.
   *
   * @param {() => Promise<object>} question
   * @param {boolean} [isFinal] whether a failure is the answer that was to be expected
   */
  async ask(question, isFinal = false) {
    for (let tries = 0; ; tries += 1) {
      try {
        const answer = await question();
        this.#strange = 0;
        this.#show(null);
        return answer;
      } catch (error) {
        if (this.#isAnswer(error, isFinal || tries >= TRIES)) {
          return error;
        }
        this.#show(troubleOf(error));
        await pause(waitOf(error, tries));
      }
    }
  }

  async tell(status) {
    const lines = logLines(status.logs);
    const state = status.status === "IN_PROGRESS" ? "running" : "queued";
    const position = Number.isInteger(status.queue_position) ? status.queue_position : null;
    this.jobs.show(this.job, { lines: lines.length > 0 ? lines : this.job.lines });
    if (state !== this.job.state || position !== this.job.position) {
      await this.jobs.save(this.job, { state, position });
    }
  }

  #isAnswer(error, isFinal) {
    if (!(error instanceof Refusal)) {
      return false;
    }
    if (error.status === 404) {
      this.#strange += 1;
      return this.job.isCancelling || this.#strange >= UNKNOWN_MAX;
    }
    return !BUSY.has(error.status) || (isFinal && error.status >= 500 && error.type === null);
  }

  #show(trouble) {
    if ((this.job.trouble ?? null) !== trouble) {
      this.jobs.show(this.job, { trouble });
    }
  }
}

function troubleOf(error) {
  if (error instanceof Silence) {
    return "The proxy does not answer. I keep asking; the job itself goes on at fal.";
  }
  if (error instanceof Refusal && error.status === 401) {
    return "The proxy wants an access key to tell more.";
  }
  return `${explain(error).title}. I keep asking.`;
}

function waitOf(error, tries) {
  if (error instanceof Refusal && error.retryAfter !== null) {
    return 1000 * Math.max(0.5, error.retryAfter);
  }
  if (error instanceof Refusal && error.status === 401) {
    return 10 * 60_000; // or until there is a key
  }
  return Math.min(SLOWEST, 500 * 2 ** tries) * (0.75 + Math.random() / 2);
}

function logLines(logs) {
  const lines = Array.isArray(logs) ? logs : [];
  return lines
    .map((line) => line?.message)
    .filter((text) => typeof text === "string")
    .slice(-LINES);
}
