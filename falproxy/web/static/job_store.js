/** Storage of jobs in IndexedDB. If the browser stores nothing, they are kept in memory. */

const STORE = "jobs";
// One migration per database version. A released migration must not be changed.
const MIGRATIONS = [
  (db) => db.createObjectStore(STORE, { keyPath: "id" }).createIndex("created", "created"),
  (db, transaction) => transaction.objectStore(STORE).createIndex("state", "state"),
];
const QUOTA_EXCEEDED =
  "This browser has no space left for the history. Delete some results to store new ones.";
const NOT_STORED =
  "This browser does not store the history (private window?): it is lost when this page closes.";
const NEWER_VERSION =
  "A newer version of this page stored the history: this version cannot read it. Reload the page.";

/** Open the store of this page. Proxies below different prefixes have separate stores. */
export async function openJobStore() {
  try {
    return new JobStore(await openDatabase());
  } catch (error) {
    return new JobStore(null, error?.name === "VersionError" ? NEWER_VERSION : NOT_STORED);
  }
}

function openDatabase() {
  return new Promise((resolve, reject) => {
    const name = `falproxy:${new URL(".", document.baseURI).pathname}`;
    const request = indexedDB.open(name, MIGRATIONS.length);
    request.onupgradeneeded = ({ oldVersion }) => {
      for (const migrate of MIGRATIONS.slice(oldVersion)) {
        migrate(request.result, request.transaction);
      }
    };
    request.onsuccess = () => {
      // Let a tab with a newer version of the page upgrade the database.
      request.result.onversionchange = () => request.result.close();
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab has an older version open"));
  });
}

/**
 * warning: a sentence for the user if jobs are not stored, or null. onWarning: called when it
 * changes.
 */
class JobStore {
  #db;
  #memory = new Map(); // jobs that could not be stored, by id

  constructor(db, warning = null) {
    this.#db = db;
    this.warning = warning;
    this.onWarning = () => {};
  }

  /** Return all jobs, unordered. @returns {Promise<object[]>} */
  async readAll() {
    const records = await this.#tryTransaction("readonly", (store) => store.getAll());
    const jobs = new Map((records ?? []).filter(isValidRecord).map((job) => [job.id, job]));
    return [...new Map([...jobs, ...this.#memory]).values()];
  }

  /** @param {string} id @returns {Promise<object | undefined>} */
  async read(id) {
    const readRecord = (store) => store.get(id);
    return this.#memory.get(id) ?? (await this.#tryTransaction("readonly", readRecord));
  }

  /**
   * Store a job. If there is no space, store it without its small images, else in memory; set
   * `warning`.
   *
   * @param {object} job
   */
  async write(job) {
    if (this.#db === null) {
      this.#memory.set(job.id, job);
      return;
    }
    for (const record of [job, { ...job, before: null, thumb: null, imageInputs: [] }]) {
      try {
        await this.#runTransaction("readwrite", (store) => store.put(record));
        this.#memory.delete(job.id);
        return;
      } catch (error) {
        this.#memory.set(job.id, job);
        this.#setWarning(error?.name === "QuotaExceededError" ? QUOTA_EXCEEDED : NOT_STORED);
      }
    }
  }

  /** @param {string[]} ids */
  async remove(ids) {
    ids.forEach((id) => this.#memory.delete(id));
    await this.#tryTransaction("readwrite", (store) => ids.map((id) => store.delete(id)).at(-1));
    if (this.warning === QUOTA_EXCEEDED) {
      this.#setWarning(null);
    }
  }

  async #tryTransaction(mode, makeRequest) {
    try {
      return this.#db === null ? undefined : await this.#runTransaction(mode, makeRequest);
    } catch {
      this.#setWarning(NOT_STORED);
      return undefined;
    }
  }

  #runTransaction(mode, makeRequest) {
    return new Promise((resolve, reject) => {
      const transaction = this.#db.transaction(STORE, mode);
      const request = makeRequest(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onabort = () => reject(transaction.error ?? request?.error);
      transaction.onerror = () => reject(transaction.error ?? request?.error);
    });
  }

  #setWarning(warning) {
    this.warning = warning;
    this.onWarning(warning);
  }
}

function isValidRecord(record) {
  return typeof record?.id === "string" && typeof record.state === "string";
}
