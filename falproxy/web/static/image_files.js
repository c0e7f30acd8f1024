/** Pictures in the browser: what the bytes are, how large, and smaller copies of them. */

const MEGAPIXELS_MAX = 50; // of the proxy's own check
const BYTES_MAX = 100 * 2 ** 20;
const SIDE = { thumb: 320, before: 1024 }; // pixels
const NAMES = { jpeg: "JPEG", png: "PNG", webp: "WebP", gif: "GIF", avif: "AVIF", heic: "HEIC" };

/** A file that no model can use. message: a sentence for people. */
export class PictureProblem extends Error {}

/**
 * What a file is by its bytes, not by its name.
 *
 * @param {Uint8Array} head its first 16 bytes or more
 * @returns {keyof typeof NAMES | null}
 */
export function kindOf(head) {
  const text = String.fromCharCode(...head.slice(0, 16));
  if (text.startsWith("\xff\xd8\xff")) {
    return "jpeg";
  }
  if (text.startsWith("\x89PNG\r\n\x1a\n")) {
    return "png";
  }
  if (/^RIFF[^]{4}WEBP/.test(text)) {
    return "webp";
  }
  if (/^GIF8[79]a/.test(text)) {
    return "gif";
  }
  if (/^[^]{4}ftypavi[fs]/.test(text)) {
    return "avif";
  }
  return /^[^]{4}ftyp(hei[cmsx]|hev[cmx]|mif1|msf1)/.test(text) ? "heic" : null;
}

/**
 * Looks at a file before anything is sent.
 *
 * @param {Blob & {name?: string}} file
 * @param {string[]} formats what the proxy lets through
 * @returns {Promise<{file: File, width: number | null, height: number | null, kind: string}>}
 *   rejects with a PictureProblem; width, height: null where the browser cannot show the kind
 */
export async function examine(file, formats) {
  const wanted = formats.map((format) => NAMES[format] ?? format).join(", ");
  if (file.size === 0) {
    throw new PictureProblem("This file is empty. Choose another one.");
  }
  const kind = kindOf(new Uint8Array(await file.slice(0, 16).arrayBuffer()));
  if (kind === null) {
    throw new PictureProblem(`This file is no picture that models can read. They take ${wanted}.`);
  }
  if (!formats.includes(kind)) {
    throw new PictureProblem(
      `This is a ${NAMES[kind]} picture. Save it as one of these: ${wanted}.`,
    );
  }
  if (file.size > BYTES_MAX) {
    throw new PictureProblem(
      `This file has ${megabytes(file.size)}; ${megabytes(BYTES_MAX)} is the most.`,
    );
  }
  const size = await sizeOf(file, kind);
  if (size.width * size.height > MEGAPIXELS_MAX * 1e6) {
    const found = Math.round((size.width * size.height) / 1e6);
    throw new PictureProblem(
      `This picture has ${found} megapixels; ${MEGAPIXELS_MAX} is the most. Make it smaller first.`,
    );
  }
  // The type is what the bytes say, whatever the name says.
  const named = new File([file], file.name || `picture.${kind}`, { type: `image/${kind}` });
  return { file: named, kind, ...size };
}

async function sizeOf(file, kind) {
  const url = URL.createObjectURL(file);
  try {
    const image = await load(url);
    return { width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    if (kind === "heic") {
      return { width: null, height: null };
    }
    throw new PictureProblem(
      "This picture is damaged: the browser cannot show it. Choose another one.",
    );
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** The picture of an address, loaded. @param {string} url @returns {Promise<HTMLImageElement>} */
export function load(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the picture cannot be shown"));
    image.src = url;
  });
}

/** `1.4 MB`. @param {number} bytes */
export function megabytes(bytes) {
  return bytes < 2 ** 20 ? `${Math.ceil(bytes / 1024)} KB` : `${(bytes / 2 ** 20).toFixed(1)} MB`;
}

/** A small copy of a result for the history; null where it cannot be read. @param {string} url */
export async function thumbnail(url) {
  try {
    const response = await fetch(url);
    return response.ok ? await smaller(await response.blob(), SIDE.thumb) : null;
  } catch {
    return null; // its host lets no page read it: it is shown from there
  }
}

/** A copy of an input, large enough to compare with; null where it cannot be read. */
export async function beforeOf(file) {
  try {
    return await smaller(file, SIDE.before);
  } catch {
    return null;
  }
}

async function smaller(blob, side) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return encoded(canvas, "image/webp");
}

/** @param {HTMLCanvasElement} canvas @param {string} type @returns {Promise<Blob>} */
export function encoded(canvas, type) {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no picture"))), type, 0.85);
  });
}
