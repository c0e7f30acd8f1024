/** The page's database in IndexedDB. Proxies below different prefixes have separate ones. */

export const JOBS = "jobs";
export const DRAFTS = "drafts"; // input images of the form of each tab
// One migration per database version. A released migration must not be changed.
const MIGRATIONS = [
  (db) => db.createObjectStore(JOBS, { keyPath: "id" }).createIndex("created", "created"),
  (db, transaction) => transaction.objectStore(JOBS).createIndex("state", "state"),
  (db) => db.createObjectStore(DRAFTS, { keyPath: "id" }),
];

/** @returns {Promise<IDBDatabase>} */
export function openDatabase() {
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
 * Run a transaction on one object store. Return the result of the request when it is complete.
 *
 * @param {IDBDatabase} db
 * @param {string} name
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest | undefined} makeRequest
 */
export function runTransaction(db, name, mode, makeRequest) {
  return new Promise((resolve, reject) => {
    const transaction = db.transaction(name, mode);
    const request = makeRequest(transaction.objectStore(name));
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onabort = () => reject(transaction.error ?? request?.error);
    transaction.onerror = () => reject(transaction.error ?? request?.error);
  });
}

/** Return the size of an input image in bytes, as far as it is stored here. */
export const bytesOf = ({ file, url }) => file?.size ?? url?.length ?? 0;
