/** The result: the image with its details, or the error. */
import { previewFile } from "./image_preview.js";

const frame = document.querySelector("#frame");
const before = document.querySelector("#before");
const figure = document.querySelector("#figure");
const resultImage = document.querySelector("#result-image");
const details = document.querySelector("#details");
const detailsText = document.querySelector("#details-text");
const openLink = document.querySelector("#open-link");
const error = document.querySelector("#error");

/**
 * Remove the previous result. inputImage: a file that is shown until the result has loaded, if any.
 */
export function clearResult(inputImage) {
  previewFile(before, inputImage);
  figure.hidden = true;
  details.hidden = true;
  error.hidden = true;
  resultImage.removeAttribute("src");
}

/**
 * Show the image of a result. Rejects if the result has no image, or the image cannot be loaded.
 */
export async function showImage({ data, prompt }) {
  const url = data.images?.[0]?.url;
  if (!url) {
    throw new Error("The model's response has no image.");
  }
  resultImage.alt = prompt;
  resultImage.src = url;
  try {
    await resultImage.decode();
  } catch {
    throw new Error(`The image was generated, but its file cannot be loaded: ${url}`);
  }
  const size = `${resultImage.naturalWidth} × ${resultImage.naturalHeight}`;
  detailsText.textContent = data.seed === undefined ? size : `${size}, seed ${data.seed}`;
  openLink.href = url;
  details.hidden = false;
  figure.hidden = false;
  scrollToResult();
}

export function showError({ title, text, reference }) {
  document.querySelector("#error-title").textContent = title;
  document.querySelector("#error-text").textContent = text;
  document.querySelector("#error-reference").textContent = reference;
  error.hidden = false;
  scrollToResult();
}

/** On a narrow screen the result is below the form. */
function scrollToResult() {
  frame.scrollIntoView({ block: "nearest" });
}
