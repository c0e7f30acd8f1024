/** A picture to begin with, for somebody who has none at hand: hills below a low sun. */
import { encoded } from "./image_files.js";

const WIDTH = 768;
const HEIGHT = 512;
const HILLS = [
  { top: 0.62, wave: 0.07, turns: 1.3, colour: "#7fa392" },
  { top: 0.72, wave: 0.06, turns: 2.1, colour: "#4f7f6c" },
  { top: 0.84, wave: 0.05, turns: 1.7, colour: "#2d5a4a" },
];

export const PROMPT = "Make it autumn, with mist between the hills";

/** The same picture each time, so that the second try is found in the cache. @returns {Promise<File>} */
export async function examplePicture() {
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
  HILLS.forEach((hill) => paint(context, hill));
  return new File([await encoded(canvas, "image/png")], "hills.png", { type: "image/png" });
}

function paint(context, { top, wave, turns, colour }) {
  context.fillStyle = colour;
  context.beginPath();
  context.moveTo(0, HEIGHT);
  for (let x = 0; x <= WIDTH; x += 8) {
    context.lineTo(x, HEIGHT * (top + wave * Math.sin(turns * (1 + (x / WIDTH) * 2 * Math.PI))));
  }
  context.lineTo(WIDTH, HEIGHT);
  context.fill();
}
