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

/** Whether the price is for units that a job may have several of, such as seconds. */
function isPerUnit({ price, unit }) {
  return typeof price === "number" && !["image", "megapixel"].includes(unit);
}

function pricePerUnit({ price, unit }) {
  return `${price < 0.001 ? `$${price}` : formatUsd(price)} per ${unit}`;
}

/** Format USD: `$0.04`, `$0.003`. @param {number} amount */
export function formatUsd(amount) {
  const digits = amount > 0 && amount < 0.0995 ? 3 : 2;
  return `$${amount.toFixed(digits).replace(/(\.\d\d)0$/, "$1")}`;
}

/**
 * Return the cost of a finished job as a text.
 *
 * @param {{cacheStatus: string | null, price: number | null, unit: string, images: object[]}} job
 * @param {boolean} isSandbox whether nothing is charged
 * @returns {{text: string, isSaving: boolean}}
 */
export function describeCost(job, isSandbox) {
  const price = priceOfImages(job, job.images);
  const outcome = cacheOutcome(job.cacheStatus);
  if (outcome === "hit" || outcome === "shared") {
    const label = outcome === "hit" ? "Hit" : "Shared";
    return {
      text: price === null ? `${label}: not charged` : `${label}: saved ${formatUsd(price)}`,
      isSaving: true,
    };
  }
  const prefix = outcome === null ? "" : "Miss: ";
  if (price === null && isPerUnit(job)) {
    return { text: prefix + pricePerUnit(job), isSaving: false };
  }
  if (price === null) {
    return { text: `${prefix}${prefix ? "p" : "P"}rice unknown`, isSaving: false };
  }
  const about = prefix ? "about" : "About";
  return {
    text: `${prefix}${about} ${formatUsd(price)}${isSandbox ? ", not charged" : ""}`,
    isSaving: false,
  };
}

/**
 * Return the expected cost of a job as a text.
 *
 * @param {{price: number | null, unit: string}} rate
 * @param {number} count number of images
 */
export function estimateCost(rate, count) {
  if (typeof rate.price !== "number") {
    return "Price unknown";
  }
  if (rate.unit === "megapixel") {
    return `${formatUsd(rate.price * count)} per megapixel`;
  }
  if (isPerUnit(rate)) {
    return pricePerUnit(rate);
  }
  return `About ${formatUsd(rate.price * count)}`;
}
