/** Entry point of the page: creates its parts and connects them. */
import { byId, el, randomId, safeUrl } from "./dom.js";
import { JobHistory } from "./history.js";
import { createBeforeImage } from "./image_files.js";
import { resolveImageUrl } from "./image_upload.js";
import { JobCards, announce } from "./job_cards.js";
import { JobForm } from "./job_form.js";
import { JobRunner } from "./job_runner.js";
import { openJobStore } from "./job_store.js";
import { Jobs, isRunning } from "./jobs.js";
import { loadModels } from "./models.js";
import { loadProxyInfo, proxyInfo, startStatusChips } from "./proxy_status.js";
import { ResultView } from "./result_view.js";
import { hasTabLocks } from "./tab_coordination.js";

const KONTEXT = "fal-ai/flux-pro/kontext";
const ownJobs = new Set(); // ids of jobs that this tab runs, or waits to take over

startStatusChips();
const form = new JobForm((request) => startJob(request));
const [store] = await Promise.all([openJobStore(), loadProxyInfo()]);
const jobs = new Jobs(store);
const runner = new JobRunner(jobs);
const reuse = { onReuse: (job) => form.fill(job) };
const resultView = new ResultView({ ...reuse, onInput: (image) => form.addImage(image) });
const cards = new JobCards(jobs, {
  ...reuse,
  onCancel: (job) => runner.cancel(job),
  onShow: (job) => showResult(job, true),
});
const history = new JobHistory(jobs, { onShow: (job) => showResult(job, true) });

function showResult(job, isRequested) {
  resultView.showJob(job);
  history.markCurrent(job.id);
  if (isRequested) {
    byId("result-view").scrollIntoView({ block: "nearest" });
  }
}

jobs.addEventListener("change", ({ detail: { job } }) => {
  if (job.state === "done" && ownJobs.delete(job.id)) {
    const count = job.images.length;
    form.allowRepeat();
    announce(`Done: ${count === 1 ? "one image" : `${count} images`}. ${job.prompt}`);
    showResult(job, false);
  } else if (isRunning(job) && !ownJobs.has(job.id) && hasTabLocks) {
    ownJobs.add(job.id); // of another tab: this one takes over when that is closed
    runner.resume(job);
  }
});
jobs.addEventListener("remove", ({ detail: { ids } }) => {
  if (ids.includes(resultView.currentId)) {
    resultView.clear();
  }
});

store.onWarning = showWarning;
showWarning(store.warning);
function showWarning(warning) {
  byId("notices").replaceChildren(
    warning ? el("p", { className: "notice warn", role: "status" }, warning) : "",
  );
}

/** @param {import("./job_form.js").JobRequest} request */
async function startJob({ model, prompt, options, imageInputs }) {
  const images = imageInputs.flatMap((input) => input.images);
  const first = images[0];
  const job = {
    id: randomId(),
    state: "preparing",
    created: Date.now(),
    ended: null,
    endpoint: model.endpoint,
    model: model.name,
    price: model.price,
    unit: model.unit,
    prompt,
    options,
    inputs: images.length,
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
    warning: null,
  };
  ownJobs.add(job.id);
  cards.removeFinished();
  const isNarrow = window.matchMedia("(max-width: 999px)").matches;
  const running = runner.start(job, async (signal) => {
    const before = first && "file" in first ? await createBeforeImage(first.file) : job.before;
    await jobs.saveChanges(job, { before });
    return {
      ...(prompt && { prompt }),
      ...options,
      ...Object.fromEntries(await resolveImageInputs(imageInputs, signal)),
    };
  });
  await jobs.saveChanges(job, {});
  if (isNarrow) {
    byId("results").scrollIntoView();
  }
  await running;
}

async function resolveImageInputs(imageInputs, signal) {
  const filled = imageInputs.filter(({ images }) => images.length > 0);
  return Promise.all(
    filled.map(async ({ name, isMany, images }) => {
      const urls = await Promise.all(images.map((image) => resolveImageUrl(image, signal)));
      return [name, isMany ? urls : urls[0]];
    }),
  );
}

// Submitted in the sandbox only: elsewhere it costs money.
byId("try-example").addEventListener("click", async ({ currentTarget }) => {
  currentTarget.disabled = true; // a double click is one action
  setTimeout(() => (currentTarget.disabled = false), 1000);
  const { EXAMPLE_PROMPT, createExampleImage } = await import("./example_image.js");
  await form.fill({ endpoint: KONTEXT, prompt: EXAMPLE_PROMPT, options: {} });
  await form.addImage({ file: await createExampleImage() });
  if (proxyInfo.isSandbox) {
    form.submit();
  }
});
if (proxyInfo.isSandbox) {
  byId("welcome-text").textContent =
    "This is the sandbox: an offline emulator of fal that draws images on this machine. " +
    "Nothing is sent to fal and nothing is charged.";
  byId("try-example").textContent = "Create a first image";
  byId("try-example").classList.add("primary");
}

const runningJobs = await jobs.load();
const newest = jobs.list().find(({ state, images }) => state === "done" && images.length > 0);
if (newest !== undefined && runningJobs.length === 0) {
  showResult(newest, false);
}
for (const job of runningJobs) {
  if (!ownJobs.has(job.id)) {
    ownJobs.add(job.id);
    runner.resume(job);
  }
}
await form.setModels(await loadModels());
document.documentElement.dataset.ready = "yes";
