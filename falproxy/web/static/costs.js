/** Costs and savings of jobs. Amounts are USD; null means unknown, which is not 0. */

/**
 * @param {string | null | undefined} header `Cache-Status` of a response (RFC 9211)
 * @returns {"hit" | "shared" | "miss" | "bypass" | null} shared: with an identical request in progress;
 *   null: the cache is off, or does not apply to such requests
 */
export function cacheOutcome(header) {
  const entry = (header ?? "")
    .split(",")
    .map((part) => part.trim())
    .find((part) => part.startsWith("falproxy"));
  const parameters = (entry ?? "").split(";").map((parameter) => parameter.trim());
  if (parameters.includes("hit")) {
    return "hit";
  }
  if (parameters.includes("collapsed")) {
    return "shared";
  }
  const fwd = parameters.find((parameter) => parameter.startsWith("fwd="));
  return fwd === undefined ? null : fwd === "fwd=bypass" ? "bypass" : "miss";
}

/**
 * Return the price of images, or null.
 *
 * @param {{price: number | null, unit: string}} rate
 * @param {{width?: number, height?: number}[]} images
 * @returns {number | null}
 */
export function priceOfImages(rate, images) {
  if (typeof rate.price !== "number") {
    return null;
  }
  if (rate.unit === "image") {
    return rate.price * images.length;
  }
  if (rate.unit !== "megapixel") {
    return null;
  }
  if (!images.every((image) => image.width > 0 && image.height > 0)) {
    return null;
  }
  // fal rounds each image up to whole megapixels, of which 1024x1024 is one.
  const megapixels = images.reduce(
    (sum, { width, height }) => sum + Math.ceil((width * height) / 1024 ** 2),
    0,
  );
  return rate.price * megapixels;
}

/** Format USD: `$0.04`, `$0.003`. @param {number} amount */
export function formatUsd(amount) {
  if (amount > 0 && amount < 0.001) {
    return `$${Number(amount.toPrecision(2))}`;
  }
  const digits = amount > 0 && amount < 0.0995 ? 3 : 2;
  return `$${amount.toFixed(digits).replace(/(\.\d\d)0$/, "$1")}`;
}

/**
 * Return the expected cost of a job in USD, or null.
 *
 * @param {import("./models.js").Model} model
 * @param {{prompt: string, options: Record<string, unknown>, count?: number}} inputs count: of images
 */
export function estimateUsd(model, { prompt, options, count = 1 }) {
  const { price, unit, defaults } = model;
  if (typeof price !== "number") {
    return null;
  }
  const images = Number(options.num_images ?? count) || 1;
  switch (unit) {
    case "image":
      return price * images;
    case "megapixel":
      return price * images * megapixelsOf(options.image_size);
    case "second": {
      const seconds = Number.parseFloat(options.duration ?? defaults?.duration ?? "");
      return Number.isFinite(seconds) ? price * seconds : null;
    }
    case "1000 characters":
      return prompt === "" ? null : (price * prompt.length) / 1000;
    case "video":
    case "audio":
    case "request":
      return price;
    default:
      return null;
  }
}

/** Whole megapixels of an image size. All sizes with a name have at most one. */
function megapixelsOf(size) {
  const isCustom = typeof size === "object" && size !== null;
  return isCustom ? Math.max(1, Math.ceil((size.width * size.height) / 1024 ** 2)) : 1;
}

/** Return the expected cost of a job as a text: `≈ $0.05 for 2 images`. */
export function describeEstimate(model, inputs, isSandbox) {
  const usd = estimateUsd(model, inputs);
  const images = Number(inputs.options.num_images ?? inputs.count ?? 1) || 1;
  const isByImage = ["image", "megapixel"].includes(model.unit);
  const amount =
    usd !== null
      ? `≈ ${formatUsd(usd)}${isByImage && images > 1 ? ` for ${images} images` : ""}`
      : describePrice(model);
  return isSandbox ? `Free here; at fal ${amount.replace(/^P/, "p")}` : amount;
}

/** Return the price of a model as a text: `$0.07 per second`. */
export function describePrice({ price, unit }) {
  return typeof price === "number" ? `${formatUsd(price)} per ${unit}` : "Price unknown";
}

/**
 * Return the cost of a finished job as a text.
 *
 * @param {{cacheStatus: string | null, price: number | null, unit: string, images: object[],
 *   estimate: number | null}} job
 * @param {boolean} isSandbox whether nothing is charged
 * @returns {{text: string, isSaving: boolean}}
 */
export function describeCost(job, isSandbox) {
  const price = priceOfImages(job, job.images) ?? job.estimate ?? null;
  const outcome = cacheOutcome(job.cacheStatus);
  if (outcome === "hit" || outcome === "shared") {
    const saved = price === null ? "" : `, saved ${formatUsd(price)}`;
    return { text: `Reused${saved}`, isSaving: true };
  }
  if (isSandbox) {
    return { text: "Sandbox: free", isSaving: false };
  }
  if (price === null) {
    return { text: describePrice(job), isSaving: false };
  }
  return { text: formatUsd(price), isSaving: false };
}
