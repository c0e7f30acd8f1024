/** Image files in the browser: check of format and size, and scaled copies. */

const MEGAPIXELS_MAX = 50; // the proxy's own limit
const BYTES_MAX = 100 * 2 ** 20;
const THUMBNAIL_SIDE = 320; // pixels
const BEFORE_SIDE = 1024; // pixels
const FORMAT_NAMES = {
  jpeg: "JPEG",
  png: "PNG",
  webp: "WebP",
  gif: "GIF",
  avif: "AVIF",
  heic: "HEIC",
};

/** A file that no model can use. message: a sentence for the user. */
export class InvalidImageError extends Error {}

/** Return the format of a file by its first 16 bytes, or null. */
export function sniffFormat(bytes) {
  const text = String.fromCharCode(...bytes.slice(0, 16));
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
 * Check an image file before it is sent.
 *
 * @param {Blob & {name?: string}} file
 * @param {string[]} formats accepted by the proxy
 * @returns {Promise<{file: File, width: number | null, height: number | null, format: string}>}
 *   rejects with an InvalidImageError; width, height: null if the browser cannot decode the format
 */
export async function checkImageFile(file, formats) {
  const accepted = formats.map((format) => FORMAT_NAMES[format] ?? format).join(", ");
  if (file.size === 0) {
    throw new InvalidImageError("This file is empty. Choose another one.");
  }
  const format = sniffFormat(new Uint8Array(await file.slice(0, 16).arrayBuffer()));
  if (format === null) {
    throw new InvalidImageError(
      `This file is not an image that models can read. They accept ${accepted}.`,
    );
  }
  if (format === "heic" && !formats.includes(format)) {
    const converted = await convertToJpeg(file);
    if (converted !== null) {
      return checkImageFile(converted, formats);
    }
  }
  if (!formats.includes(format)) {
    throw new InvalidImageError(
      `This is a ${FORMAT_NAMES[format]} image. Save it in one of these formats: ${accepted}.`,
    );
  }
  if (file.size > BYTES_MAX) {
    throw new InvalidImageError(
      `This file has ${formatFileSize(file.size)}; the maximum is ${formatFileSize(BYTES_MAX)}.`,
    );
  }
  const size = await imageSize(file, format);
  if (size.width * size.height > MEGAPIXELS_MAX * 1e6) {
    const megapixels = Math.round((size.width * size.height) / 1e6);
    throw new InvalidImageError(
      `This image has ${megapixels} megapixels; the maximum is ${MEGAPIXELS_MAX}. ` +
        "Make it smaller first.",
    );
  }
  // The content type follows the bytes, not the file name.
  const type = `image/${format}`;
  const checkedFile = new File([file], file.name || `image.${format}`, { type });
  return { file: checkedFile, format, ...size };
}

/** Return a JPEG of an image that the browser can decode, such as HEIC on Apple's systems, or null. */
async function convertToJpeg(file) {
  try {
    const blob = await scaleDown(file, Infinity, "image/jpeg");
    return new File([blob], (file.name || "image").replace(/\.\w+$/, ".jpg"), {
      type: "image/jpeg",
    });
  } catch {
    return null;
  }
}

async function imageSize(file, format) {
  const url = URL.createObjectURL(file);
  try {
    const image = await loadImage(url);
    return { width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    if (format === "heic") {
      return { width: null, height: null };
    }
    throw new InvalidImageError(
      "This image is damaged: the browser cannot show it. Choose another one.",
    );
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** @param {string} url @returns {Promise<HTMLImageElement>} */
export function loadImage(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the image cannot be loaded"));
    image.src = url;
  });
}

/** `1.4 MB`. @param {number} bytes */
export function formatFileSize(bytes) {
  return bytes < 2 ** 20 ? `${Math.ceil(bytes / 1024)} KB` : `${(bytes / 2 ** 20).toFixed(1)} MB`;
}

/** Return a small copy of a result image; null if the page cannot read it. @param {string} url */
export async function createThumbnail(url) {
  try {
    const response = await fetch(url);
    return response.ok ? await scaleDown(await response.blob(), THUMBNAIL_SIDE) : null;
  } catch {
    return null; // the host does not allow it (CORS): the history shows the image itself
  }
}

/** Return a copy of an input image for the comparison with the result, or null. */
export async function createBeforeImage(file) {
  try {
    return await scaleDown(file, BEFORE_SIDE);
  } catch {
    return null;
  }
}

async function scaleDown(blob, maxSide, type = "image/webp") {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, maxSide / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return encodeCanvas(canvas, type);
}

/** @param {HTMLCanvasElement} canvas @param {string} type @returns {Promise<Blob>} */
export function encodeCanvas(canvas, type) {
  return new Promise((resolve, reject) => {
    const onBlob = (blob) => (blob ? resolve(blob) : reject(new Error("encoding failed")));
    canvas.toBlob(onBlob, type, 0.85);
  });
}

/**
 * Return the image in the clipboard, or a sentence for the user.
 *
 * @returns {Promise<{file?: Blob, problem?: string}>}
 */
export async function readImageFromClipboard() {
  try {
    for (const item of await navigator.clipboard.read()) {
      const type = item.types.find((name) => name.startsWith("image/"));
      if (type) {
        return { file: await item.getType(type) };
      }
    }
    return { problem: "There is no image in the clipboard. Copy one, then paste it here." };
  } catch {
    return {
      problem: "The browser does not allow the page to read the clipboard. Press Ctrl + V instead.",
    };
  }
}
