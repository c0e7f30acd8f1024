/** Storage of jobs in IndexedDB. If the browser stores nothing, they are kept in memory. */
import { JOBS, bytesOf, openDatabase, runTransaction } from "./database.js";

const IMAGE_BYTES_MAX = 256 * 2 ** 20; // of the input images of all jobs
const QUOTA_EXCEEDED =
  "This browser has no space left for the history. Delete some results to store new ones.";
const NOT_STORED =
  "This browser does not store the history (private window?): it is lost when this page closes.";
const NEWER_VERSION =
  "A newer version of this page stored the history: this version cannot read it. Reload the page.";

/** Open the store of this page. */
export async function openJobStore(imageBytesMax = IMAGE_BYTES_MAX) {
  try {
    return new JobStore(await openDatabase(), imageBytesMax);
  } catch (error) {
    const warning = error?.name === "VersionError" ? NEWER_VERSION : NOT_STORED;
    return new JobStore(null, imageBytesMax, warning);
  }
}

/**
 * db: the database, or null. warning: a sentence for the user if jobs are not stored, or null.
 * onWarning: called when it changes.
 */
class JobStore {
  #memory = new Map(); // jobs that could not be stored, by id
  #imageSizes = new Map(); // job id → {bytes, state, created} of the stored jobs with input images
  #imageBytesMax;

  constructor(db, imageBytesMax, warning = null) {
    this.db = db;
    this.#imageBytesMax = imageBytesMax;
    this.warning = warning;
    this.onWarning = () => {};
  }

  /** Return all jobs, unordered. @returns {Promise<object[]>} */
  async readAll() {
    const records = await this.#tryTransaction("readonly", (store) => store.getAll());
    const jobs = new Map((records ?? []).filter(isValidRecord).map((job) => [job.id, job]));
    jobs.forEach((job) => this.#countImages(job));
    return [...new Map([...jobs, ...this.#memory]).values()];
  }

  /** @param {string} id @returns {Promise<object | undefined>} */
  async read(id) {
    const readRecord = (store) => store.get(id);
    return this.#memory.get(id) ?? (await this.#tryTransaction("readonly", readRecord));
  }

  /**
   * Store a job. If there is no space, store it without its small images, else in memory; set
   * `warning`. The input images of all jobs have a limit: those of the oldest ones are dropped.
   *
   * @param {object} job
   */
  async write(job) {
    if (this.db === null) {
      this.#memory.set(job.id, job);
      return;
    }
    const isLarge = imageBytes(job) > this.#imageBytesMax;
    const stored = isLarge ? withoutImages(job) : job;
    for (const record of [stored, { ...withoutImages(job), before: null, thumb: null }]) {
      try {
        await this.#runTransaction("readwrite", (store) => store.put(record));
        this.#memory.delete(job.id);
        this.#countImages(record);
        await this.#dropOldImages(job.id);
        return;
      } catch (error) {
        this.#memory.set(job.id, job);
        this.#setWarning(error?.name === "QuotaExceededError" ? QUOTA_EXCEEDED : NOT_STORED);
      }
    }
  }

  /** @param {string[]} ids */
  async remove(ids) {
    for (const id of ids) {
      this.#memory.delete(id);
      this.#imageSizes.delete(id);
    }
    await this.#tryTransaction("readwrite", (store) => ids.map((id) => store.delete(id)).at(-1));
    if (this.warning === QUOTA_EXCEEDED) {
      this.#setWarning(null);
    }
  }

  #countImages(job) {
    const bytes = imageBytes(job);
    this.#imageSizes.delete(job.id);
    if (bytes > 0) {
      this.#imageSizes.set(job.id, { bytes, state: job.state, created: job.created ?? 0 });
    }
  }

  /** Drop input images until all have room: those of results first, then of failed jobs. */
  async #dropOldImages(currentId) {
    let total = [...this.#imageSizes.values()].reduce((sum, { bytes }) => sum + bytes, 0);
    if (total <= this.#imageBytesMax) {
      return;
    }
    const order = ([, { state, created }]) => (state === "done" ? created : created + 1e15);
    const oldest = [...this.#imageSizes]
      .filter(([id, { state }]) => id !== currentId && ENDED_STATES.has(state))
      .sort((one, other) => order(one) - order(other));
    for (const [id, { bytes }] of oldest) {
      if (total <= this.#imageBytesMax) {
        return;
      }
      await this.#runTransaction("readwrite", (store) => {
        const request = store.get(id);
        request.onsuccess = () => request.result && store.put(withoutImages(request.result));
      });
      this.#imageSizes.delete(id);
      total -= bytes;
    }
  }

  async #tryTransaction(mode, makeRequest) {
    try {
      return this.db === null ? undefined : await this.#runTransaction(mode, makeRequest);
    } catch {
      this.#setWarning(NOT_STORED);
      return undefined;
    }
  }

  #runTransaction(mode, makeRequest) {
    return runTransaction(this.db, JOBS, mode, makeRequest);
  }

  #setWarning(warning) {
    this.warning = warning;
    this.onWarning(warning);
  }
}

const ENDED_STATES = new Set(["done", "failed", "cancelled", "unknown"]);

function isValidRecord(record) {
  return typeof record?.id === "string" && typeof record.state === "string";
}

const imageBytes = ({ imageInputs = [] }) =>
  imageInputs.flatMap(({ images }) => images).reduce((sum, image) => sum + bytesOf(image), 0);

/** Return a job without the input images that are stored with it; `inputs` is still their number. */
const withoutImages = (job) => ({
  ...job,
  imageInputs: (job.imageInputs ?? []).map((input) => ({
    ...input,
    images: input.images.filter(({ url }) => url !== undefined && !url.startsWith("data:")),
  })),
});
