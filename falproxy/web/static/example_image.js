/** An example input image, drawn on a canvas: hills below a low sun. */
import { encodeCanvas } from "./image_files.js";

const WIDTH = 768;
const HEIGHT = 512;
const HILLS = [
  { top: 0.62, amplitude: 0.07, frequency: 1.3, color: "#7fa392" },
  { top: 0.72, amplitude: 0.06, frequency: 2.1, color: "#4f7f6c" },
  { top: 0.84, amplitude: 0.05, frequency: 1.7, color: "#2d5a4a" },
];

export const EXAMPLE_PROMPT = "Make it autumn, with mist between the hills";

/** Draw the image: always the same, so that a second try is a cache hit. @returns {Promise<File>} */
export async function createExampleImage() {
  const canvas = document.createElement("canvas");
  canvas.width = WIDTH;
  canvas.height = HEIGHT;
  const context = canvas.getContext("2d");
  const sky = context.createLinearGradient(0, 0, 0, HEIGHT);
  sky.addColorStop(0, "#8fc1de");
  sky.addColorStop(0.65, "#f7e3bf");
  context.fillStyle = sky;
  context.fillRect(0, 0, WIDTH, HEIGHT);
  context.fillStyle = "#fff3d0";
  context.beginPath();
  context.arc(WIDTH * 0.68, HEIGHT * 0.4, 52, 0, 2 * Math.PI);
  context.fill();
  HILLS.forEach((hill) => drawHill(context, hill));
  return new File([await encodeCanvas(canvas, "image/png")], "hills.png", { type: "image/png" });
}

function drawHill(context, { top, amplitude, frequency, color }) {
  context.fillStyle = color;
  context.beginPath();
  context.moveTo(0, HEIGHT);
  for (let x = 0; x <= WIDTH; x += 8) {
    const phase = frequency * (1 + (x / WIDTH) * 2 * Math.PI);
    context.lineTo(x, HEIGHT * (top + amplitude * Math.sin(phase)));
  }
  context.lineTo(WIDTH, HEIGHT);
  context.fill();
}
