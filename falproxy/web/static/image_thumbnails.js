/** Thumbnails of the images of an input. Those of an input for several can be moved by drag and by keys. */
import { el } from "./dom.js";
import { icon } from "./icons.js";

const ITEM_TYPE = "application/x-falproxy-item"; // of dragged thumbnails
const STEPS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

/**
 * @param {{previewUrl: string | null, description: string}} item
 * @param {{index: number, count: number, isMany: boolean, listId: string, onRemove: () => void,
 *   onMove: (index: number, position: number) => void}} options listId: thumbnails move within their list
 * @returns {HTMLLIElement}
 */
export function createThumbnail(item, { index, count, isMany, listId, onRemove, onMove }) {
  const image =
    item.previewUrl === null
      ? el("span", { className: "no-preview" }, icon("image"))
      : el("img", { src: item.previewUrl, alt: "", width: 72, height: 72 });
  const removeProps = {
    type: "button",
    className: "button quiet square remove-button",
    "aria-label": `Remove ${item.description}`,
    title: "Remove",
    onclick: onRemove,
  };
  const remove = el("button", removeProps, icon("close"));
  const description = el("span", { className: "small description" }, item.description);
  if (!isMany) {
    return el("li", {}, el("span", { className: "thumb" }, image), description, remove);
  }
  const thumbProps = {
    type: "button",
    className: "thumb",
    title: `${item.description}\nDrag it, or use the arrow keys, to change the order.`,
    "aria-label": `Image ${index + 1} of ${count}: ${item.description}. The arrow keys move it.`,
    onkeydown: (event) => {
      const step = STEPS[event.key];
      if (step !== undefined) {
        event.preventDefault();
        onMove(index, index + step);
      } else if (event.key === "Delete") {
        onRemove();
      }
    },
  };
  const number = el("span", { className: "number", "aria-hidden": "true" }, String(index + 1));
  const thumb = el("button", thumbProps, image, number);
  const entry = el("li", { draggable: true }, thumb, description, remove);
  entry.addEventListener("dragstart", (event) => {
    event.dataTransfer.setData(ITEM_TYPE, `${listId}/${index}`);
    event.dataTransfer.effectAllowed = "move";
  });
  entry.addEventListener("drop", (event) => {
    const [id, from] = event.dataTransfer.getData(ITEM_TYPE).split("/");
    if (id === listId) {
      event.preventDefault();
      event.stopPropagation();
      onMove(Number(from), index);
    }
  });
  return entry;
}
