/** The pictures of a form as what a model takes: addresses, or the bytes themselves as data URIs. */
import { about } from "./proxy_status.js";
import { upload } from "./fal_client.js";
import { PictureProblem, megabytes } from "./image_files.js";

const INLINE_MAX = 2 ** 20; // bytes of a picture that goes with the call itself

/**
 * @typedef {{file: File} | {url: string}} Picture
 *
 * @param {Picture} picture
 * @param {AbortSignal} signal
 * @returns {Promise<string>} an address or a data URI
 */
export async function addressOf(picture, signal) {
  if ("url" in picture) {
    return picture.url;
  }
  const { file } = picture;
  if (file.size <= INLINE_MAX || !about.uploads) {
    return inline(file);
  }
  try {
    return await upload(file, file.name, signal);
  } catch (error) {
    if (signal.aborted) {
      throw error;
    }
    // Uploads are switched off, or fal's CDN cannot be reached from here: models take bytes as well.
    return inline(file);
  }
}

function inline(file) {
  if ((file.size * 4) / 3 > about.maxBody * 0.9) {
    const most = megabytes(about.maxBody * 0.67);
    throw new PictureProblem(
      `The picture is too large to be sent with the call: ${most} is the most.`,
    );
  }
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () =>
      reject(new PictureProblem("The file cannot be read any more. Choose it again."));
    reader.readAsDataURL(file);
  });
}
