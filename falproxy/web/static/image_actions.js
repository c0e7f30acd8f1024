/** Actions on a result image: download, copy its URL, use it as an input. */

const EXTENSIONS = {
  "image/jpeg": "jpg",
  "image/png": "png",
  "image/webp": "webp",
  "image/gif": "gif",
  "image/avif": "avif",
  "video/mp4": "mp4",
  "video/webm": "webm",
  "audio/mpeg": "mp3",
  "audio/wav": "wav",
  "audio/flac": "flac",
};
const PROMPT_WORDS_MAX = 6; // words of the prompt in a file name

/** @param {import("./jobs.js").Job} job @param {number} index */
export async function downloadImage(job, index) {
  const { url } = job.images[index];
  const link = document.createElement("a");
  try {
    const blob = await fetchBlob(url);
    link.href = URL.createObjectURL(blob);
    link.download = fileNameOf(job, index, blob);
  } catch {
    // The host does not allow it (CORS): open the image in a tab instead.
    link.href = url;
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Download all files of a result, one after the other. @param {import("./jobs.js").Job} job */
export async function downloadAll(job) {
  for (const index of job.images.keys()) {
    await downloadImage(job, index);
    await new Promise((resolve) => setTimeout(resolve, 150)); // browsers drop downloads that come at once
  }
}

/** Copy a text to the clipboard. @param {string} text @returns {Promise<boolean>} success */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyWithExecCommand(text);
  }
}

/** Fallback without https, where browsers do not offer the clipboard API. */
function copyWithExecCommand(text) {
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
 * Return a result image as a file, because fal cannot read URLs of this machine; as a URL if the
 * page cannot read the image.
 *
 * @param {import("./jobs.js").Job} job
 * @param {number} index
 * @returns {Promise<{file: File} | {url: string}>}
 */
export async function imageAsInput(job, index) {
  const { url } = job.images[index];
  try {
    const blob = await fetchBlob(url);
    return { file: new File([blob], fileNameOf(job, index, blob), { type: blob.type }) };
  } catch {
    return { url };
  }
}

async function fetchBlob(url) {
  const response = await fetch(url);
  if (!response.ok) {
    throw new Error(`status ${response.status}`);
  }
  return response.blob();
}

/** `<first words of the prompt>-seed-<seed>-<number>.<extension>` */
function fileNameOf({ prompt, model, seed, images }, index, blob) {
  const words = (prompt || model)
    .toLowerCase()
    .normalize("NFKD")
    .match(/[\p{Letter}\p{Number}]+/gu) ?? ["image"];
  const parts = [
    ...words.slice(0, PROMPT_WORDS_MAX),
    seed === null ? null : `seed-${seed}`,
    images.length > 1 ? index + 1 : null,
  ];
  const stem = parts
    .filter((part) => part !== null)
    .join("-")
    .slice(0, 100);
  return `${stem}.${EXTENSIONS[blob.type] ?? "jpg"}`;
}
