/** What can be done with a picture that is there: keep it, pass it on, go on with it. */

const EXTENSIONS = {
  "image/jpeg": "jpg",
  "image/png": "png",
  "image/webp": "webp",
  "image/gif": "gif",
  "image/avif": "avif",
};
const WORDS = 6; // of the prompt that a file is named after

/**
 * Saves a picture under a name that says what it is.
 *
 * @param {import("./jobs.js").Job} job
 * @param {number} index
 */
export async function download(job, index) {
  const { url } = job.images[index];
  const link = document.createElement("a");
  try {
    const response = await fetch(url);
    if (!response.ok) {
      throw new Error(`status ${response.status}`);
    }
    const blob = await response.blob();
    link.href = URL.createObjectURL(blob);
    link.download = `${nameOf(job, index)}.${EXTENSIONS[blob.type] ?? "jpg"}`;
  } catch {
    // Its host lets no page read it: the browser opens it, and saves it from there.
    link.href = url;
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** A file's name without extension: the first words of the prompt, the seed, the number. */
export function nameOf({ prompt, model, seed, images }, index) {
  const words = (prompt || model)
    .toLowerCase()
    .normalize("NFKD")
    .match(/[\p{Letter}\p{Number}]+/gu) ?? ["picture"];
  const parts = [
    ...words.slice(0, WORDS),
    seed === null ? null : `seed-${seed}`,
    images.length > 1 ? index + 1 : null,
  ];
  return parts
    .filter((part) => part !== null)
    .join("-")
    .slice(0, 100);
}

/** Puts a text into the clipboard. @param {string} text @returns {Promise<boolean>} */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyByHand(text);
  }
}

/** The way without https, where browsers have no clipboard for pages. */
function copyByHand(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "visually-hidden";
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  return isCopied;
}

/**
 * A result as an input: its bytes, as fal cannot read what only this machine serves.
 *
 * @param {import("./jobs.js").Job} job
 * @param {number} index
 * @returns {Promise<{file: File} | {url: string}>}
 */
export async function asInput(job, index) {
  const { url } = job.images[index];
  try {
    const response = await fetch(url);
    if (!response.ok) {
      throw new Error(`status ${response.status}`);
    }
    const blob = await response.blob();
    return {
      file: new File([blob], `${nameOf(job, index)}.${EXTENSIONS[blob.type] ?? "jpg"}`, {
        type: blob.type,
      }),
    };
  } catch {
    return { url };
  }
}
