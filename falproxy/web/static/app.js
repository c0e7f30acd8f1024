/** Entry point of the page: creates its parts and connects them. */
import { allowPrompt, getAccessKey } from "./access_key.js";
import { estimateUsd } from "./costs.js";
import { byId, el, randomId, safeUrl } from "./dom.js";
import { showExamples } from "./examples.js";
import { FormDraft } from "./form_draft.js";
import { renderHeader } from "./header.js";
import { JobHistory } from "./history.js";
import { copyText, imageAsInput } from "./image_actions.js";
import { createBeforeImage } from "./image_files.js";
import { resolveImageInputs } from "./image_upload.js";
import { JobForm } from "./job_form.js";
import { JobRows, announce } from "./job_rows.js";
import { JobRunner } from "./job_runner.js";
import { openJobStore } from "./job_store.js";
import { Jobs, isRunning } from "./jobs.js";
import { startMenus } from "./menus.js";
import { isEndpointId, loadModels } from "./models.js";
import { loadProxyInfo, proxyInfo, startStatusChips } from "./proxy_status.js";
import { onlyOnce } from "./repeat_filter.js";
import { ResultView } from "./result_view.js";
import { parseFragment, shareLink } from "./share_link.js";
import { closeSheet, openSheet, startSheet } from "./sheet.js";
import { hasTabLocks } from "./tab_coordination.js";
import { showToast } from "./toast.js";

const DOUBLE_CLICK_TIME = 500; // ms
const ownJobs = new Set(); // ids of jobs that this tab runs, or waits to take over

renderHeader("page");
startStatusChips();
startMenus();
startSheet();
window.addEventListener("unhandledrejection", (event) => {
  if (event.reason instanceof TypeError && /import/i.test(event.reason.message)) {
    event.preventDefault();
    showToast("This part of the page could not be loaded: the proxy does not respond.");
  }
});
const form = new JobForm((request) => startJob(request));
const [store] = await Promise.all([openJobStore(), loadProxyInfo()]);
const jobs = new Jobs(store);
const draft = new FormDraft(form, store.db);
const runner = new JobRunner(jobs);
const resultView = new ResultView({
  onReuse: reuse,
  onVariation: (job) => rerun(job, { seed: job.seed === null ? undefined : randomSeed() }),
  onLockSeed: lockSeed,
  onInput: async (job, index) => {
    const image = await imageAsInput(job, index);
    await form.setTask("edit");
    await form.images.setValues([]);
    await form.addImage(image);
  },
  onCompare: async (job, index) => {
    const { openCompareDialog } = await import("./compare_dialog.js");
    openCompareDialog(job, index, jobs.list());
  },
  onCode: openCode,
  onShare: (job) => share({ ...job, options: withSeed(job) }),
});
new JobRows(jobs, {
  onReuse: reuse,
  // The row vanishes: the second click of a double click meets the next one.
  onRetry: onlyOnce((job) => {
    jobs.remove([job.id]);
    rerun(job, {});
  }, DOUBLE_CLICK_TIME),
  onCancel: (job) => runner.cancel(job),
});
const history = new JobHistory(jobs, {
  onShow: (job) => {
    showResult(job);
    byId("result-view").scrollIntoView({ block: "nearest" });
  },
});

function showResult(job) {
  resultView.showJob(job);
  history.markCurrent(job.id);
}

