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
 * @returns {Promise<string>} a URL or a data URI
 */
export async function resolveImageUrl(image, signal) {
  if ("url" in image) {
    return image.url;
  }
  const { file } = image;
  if (file.size <= INLINE_MAX || !proxyInfo.uploads) {
    return encodeDataUri(file);
  }
  try {
    return await uploadFile(file, file.name, signal);
  } catch (error) {
    if (signal.aborted) {
      throw error;
    }
    // Uploads are disabled, or the CDN is unreachable: models accept data URIs as well.
    return encodeDataUri(file);
  }
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
