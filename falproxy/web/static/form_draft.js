/**
 * The content of the form, which survives a reload: text in the web storage, input images in
 * IndexedDB. Each tab has its own; a new tab begins with that of the tab that was changed last.
 */
import { DRAFTS, bytesOf, runTransaction } from "./database.js";
import { randomId } from "./dom.js";
import { isEndpointId } from "./models.js";
import { readStored, writeStored } from "./stored_values.js";
import { showToast } from "./toast.js";

const BYTES_MAX = 128 * 2 ** 20; // of the images of all tabs
const TABS_MAX = 8; // whose images are stored

/**
 * @typedef {{name: string, isMask: boolean, image: import("./image_upload.js").InputImage}} DraftImage
 * name: of the input; "" for an image that the current model does not take
 */
export class FormDraft {
  #form;
  #db;
  #bytesMax;
  #id = randomId();
  #isStarted = false;
  #images = []; // those that are stored
  #writing = Promise.resolve();

  /** @param {import("./job_form.js").JobForm} form @param {IDBDatabase | null} db */
  constructor(form, db, bytesMax = BYTES_MAX) {
    this.#form = form;
    this.#db = db;
    this.#bytesMax = bytesMax;
  }

  /** Fill the form with what is stored. Return false if that is nothing. */
  async restore() {
    const own = readStored("form", "sessionStorage");
    const stored = own ?? readStored("form");
    if (typeof stored?.endpoint !== "string" || !isEndpointId(stored.endpoint)) {
      return false;
    }
    this.#id = own?.id ?? this.#id;
    const images = await this.#readImages(stored.id);
    await this.#form.fill({
      endpoint: stored.endpoint,
      prompt: String(stored.prompt ?? ""),
      options: stored.options ?? {},
      imageInputs: images.map(({ name, isMask, image }) => ({ name, isMask, images: [image] })),
    });
    const missing = (stored.images ?? 0) - images.length;
    if (missing > 0) {
      const subject =
        missing === 1 ? "An image of the form is" : `${missing} images of the form are`;
      showToast(`${subject} not stored any more: choose ${missing === 1 ? "it" : "them"} again.`);
    }
    return true;
  }

  /** Store the form from now on, when `save` is called. */
  start() {
    this.#isStarted = true;
    this.save();
  }

  /** Store the form after a change. */
  save() {
    const { request } = this.#form;
    if (!this.#isStarted || request === null) {
      return;
    }
    const images = this.#form.images.all;
    const { model, prompt, options } = request;
    const { endpoint, task } = model;
    const value = { id: this.#id, endpoint, task, prompt, options, images: images.length };
    writeStored("form", value, "sessionStorage");
    writeStored("form", value);
    if (this.#db !== null && !areEqual(images, this.#images)) {
      this.#images = images;
      this.#writing = this.#writing.then(() => this.#writeImages());
    }
  }

  async #readImages(id) {
    try {
      const readRecord = (store) => store.get(id);
      const record = await runTransaction(this.#db, DRAFTS, "readonly", readRecord);
      return Array.isArray(record?.images) ? record.images : [];
    } catch {
      return []; // there is no database, or the form has no id
    }
  }

  async #writeImages() {
    const images = [];
    let bytes = 0;
    for (const entry of this.#images) {
      const size = bytesOf(entry.image);
      if (bytes + size <= this.#bytesMax) {
        images.push(entry);
        bytes += size;
      }
    }
    const record = { id: this.#id, updated: Date.now(), bytes, images };
    for (const stored of [record, { ...record, bytes: 0, images: [] }]) {
      try {
        const replaceDraft = (store) => replace(store, stored, this.#bytesMax);
        await runTransaction(this.#db, DRAFTS, "readwrite", replaceDraft);
        return;
      } catch {
        // There is no space for the images: those of an earlier version of the form are removed.
      }
    }
  }
}

/** Store a draft, and remove old ones of other tabs that have no room beside it. */
function replace(store, record, bytesMax) {
  const request = store.getAll();
  request.onsuccess = () => {
    let { bytes } = record;
    request.result
      .filter(({ id }) => id !== record.id)
      .sort((one, other) => other.updated - one.updated)
      .forEach((other, index) => {
        bytes += other.bytes;
        if (bytes > bytesMax || index + 1 >= TABS_MAX) {
          store.delete(other.id);
        }
      });
    if (record.images.length > 0) {
      store.put(record);
    } else {
      store.delete(record.id);
    }
  };
  return request;
}

const areEqual = (some, others) =>
  some.length === others.length &&
  some.every(({ name, image }, index) => {
    const other = others[index];
    return name === other.name && image.file === other.image.file && image.url === other.image.url;
  });