jobs.addEventListener("change", ({ detail: { job } }) => {
  if (job.state === "done" && ownJobs.delete(job.id)) {
    const count = job.images.length;
    form.allowRepeat();
    announce(`Done: ${count === 1 ? "one result" : `${count} results`}. ${job.prompt}`);
    showResult(job);
  } else if (isRunning(job) && !ownJobs.has(job.id) && hasTabLocks) {
    ownJobs.add(job.id); // of another tab: this one takes over when that is closed
    runner.resume(job);
  }
  if (isRunning(job) && resultView.isEmpty) {
    resultView.showProgress(job);
  } else if (!isRunning(job)) {
    resultView.endProgress(job);
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
async function startJob({ model, prompt, promptName, options, imageInputs }) {
  allowPrompt();
  const images = imageInputs.flatMap((input) => input.images);
  const first = images[0];
  const job = {
    id: randomId(),
    state: "preparing",
    created: Date.now(),
    ended: null,
    endpoint: model.endpoint,
    model: model.title,
    task: model.task,
    price: model.price,
    unit: model.unit,
    estimate: estimateUsd(model, { prompt, options }),
    prompt,
    promptName,
    options,
    inputs: images.length,
    imageInputs,
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
  closeSheet();
  const running = runner.start(job, async (signal) => {
    const before = first && "file" in first ? await createBeforeImage(first.file) : job.before;
    await jobs.saveChanges(job, { before });
    const onProgress = (uploaded) => jobs.showChanges(job, { uploaded });
    const { input, stored } = await resolveImageInputs(imageInputs, signal, onProgress);
    await jobs.saveChanges(job, { imageInputs: stored, uploaded: undefined });
    return { ...(prompt && { [promptName]: prompt }), ...options, ...input };
  });
  await jobs.saveChanges(job, {});
  if (window.matchMedia("(max-width: 999px)").matches) {
    byId("results").scrollIntoView();
  }
  await running;
}

/** Run the inputs of a job again. @param {object} options those that change; undefined removes one */
async function rerun(job, options) {
  if (hasLostImages(job)) {
    await reuse(job);
    return;
  }
  const { endpoint, model, price, unit, prompt, promptName, imageInputs } = job;
  const merged = Object.entries({ ...job.options, ...options }).filter(
    ([, value]) => value !== undefined,
  );
  startJob({
    model: form.findModel({ endpoint, title: model, price, unit }),
    prompt,
    promptName,
    options: Object.fromEntries(merged),
    imageInputs,
  });
}

/** Otherwise the result cache could return the same result. */
const randomSeed = () => Math.floor(Math.random() * 2 ** 31);

const withSeed = ({ options, seed }) => (seed === null ? options : { ...options, seed });

const hasLostImages = ({ imageInputs, inputs }) =>
  imageInputs.flatMap(({ images }) => images).length < inputs;

async function reuse(job) {
  await form.fill({ ...job, options: withSeed(job) });
  if (hasLostImages(job)) {
    showToast("The images of this job are not stored any more: choose them again, then run it.");
  }
  openSheet();
  byId("prompt").focus();
}

async function lockSeed(job) {
  const hasSeed = form.setOption("seed", job.seed);
  showToast(hasSeed ? `Seed ${job.seed} is locked for the next runs.` : "This model has no seed.");
}

async function openCode(settings) {
  const { openCodeDialog } = await import("./code_dialog.js");
  openCodeDialog(settings);
}

async function share(settings) {
  const isCopied = await copyText(shareLink(settings));
  const hasImages = settings.imageInputs?.some(({ images }) => images.length > 0);
  const suffix = hasImages ? " It does not contain the images." : "";
  showToast(
    isCopied
      ? `The link is in the clipboard.${suffix}`
      : "The browser does not allow the page to use the clipboard.",
  );
}

function currentSettings() {
  const { model, ...request } = form.request;
  return { ...request, endpoint: model.endpoint, task: model.task };
}

byId("copy-form-code").addEventListener("click", () => openCode(currentSettings()));
byId("share-form").addEventListener("click", () => share(currentSettings()));
byId("show-examples").addEventListener("click", () => {
  resultView.showWelcome();
  history.markCurrent(null);
  closeSheet();
  byId("welcome").scrollIntoView({ block: "nearest" });
  byId("examples").querySelector("button").focus({ preventScroll: true });
});
form.addEventListener("invalid", openSheet);
form.addEventListener("change", () => {
  draft.save();
  showExamples(form);
});

/** Fill the form from a link, or change its task. @param {object | null} settings see `parseFragment` */
async function applyLink(settings) {
  if (settings === null) {
    return;
  }
  const { task, endpoint, prompt, options } = settings;
  if (endpoint !== null && isEndpointId(endpoint)) {
    await form.fill({ endpoint, prompt, options });
  } else if (form.tasks.includes(task) && task !== form.task) {
    await form.setTask(task);
  }
  // The fragment is used once: a reload keeps what was changed since.
  window.history.replaceState(null, "", `${location.pathname}${location.search}`);
}

async function fillAtStart() {
  const link = parseFragment(location.hash);
  const isComplete = link?.endpoint && isEndpointId(link.endpoint);
  if (!isComplete && !(await draft.restore())) {
    await form.setTask(form.tasks.includes("create") ? "create" : form.tasks[0]);
  }
  await applyLink(link);
  draft.start();
}

if (proxyInfo.isSandbox) {
  byId("welcome-text").textContent =
    "Write a prompt, or start from an example. This is the sandbox: results are drawn on this " +
    "machine, nothing is charged.";
}
const runningJobs = await jobs.load();
const newest = jobs.list().find(({ state, images }) => state === "done" && images.length > 0);
if (newest !== undefined && runningJobs.length === 0) {
  showResult(newest);
}
for (const job of runningJobs) {
  if (!ownJobs.has(job.id)) {
    ownJobs.add(job.id);
    runner.resume(job);
  }
}
form.setModels(await loadModels());
await fillAtStart();
window.addEventListener("hashchange", () => applyLink(parseFragment(location.hash)));
// A key that was entered later: it is checked, and the models are those of its caller.
window.addEventListener("falproxy:key", async () => {
  if (getAccessKey() !== null) {
    form.setModels(await loadModels());
    if (byId("prompt").value === "" && form.tasks.includes("create")) {
      await form.setTask("create");
    }
  }
});
document.documentElement.dataset.ready = "yes";
