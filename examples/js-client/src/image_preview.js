/** Shows a chosen file in an <img>, or hides that when there is none. */
export function showFile(image, file) {
  URL.revokeObjectURL(image.src);
  image.hidden = !file;
  if (file) {
    image.src = URL.createObjectURL(file);
  } else {
    image.removeAttribute("src");
  }
}
