/** Show a chosen file in an <img>, or hide the <img> if there is no file. */
export function previewFile(image, file) {
  URL.revokeObjectURL(image.src);
  image.hidden = !file;
  if (file) {
    image.src = URL.createObjectURL(file);
  } else {
    image.removeAttribute("src");
  }
}
