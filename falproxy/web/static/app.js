/** Puts the page together. */
import { about, loadAbout, watchStates } from "./proxy_status.js";
import { Cards, announce } from "./job_cards.js";
import { el, find, newName, safeUrl } from "./dom.js";
import { MakeForm } from "./job_form.js";
import { History } from "./history.js";
import { Jobs, isRunning } from "./jobs.js";
import { loadModels } from "./models.js";
import { beforeOf } from "./image_files.js";
import { Runner } from "./job_runner.js";
import { Stage } from "./result_view.js";
import { openStore } from "./job_store.js";
import { canBeAlone } from "./tab_coordination.js";
import { addressOf } from "./image_upload.js";

const KONTEXT = "fal-ai/flux-pro/kontext";
const own = new Set(); // jobs that this tab sees to, or waits to

watchStates();
const form = new MakeForm((wish) => make(wish));
const [store] = await Promise.all([openStore(), loadAbout()]);
const jobs = new Jobs(store);
const runner = new Runner(jobs);
const reuse = { onReuse: (job) => form.fill(job) };
const stage = new Stage({ ...reuse, onInput: (picture) => form.takePicture(picture) });
const cards = new Cards(jobs, {
  ...reuse,
  onCancel: (job) => runner.cancel(job),
  onShow: (job) => show(job, true),
});
const history = new History(jobs, { onShow: (job) => show(job, true) });

function show(job, isWished) {
  stage.show(job);
  history.mark(job.id);
  if (isWished) {
    find("stage").scrollIntoView({ block: "nearest" });
  }
}

jobs.addEventListener("change", ({ detail: { job } }) => {
  if (job.state === "done" && own.delete(job.id)) {
    const count = job.images.length;
    announce(`Done: ${count === 1 ? "one picture" : `${count} pictures`}. ${job.prompt}`);
    show(job, false);
  } else if (isRunning(job) && !own.has(job.id) && canBeAlone) {
    own.add(job.id); // of another tab, after whose end this one goes on with it
    runner.resume(job);
  }
});
jobs.addEventListener("remove", ({ detail: { ids } }) => {
  if (ids.includes(stage.shownId)) {
    stage.clear();
  }
});

store.onTrouble = showTrouble;
showTrouble(store.trouble);
function showTrouble(trouble) {
  find("notices").replaceChildren(
    trouble ? el("p", { className: "notice warn", role: "status" }, trouble) : "",
  );
}

/** A wish becomes a job. @param {import("./job_form.js").Wish} wish */
async function make({ model, prompt, options, slots }) {
  const pictures = slots.flatMap((slot) => slot.pictures);
  const first = pictures[0];
  const job = {
    id: newName(),
    state: "preparing",
    created: Date.now(),
    ended: null,
    endpoint: model.endpoint,
    model: model.name,
    price: model.price,
    unit: model.unit,
    prompt,
    options,
    inputs: pictures.length,
    before: first && "url" in first ? safeUrl(first.url) : null,
    requestId: null,
    position: null,
    isCancelling: false,
    cacheStatus: null,
    images: [],
    seed: null,
    thumb: null,
    problem: null,
    lines: [],
    trouble: null,
  };
  own.add(job.id);
  cards.tidy();
  const isNarrow = window.matchMedia("(max-width: 999px)").matches;
  const running = runner.start(job, async (signal) => {
    const before = first && "file" in first ? await beforeOf(first.file) : job.before;
    await jobs.save(job, { before });
    return {
      ...(prompt && { prompt }),
      ...options,
      ...Object.fromEntries(await addresses(slots, signal)),
    };
  });
  await jobs.save(job, {});
  if (isNarrow) {
    find("results").scrollIntoView();
  }
  await running;
}

async function addresses(slots, signal) {
  const filled = slots.filter(({ pictures }) => pictures.length > 0);
  return Promise.all(
    filled.map(async ({ name, isMany, pictures }) => {
      const found = await Promise.all(pictures.map((picture) => addressOf(picture, signal)));
      return [name, isMany ? found : found[0]];
    }),
  );
}

/** The sandbox makes an example at once; where it costs money the form is only filled in. */
find("example").addEventListener("click", async () => {
  const { PROMPT, examplePicture } = await import("./example_image.js");
  await form.fill({ endpoint: KONTEXT, prompt: PROMPT, options: {} });
  await form.takePicture({ file: await examplePicture() });
  if (about.isSandbox) {
    form.submit();
  }
});
if (about.isSandbox) {
  find("welcome-says").textContent =
    "This is the sandbox: an offline fal that draws pictures on this machine. " +
    "Nothing leaves it and nothing is paid, so try what you like.";
  find("example").textContent = "Make a first picture";
  find("example").classList.add("primary");
}

const underWay = await jobs.load();
const newest = jobs.list().find(({ state, images }) => state === "done" && images.length > 0);
if (newest !== undefined && underWay.length === 0) {
  show(newest, false);
}
for (const job of underWay) {
  if (!own.has(job.id)) {
    own.add(job.id);
    runner.resume(job);
  }
}
await form.offer(await loadModels());
document.documentElement.dataset.ready = "yes";
