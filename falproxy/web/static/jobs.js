/** All jobs of this page: stored, shared with other tabs, and observable by events. */
import { broadcastChanges, onChangesInOtherTabs } from "./tab_coordination.js";

/**
 * @typedef {object} Job
 * @property {string} id
 * @property {"preparing" | "sending" | "queued" | "running" | "done" | "failed" | "cancelled" |
 *   "unknown"} state preparing: nothing was sent yet; unknown: fal may have accepted it or not
 * @property {number} created ms since the epoch
 * @property {number | null} ended ms since the epoch
 * @property {string} endpoint
 * @property {string} model the model's name
 * @property {number | null} price USD for one unit
 * @property {string} unit
 * @property {string} prompt
 * @property {Record<string, unknown>} options as sent
 * @property {string} promptName name of the input that the prompt is sent as
 * @property {string | null} task
 * @property {number | null} estimate expected cost in USD
 * @property {number} inputs number of input images
 * @property {{name: string, isMany: boolean, images: ({file: File} | {url: string})[]}[]} imageInputs the
 *   input images: large ones by the URL of their upload
 * @property {Blob | string | null} before the first input image: a small copy, or its URL
 * @property {string | null} requestId
 * @property {number | null} position number of jobs before it in the queue
 * @property {boolean} isCancelling
 * @property {string | null} cacheStatus `Cache-Status` header of the submit
 * @property {{url: string, width: number | null, height: number | null}[]} images
 * @property {number | null} seed
 * @property {Blob | null} thumb thumbnail of the first result image
 * @property {object | null} output fal's result as it is; null if it is long
 * @property {object | null} problem see `explainError`
 * @property {string[]} [lines] fal's log; not stored
 * @property {boolean} [isHeld] whether it waits for the proxy: nothing was sent; not stored
 * @property {number} [uploaded] part of the input images that is uploaded, from 0 to 1; not stored
 * @property {string | null} [warning] why its status is not up to date; not stored
 */

const RUNNING_STATES = new Set(["preparing", "sending", "queued", "running"]);

/** @param {Job} job */
export function isRunning(job) {
  return RUNNING_STATES.has(job.state);
}

/** Dispatches `change` with `detail: {job, isNew}`, and `remove` with `detail: {ids}`. */
export class Jobs extends EventTarget {
  #byId = new Map();
  #store;

  constructor(store) {
    super();
    this.#store = store;
    onChangesInOtherTabs((ids) => this.#reloadJobs(ids));
  }

  /** Load the stored jobs. Return those that are running. */
  async load() {
    const records = await this.#store.readAll();
    records.sort((one, other) => one.created - other.created);
    for (const record of records) {
      this.#dispatchChange(withDefaults(record));
    }
    return [...this.#byId.values()].filter(isRunning);
  }

  /** @param {string} id @returns {Job | undefined} */
  get(id) {
    return this.#byId.get(id);
  }

  /** Newest first. @returns {Job[]} */
  list() {
    return [...this.#byId.values()].sort((one, other) => other.created - one.created);
  }

  /** @param {Job} job @param {Partial<Job>} changes */
  async saveChanges(job, changes) {
    Object.assign(job, changes);
    const { lines, warning, isHeld, uploaded, ...record } = job;
    await this.#store.write(record); // before the event: a job that is shown is stored
    this.#dispatchChange(job);
    broadcastChanges([job.id]);
  }

  /** Like `saveChanges`, but without storing the job. */
  showChanges(job, changes) {
    Object.assign(job, changes);
    this.#dispatchChange(job);
  }

  /** Read a job that another tab may have changed. */
  async reload(job) {
    const record = await this.#store.read(job.id);
    return record ? Object.assign(job, record) : job;
  }

  /** @param {string[]} ids */
  async remove(ids) {
    this.#dispatchRemove(ids);
    await this.#store.remove(ids);
    broadcastChanges(ids);
  }

  /** Store removed or imported jobs. @param {object[]} records */
  async restore(records) {
    for (const record of records) {
      const { lines, warning, isHeld, uploaded, ...stored } = record;
      await this.#store.write(stored);
      this.#dispatchChange(withDefaults(record));
    }
    broadcastChanges(records.map(({ id }) => id));
  }

  async #reloadJobs(ids) {
    for (const id of ids) {
      const record = await this.#store.read(id);
      if (record === undefined) {
        this.#dispatchRemove([id]);
      } else {
        const job = this.#byId.get(id);
        this.#dispatchChange(job ? Object.assign(job, record) : withDefaults(record));
      }
    }
  }

  #dispatchChange(job) {
    const isNew = !this.#byId.has(job.id);
    this.#byId.set(job.id, job);
    this.dispatchEvent(new CustomEvent("change", { detail: { job, isNew } }));
  }

  #dispatchRemove(ids) {
    ids.forEach((id) => this.#byId.delete(id));
    this.dispatchEvent(new CustomEvent("remove", { detail: { ids } }));
  }
}

/** Return a job with all properties: an older version of this page may have stored fewer. */
function withDefaults(record) {
  return {
    created: 0,
    ended: null,
    endpoint: "",
    model: record.endpoint ?? "",
    price: null,
    unit: "image",
    prompt: "",
    promptName: "prompt",
    task: null,
    estimate: null,
    inputs: 0,
    imageInputs: [],
    before: null,
    requestId: null,
    position: null,
    isCancelling: false,
    cacheStatus: null,
    seed: null,
    output: null,
    thumb: null,
    problem: null,
    ...record,
    options: record.options ?? {},
    images: Array.isArray(record.images) ? record.images : [],
    lines: [],
    warning: null,
  };
}
