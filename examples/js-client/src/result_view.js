/** What came out: the picture with its facts, or the error. */
import { showFile } from "./image_preview.js";

const frame = document.querySelector("#frame");
const before = document.querySelector("#before");
const figure = document.querySelector("#figure");
const image = document.querySelector("#image");
const facts = document.querySelector("#facts");
const factsText = document.querySelector("#facts-text");
const open = document.querySelector("#open");
const error = document.querySelector("#error");

/** Empties the frame for a new picture, made from the file `picture` or from words alone. */
export function clearResult(picture) {
  showFile(before, picture);
  figure.hidden = true;
  facts.hidden = true;
  error.hidden = true;
  image.removeAttribute("src");
}

/** Resolves when the picture can be seen; rejects when there is none, or none that loads. */
export async function showPicture({ data, prompt }) {
  const url = data.images?.[0]?.url;
  if (!url) {
    throw new Error("The model answered without a picture.");
  }
  image.alt = prompt;
  image.src = url;
  try {
    await image.decode();
  } catch {
    throw new Error(`The picture was made, but its file cannot be loaded: ${url}`);
  }
  const size = `${image.naturalWidth} × ${image.naturalHeight}`;
  factsText.textContent = data.seed === undefined ? size : `${size}, seed ${data.seed}`;
  open.href = url;
  facts.hidden = false;
  figure.hidden = false;
  reveal();
}

export function showError({ title, text, trace }) {
  document.querySelector("#error-title").textContent = title;
  document.querySelector("#error-text").textContent = text;
  document.querySelector("#error-trace").textContent = trace;
  error.hidden = false;
  reveal();
}

/** On a narrow screen the frame lies below the form. */
function reveal() {
  frame.scrollIntoView({ block: "nearest" });
}
