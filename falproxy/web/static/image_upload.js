/** Input images as values of `image_url`: URLs of uploaded files, or data URIs. */
import { uploadFile } from "./fal_client.js";
import { InvalidImageError, formatFileSize } from "./image_files.js";
import { proxyInfo } from "./proxy_status.js";

const INLINE_MAX = 2 ** 20; // bytes; smaller files are sent as data URIs

/**
 * @typedef {{file: File} | {url: string}} InputImage
 *
 * @param {InputImage} image
 * @param {AbortSignal} signal
 * @param {(sent: number) => void} onProgress receives the number of bytes that were uploaded
 * @returns {Promise<string>} a URL or a data URI
 */
export async function resolveImageUrl(image, signal, onProgress) {
  if ("url" in image) {
    return image.url;
  }
  const { file } = image;
  if (file.size <= INLINE_MAX || !proxyInfo.uploads) {
    return encodeDataUri(file);
  }
  try {
    return await uploadFile(file, file.name, signal, onProgress);
  } catch (error) {
    if (signal.aborted) {
      throw error;
    }
    // Uploads are disabled, or the CDN is unreachable: models accept data URIs as well.
    return encodeDataUri(file);
  }
}

/**
 * Return the image inputs as values for fal, and as they are stored with the job: files that were
 * uploaded by their URL.
 *
 * @param {{name: string, isMany: boolean, images: InputImage[]}[]} imageInputs
 * @param {AbortSignal} signal
 * @param {(part: number) => void} onProgress receives the part that was uploaded, from 0 to 1
 */
export async function resolveImageInputs(imageInputs, signal, onProgress) {
  const files = imageInputs.flatMap(({ images }) => images.map(({ file }) => file)).filter(Boolean);
  const total = files.reduce((sum, { size }) => sum + size, 0);
  const sent = new Map();
  const resolve = (image) =>
    resolveImageUrl(image, signal, (bytes) => {
      sent.set(image, bytes);
      onProgress([...sent.values()].reduce((sum, count) => sum + count, 0) / total);
    });
  const filled = imageInputs.filter(({ images }) => images.length > 0);
  const input = {};
  const stored = [];
  for (const { name, isMany, images } of filled) {
    const urls = await Promise.all(images.map(resolve));
    input[name] = isMany ? urls : urls[0];
    const kept = images.map((image, index) =>
      urls[index].startsWith("data:") ? image : { url: urls[index] },
    );
    stored.push({ name, isMany, images: kept });
  }
  return { input, stored };
}

function encodeDataUri(file) {
  if ((file.size * 4) / 3 > proxyInfo.maxBody * 0.9) {
    const max = formatFileSize(proxyInfo.maxBody * 0.67);
    throw new InvalidImageError(
      `The image is too large to be sent with the request: the maximum is ${max}.`,
    );
  }
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () =>
      reject(new InvalidImageError("The file cannot be read any more. Choose it again."));
    reader.readAsDataURL(file);
  });
}
