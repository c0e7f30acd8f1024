/** The history as a file: JSON with all jobs, and their small images as data URIs. */
import { el, randomId, safeUrl } from "./dom.js";

const FORMAT = "falproxy-history";
const VERSION = 1;
const BYTES_MAX = 500 * 2 ** 20;
const TEXT_MAX = 100_000; // characters of one value
const KINDS = ["image", "video", "audio"];

/** Download the jobs as a file. @param {import("./jobs.js").Job[]} jobs */
export async function exportJobs(jobs) {
  const entries = [];
  for (const { lines, warning, inputs, before, imageInputs, output, ...job } of jobs) {
    entries.push({
      ...job,
      thumb: job.thumb instanceof Blob ? await readDataUri(job.thumb) : null,
    });
  }
  const document = JSON.stringify({ format: FORMAT, version: VERSION, jobs: entries });
  const url = URL.createObjectURL(new Blob([document], { type: "application/json" }));
  const date = new Date().toISOString().slice(0, 10);
  el("a", { href: url, download: `falproxy-history-${date}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/**
 * Let the user choose a file, and read it.
 *
 * @returns {Promise<{jobs: object[], problem?: string}>} problem: a sentence for the user
 */
export async function chooseAndReadJobs() {
  const input = el("input", {
    type: "file",
    accept: "application/json,.json",
    id: "history-file",
    className: "visually-hidden",
  });
  const label = "A file of the history";
  input.setAttribute("aria-label", label);
  document.body.append(input);
  try {
    const file = await new Promise((resolve) => {
      input.onchange = () => resolve(input.files[0] ?? null);
      input.oncancel = () => resolve(null);
      input.click();
    });
    return file === null ? { jobs: [], problem: "No file was chosen." } : await readJobs(file);
  } finally {
    input.remove();
  }
}

async function readJobs(file) {
  const problem = "This file is not a history that was exported here.";
  if (file.size > BYTES_MAX) {
    return { jobs: [], problem };
  }
  try {
    const document = JSON.parse(await file.text());
    if (
      document.format !== FORMAT ||
      document.version !== VERSION ||
      !Array.isArray(document.jobs)
    ) {
      return { jobs: [], problem };
    }
    const jobs = await Promise.all(document.jobs.map(parseJob));
    return { jobs: jobs.filter((job) => job !== null) };
  } catch {
    return { jobs: [], problem };
  }
}

/** Return a finished job with checked values, or null: the file may come from anyone. */
async function parseJob(entry) {
  const images = (Array.isArray(entry?.images) ? entry.images : []).map(parseImage).filter(Boolean);
  if (images.length === 0) {
    return null;
  }
  const text = (value) => (typeof value === "string" ? value.slice(0, TEXT_MAX) : "");
  const number = (value) => (Number.isFinite(value) ? value : null);
  const isObject =
    typeof entry.options === "object" && entry.options !== null && !Array.isArray(entry.options);
  return {
    id: /^[0-9a-f]{32}$/.test(entry.id) ? entry.id : randomId(),
    state: "done",
    created: number(entry.created) ?? 0,
    ended: number(entry.ended),
    endpoint: text(entry.endpoint),
    model: text(entry.model) || text(entry.endpoint),
    task: ["create", "edit", "animate", "speak"].includes(entry.task) ? entry.task : null,
    price: number(entry.price),
    unit: text(entry.unit) || "image",
    estimate: number(entry.estimate),
    prompt: text(entry.prompt),
    promptName: entry.promptName === "text" ? "text" : "prompt",
    options: isObject ? entry.options : {},
    cacheStatus: text(entry.cacheStatus) || null,
    images,
    seed: number(entry.seed),
    thumb: await readThumb(entry.thumb),
    isHidden: entry.isHidden === true,
  };
}

function parseImage(image) {
  const url = safeUrl(image?.url);
  const size = (value) => (Number.isFinite(value) && value > 0 ? value : null);
  return url === null || url.startsWith("blob:")
    ? null
    : {
        url,
        kind: KINDS.includes(image.kind) ? image.kind : "image",
        width: size(image.width),
        height: size(image.height),
      };
}

async function readThumb(value) {
  const isImage = typeof value === "string" && /^data:image\/(webp|png|jpeg);base64,/.test(value);
  try {
    return isImage ? await (await fetch(value)).blob() : null;
  } catch {
    return null;
  }
}

function readDataUri(blob) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => resolve(null);
    reader.readAsDataURL(blob);
  });
}
