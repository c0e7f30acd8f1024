/** All jobs that this page knows: kept, shared with other tabs, and told to whoever shows them. */
import { listen, tell } from "./tab_coordination.js";

/**
 * @typedef {object} Job
 * @property {string} id
 * @property {"preparing" | "sending" | "queued" | "running" | "done" | "failed" | "cancelled" |
 *   "unknown"} state preparing: nothing was sent yet; unknown: fal may have taken it, or not
 * @property {number} created ms
 * @property {number | null} ended ms
 * @property {string} endpoint
 * @property {string} model its name
 * @property {number | null} price USD for one unit
 * @property {string} unit
 * @property {string} prompt
 * @property {Record<string, unknown>} options as they were sent
 * @property {number} inputs how many pictures it was given
 * @property {Blob | string | null} before the first of them, made small, or its address
 * @property {string | null} requestId
 * @property {number | null} position how many wait ahead of it
 * @property {boolean} isCancelling
 * @property {string | null} cacheStatus
 * @property {{url: string, width: number | null, height: number | null}[]} images
 * @property {number | null} seed
 * @property {Blob | null} thumb of its first picture
 * @property {object | null} problem as `explain` tells it
 * @property {string[]} [lines] of fal's log; not kept
 * @property {string | null} [trouble] why nothing is heard of it just now; not kept
 */

const RUNNING = new Set(["preparing", "sending", "queued", "running"]);

/** @param {Job} job */
export function isRunning(job) {
  return RUNNING.has(job.state);
}

/** Fires `change` with `detail: {job, isNew}`, and `remove` with `detail: {ids}`. */
export class Jobs extends EventTarget {
  #byId = new Map();
  #store;

  constructor(store) {
    super();
    this.#store = store;
    listen((ids) => this.#heard(ids));
  }

  /** Reads all that is kept. Returns those that run. */
  async load() {
    const kept = await this.#store.all();
    kept.sort((one, other) => one.created - other.created);
    for (const job of kept) {
      this.#show(complete(job));
    }
    return [...this.#byId.values()].filter(isRunning);
  }

  /** @param {string} id @returns {Job | undefined} */
  get(id) {
    return this.#byId.get(id);
  }

  /** The newest first. @returns {Job[]} */
  list() {
    return [...this.#byId.values()].sort((one, other) => other.created - one.created);
  }

  /** Keeps a job with what has changed. @param {Job} job @param {Partial<Job>} changes */
  async save(job, changes) {
    Object.assign(job, changes);
    const { lines, trouble, ...kept } = job;
    await this.#store.put(kept); // first: what is seen is kept
    this.#show(job);
    tell([job.id]);
  }

  /** Shows what changes too often to be kept. @param {Job} job @param {Partial<Job>} changes */
  show(job, changes) {
    Object.assign(job, changes);
    this.#show(job);
  }

  /** A job as another tab may have left it. @param {Job} job */
  async refresh(job) {
    const kept = await this.#store.get(job.id);
    return kept ? Object.assign(job, kept) : job;
  }

  /** @param {string[]} ids */
  async remove(ids) {
    this.#forget(ids);
    await this.#store.remove(ids);
    tell(ids);
  }

  async #heard(ids) {
    for (const id of ids) {
      const kept = await this.#store.get(id);
      if (kept === undefined) {
        this.#forget([id]);
      } else {
        const job = this.#byId.get(id);
        this.#show(job ? Object.assign(job, kept) : complete(kept));
      }
    }
  }

  #show(job) {
    const isNew = !this.#byId.has(job.id);
    this.#byId.set(job.id, job);
    this.dispatchEvent(new CustomEvent("change", { detail: { job, isNew } }));
  }

  #forget(ids) {
    ids.forEach((id) => this.#byId.delete(id));
    this.dispatchEvent(new CustomEvent("remove", { detail: { ids } }));
  }
}

/** A record with all that a job has, whatever version of this page has kept it. */
function complete(record) {
  return {
    created: 0,
    ended: null,
    endpoint: "",
    model: record.endpoint ?? "",
    price: null,
    unit: "image",
    prompt: "",
    inputs: 0,
    before: null,
    requestId: null,
    position: null,
    isCancelling: false,
    cacheStatus: null,
    seed: null,
    thumb: null,
    problem: null,
    ...record,
    options: record.options ?? {},
    images: Array.isArray(record.images) ? record.images : [],
    lines: [],
    trouble: null,
  };
}
