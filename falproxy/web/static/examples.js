/** Examples for each task: a click fills the form. Also the example images themselves. */
import { byId, el } from "./dom.js";
import { encodeCanvas, loadImage } from "./image_files.js";
import { proxyInfo } from "./proxy_status.js";
import { openSheet } from "./sheet.js";

const WIDTH = 768; // pixels of an example as an input image
const HEIGHT = 576;
const TITLES = {
  create: "What do you want to create?",
  edit: "Which image do you want to edit?",
  animate: "What should move?",
  speak: "What should be heard?",
};
// By task: image, and prompt.
const EXAMPLES = {
  create: [
    ["lighthouse", "A lighthouse at dusk, its beam over a calm sea"],
    ["mountains", "A lake below snowy mountains, a small sailing boat"],
    ["city", "A city at night, neon signs, rain on the street"],
    ["island", "A tiny floating island with a windmill, isometric"],
    ["still_life", "Still life with fruit and a vase, oil painting"],
    ["balloons", "Hot-air balloons over a desert at sunrise"],
  ],
  edit: [
    ["mountains", "Make it autumn, with mist over the water"],
    ["lighthouse", "Make it a clear morning with blue sky"],
    ["city", "Turn it into a watercolor painting"],
    ["island", "Cover the island with snow"],
    ["still_life", "Add a bunch of sunflowers to the vase"],
    ["balloons", "Make the red balloon green"],
  ],
  animate: [
    ["lighthouse", "The beam of a lighthouse sweeps over the sea at dusk"],
    ["balloons", "Hot-air balloons rise slowly over the desert"],
    ["city", "Rain falls on a neon-lit street, cars pass by"],
    ["mountains", "A sailing boat crosses a mountain lake, drone shot"],
    ["island", "The windmill on a tiny island turns in the wind"],
    ["still_life", "The camera circles a bowl of fruit, soft light"],
  ],
  speak: [
    [
      "lighthouse",
      "The lighthouse keeper climbed the stairs, as he had every evening for forty years.",
    ],
    ["mountains", "Welcome. Today's trip across the lake takes about twenty minutes."],
    ["city", "Next stop: Central Station. Please mind the gap."],
    ["island", "Once upon a time, there was a very small island with a very large windmill."],
    ["still_life", "Add the lemon juice slowly, and keep stirring."],
    ["balloons", "Good morning! The wind is calm, and we are ready for take-off."],
  ],
};
export const PLACEHOLDERS = {
  create: "What do you want to see? A lighthouse at dusk, for example.",
  edit: "What should change? Make it winter, for example.",
  animate: "What happens in the video? Waves roll onto a beach, for example.",
  speak: "What should be spoken or heard?",
};
let shownTask = null;

const urlOf = (name) => new URL(`examples/${name}.svg`, import.meta.url).href;

/** Show the examples of the form's task. @param {import("./job_form.js").JobForm} form */
export function showExamples(form) {
  const { task } = form;
  if (task === shownTask) {
    return;
  }
  shownTask = task;
  byId("welcome-title").textContent = TITLES[task];
  byId("examples").replaceChildren(
    ...EXAMPLES[task].map(([name, prompt]) => {
      const props = {
        type: "button",
        className: "example",
        onclick: () => fillForm(form, name, prompt),
      };
      const image = el("img", { src: urlOf(name), alt: "", width: 320, height: 240 });
      return el("li", {}, el("button", props, image, el("span", { className: "small" }, prompt)));
    }),
  );
}

async function fillForm(form, name, prompt) {
  const imageInputs = await exampleInputs(form, name);
  await form.fill({ prompt, options: {}, ...(imageInputs.length > 0 && { imageInputs }) });
  openSheet();
  byId("submit").focus({ preventScroll: window.matchMedia("(min-width: 768px)").matches });
}

/** Return an image for each input that the model needs, or for the first one of an edit. */
async function exampleInputs({ task, images }, name) {
  const required = images.inputs.filter(({ isRequired }) => isRequired);
  const filled = required.length > 0 || task !== "edit" ? required : images.inputs.slice(0, 1);
  const names = EXAMPLES.create.map(([each]) => each);
  const first = names.indexOf(name);
  return Promise.all(
    filled.map(async ({ name: inputName, isMask }, index) => ({
      name: inputName,
      images: [
        {
          file: isMask ? await drawMask() : await rasterize(names[(first + index) % names.length]),
        },
      ],
    })),
  );
}

/** A mask of the middle of an example. @returns {Promise<File>} */
async function drawMask() {
  const canvas = el("canvas", { width: WIDTH, height: HEIGHT });
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, WIDTH, HEIGHT);
  context.fillStyle = "#fff";
  context.ellipse(WIDTH / 2, HEIGHT / 2, WIDTH / 4, HEIGHT / 4, 0, 0, 2 * Math.PI);
  context.fill();
  return new File([await encodeCanvas(canvas, "image/png")], "mask.png", { type: "image/png" });
}

/** Draw an example: always the same bytes, so that a second try is a cache hit. @returns {Promise<File>} */
async function rasterize(name) {
  const canvas = el("canvas", { width: WIDTH, height: HEIGHT });
  canvas.getContext("2d").drawImage(await loadImage(urlOf(name)), 0, 0, WIDTH, HEIGHT);
  const type = proxyInfo.formats.includes("png") ? "image/png" : "image/jpeg";
  const file = await encodeCanvas(canvas, type);
  return new File([file], `${name}.${type.slice(6)}`, { type });
}
