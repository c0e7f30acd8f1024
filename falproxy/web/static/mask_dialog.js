/** The dialog in which a mask is drawn on an image: white where the model may change it. */
import { el } from "./dom.js";
import { icon } from "./icons.js";
import { encodeCanvas, loadImage } from "./image_files.js";

const SIDE_MAX = 2048; // pixels of the mask
const UNDO_MAX = 20;

/**
 * @param {import("./image_upload.js").InputImage} image
 * @returns {Promise<File | null>} a PNG of the image's size; null: the dialog was closed
 */
export async function drawMask({ file, url }) {
  const source = file ? URL.createObjectURL(file) : url;
  try {
    return await showDialog(source, await loadImage(source));
  } finally {
    if (file) {
      URL.revokeObjectURL(source);
    }
  }
}

function showDialog(source, { naturalWidth, naturalHeight }) {
  const scale = Math.min(1, SIDE_MAX / Math.max(naturalWidth, naturalHeight));
  const mask = new Mask(Math.round(naturalWidth * scale), Math.round(naturalHeight * scale));
  const size = el("input", {
    type: "range",
    id: "brush-size",
    min: 2,
    max: 40,
    value: 12,
    step: 1,
  });
  size.oninput = () => (mask.brush = Number(size.value) / 100);
  size.oninput();
  const button = (name, label, onclick, props = {}) =>
    el("button", { type: "button", className: "button", onclick, ...props }, icon(name), label);
  const erase = button("trash", "Erase", () => {
    mask.isErasing = !mask.isErasing;
    erase.setAttribute("aria-pressed", String(mask.isErasing));
  });
  erase.setAttribute("aria-pressed", "false");
  const dialog = el(
    "dialog",
    { className: "wide-dialog", "aria-labelledby": "mask-title" },
    el(
      "div",
      { className: "dialog-head" },
      el("h2", { id: "mask-title" }, "Draw the mask"),
      el("p", { className: "muted small" }, "Paint over what the model may change."),
    ),
    el(
      "div",
      { className: "mask-stage" },
      el(
        "div",
        { className: "mask-frame" },
        el("img", { src: source, alt: "The image", draggable: false }),
        mask.canvas,
      ),
    ),
    el(
      "div",
      { className: "row dialog-bar" },
      el("label", { className: "row small", for: "brush-size" }, "Brush", size),
      erase,
      button("undo", "Undo", () => mask.undo()),
      button("variation", "Invert", () => mask.invert()),
      el(
        "span",
        { className: "row end" },
        el(
          "button",
          { type: "button", className: "button quiet", onclick: () => dialog.close() },
          "Cancel",
        ),
        el(
          "button",
          { type: "button", className: "button primary", onclick: () => dialog.close("use") },
          "Use mask",
        ),
      ),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", async () => {
      dialog.remove();
      resolve(dialog.returnValue === "use" ? await mask.toFile() : null);
    });
  });
}

/** A canvas on which the mask is drawn. It is transparent where the image stays. */
class Mask {
  brush = 0.12; // diameter as a fraction of the shorter side
  isErasing = false;
  #context;
  #previous = []; // ImageData before each stroke
  #last = null;

  constructor(width, height) {
    this.canvas = el("canvas", {
      width,
      height,
      className: "mask-canvas",
      tabIndex: 0,
      role: "img",
      "aria-label": "Mask. Space fills it all.",
    });
    this.#context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.canvas.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      this.canvas.setPointerCapture(event.pointerId);
      this.#remember();
      this.#last = this.#point(event);
      this.#drawTo(this.#last);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (this.#last !== null) {
        this.#drawTo(this.#point(event));
      }
    });
    const end = () => (this.#last = null);
    this.canvas.addEventListener("pointerup", end);
    this.canvas.addEventListener("pointercancel", end);
    this.canvas.addEventListener("keydown", (event) => {
      if (event.key === " ") {
        event.preventDefault();
        this.#remember();
        this.#context.globalCompositeOperation = "source-over";
        this.#context.fillStyle = "#fff";
        this.#context.fillRect(0, 0, this.canvas.width, this.canvas.height);
      }
    });
  }

  undo() {
    const data = this.#previous.pop();
    if (data !== undefined) {
      this.#context.putImageData(data, 0, 0);
    }
  }

  invert() {
    this.#remember();
    const { width, height } = this.canvas;
    const data = this.#context.getImageData(0, 0, width, height);
    for (let index = 0; index < data.data.length; index += 4) {
      const alpha = 255 - data.data[index + 3];
      data.data.set([255, 255, 255, alpha], index);
    }
    this.#context.putImageData(data, 0, 0);
  }

  async toFile() {
    const { width, height } = this.canvas;
    const canvas = el("canvas", { width, height });
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    context.drawImage(this.canvas, 0, 0);
    return new File([await encodeCanvas(canvas, "image/png")], "mask.png", { type: "image/png" });
  }

  #remember() {
    const { width, height } = this.canvas;
    this.#previous.push(this.#context.getImageData(0, 0, width, height));
    this.#previous.splice(0, this.#previous.length - UNDO_MAX);
  }

  #point(event) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - left) / width) * this.canvas.width,
      ((event.clientY - top) / height) * this.canvas.height,
    ];
  }

  #drawTo(point) {
    const context = this.#context;
    context.globalCompositeOperation = this.isErasing ? "destination-out" : "source-over";
    context.strokeStyle = "#fff";
    context.lineCap = "round";
    context.lineJoin = "round";
    context.lineWidth = Math.max(2, this.brush * Math.min(this.canvas.width, this.canvas.height));
    context.beginPath();
    context.moveTo(...(this.#last ?? point));
    context.lineTo(...point);
    context.stroke();
    this.#last = point;
  }
}
