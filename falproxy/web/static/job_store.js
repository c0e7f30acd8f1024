/** Jobs in IndexedDB, by id. Where the browser keeps nothing they live as long as the page. */

const STORE = "jobs";
// What each version adds to the one before. A version that was released is never changed.
const STEPS = [
  (db) => db.createObjectStore(STORE, { keyPath: "id" }).createIndex("created", "created"),
  (db, transaction) => transaction.objectStore(STORE).createIndex("state", "state"),
];
const FULL =
  "This browser has no more room for the history. Delete some pictures of it to keep new ones.";
const NO_ROOM =
  "This browser keeps no history (a private window, perhaps): it is gone when this page closes.";
const NEWER =
  "A newer version of this page has kept the history, which this one cannot read. Reload the page.";

/** Opens the store of this page. Proxies below other prefixes have their own. */
export async function openStore() {
  try {
    return new Store(await open());
  } catch (error) {
    return new Store(null, error?.name === "VersionError" ? NEWER : NO_ROOM);
  }
}

function open() {
  return new Promise((resolve, reject) => {
    const name = `falproxy:${new URL(".", document.baseURI).pathname}`;
    const request = indexedDB.open(name, STEPS.length);
    request.onupgradeneeded = ({ oldVersion }) => {
      for (const step of STEPS.slice(oldVersion)) {
        step(request.result, request.transaction);
      }
    };
    request.onsuccess = () => {
      // Another tab with a newer version may go ahead.
      request.result.onversionchange = () => request.result.close();
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab has an older version open"));
  });
}

/** trouble: a sentence for people about what cannot be kept, or null. */
class Store {
  #db;
  #memory = new Map();

  constructor(db, trouble = null) {
    this.#db = db;
    this.trouble = trouble;
    this.onTrouble = () => {};
  }

  /** All jobs, in no order. @returns {Promise<object[]>} */
  async all() {
    const kept = await this.#ask("readonly", (store) => store.getAll());
    const jobs = new Map((kept ?? []).filter(isJob).map((job) => [job.id, job]));
    return [...new Map([...jobs, ...this.#memory]).values()];
  }

  /** @param {string} id @returns {Promise<object | undefined>} */
  async get(id) {
    return this.#memory.get(id) ?? (await this.#ask("readonly", (store) => store.get(id)));
  }

  /**
   * Keeps a job. When there is no room it is kept without its pictures, else for as long as the page
   * lives; `trouble` says so.
   *
   * @param {object} job
   */
  async put(job) {
    if (this.#db === null) {
      this.#memory.set(job.id, job);
      return;
    }
    for (const version of [job, { ...job, before: null, thumb: null }]) {
      try {
        await this.#run("readwrite", (store) => store.put(version));
        this.#memory.delete(job.id);
        return;
      } catch (error) {
        this.#memory.set(job.id, job);
        this.#tell(error?.name === "QuotaExceededError" ? FULL : NO_ROOM);
      }
    }
  }

  /** @param {string[]} ids */
  async remove(ids) {
    ids.forEach((id) => this.#memory.delete(id));
    await this.#ask("readwrite", (store) => ids.map((id) => store.delete(id)).at(-1));
    if (this.trouble === FULL) {
      this.#tell(null);
    }
  }

  async #ask(mode, question) {
    try {
      return this.#db === null ? undefined : await this.#run(mode, question);
    } catch {
      this.#tell(NO_ROOM);
      return undefined;
    }
  }

  #run(mode, question) {
    return new Promise((resolve, reject) => {
      const transaction = this.#db.transaction(STORE, mode);
      const request = question(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onabort = () => reject(transaction.error ?? request?.error);
      transaction.onerror = () => reject(transaction.error ?? request?.error);
    });
  }

  #tell(trouble) {
    this.trouble = trouble;
    this.onTrouble(trouble);
  }
}

/** Whether a record can be shown: an older page may have kept less. */
function isJob(record) {
  return typeof record?.id === "string" && typeof record.state === "string";
}
