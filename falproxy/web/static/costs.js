/** What a job costs, or has saved. Amounts are USD; null is not known, which is not 0. */

/**
 * What the proxy's cache did with a call, from its `Cache-Status` (RFC 9211).
 *
 * @param {string | null | undefined} header
 * @returns {"hit" | "shared" | "miss" | "bypass" | null} shared: with an equal call under way; null:
 *   the proxy keeps no results of such calls
 */
export function outcomeOf(header) {
  const own = (header ?? "")
    .split(",")
    .map((part) => part.trim())
    .find((part) => part.startsWith("falproxy"));
  const words = (own ?? "").split(";").map((word) => word.trim());
  if (words.includes("hit")) {
    return "hit";
  }
  if (words.includes("collapsed")) {
    return "shared";
  }
  const fwd = words.find((word) => word.startsWith("fwd="));
  return fwd === undefined ? null : fwd === "fwd=bypass" ? "bypass" : "miss";
}

/**
 * The price of pictures by a model's rate.
 *
 * @param {{price: number | null, unit: string}} rate
 * @param {{width?: number, height?: number}[]} images
 * @returns {number | null}
 */
export function priceOf(rate, images) {
  if (typeof rate.price !== "number") {
    return null;
  }
  if (rate.unit !== "megapixel") {
    return rate.price * images.length;
  }
  if (!images.every((image) => image.width > 0 && image.height > 0)) {
    return null;
  }
  // fal rounds each picture up to whole megapixels.
  const megapixels = images.reduce(
    (sum, { width, height }) => sum + Math.ceil((width * height) / 1e6),
    0,
  );
  return rate.price * megapixels;
}

/** `$0.04`, `$0.003`. @param {number} amount */
export function usd(amount) {
  const digits = amount > 0 && amount < 0.0995 ? 3 : 2;
  return `$${amount.toFixed(digits).replace(/(\.\d\d)0$/, "$1")}`;
}

/**
 * What a finished job cost, in a few words.
 *
 * @param {{cacheStatus: string | null, price: number | null, unit: string, images: object[]}} job
 * @param {boolean} isSandbox whether nothing is paid in any case
 * @returns {{text: string, isGood: boolean}}
 */
export function costOf(job, isSandbox) {
  const price = priceOf(job, job.images);
  const outcome = outcomeOf(job.cacheStatus);
  if (outcome === "hit" || outcome === "shared") {
    const how = outcome === "hit" ? "Hit" : "Shared";
    return {
      text: price === null ? `${how}: nothing paid` : `${how}: saved ${usd(price)}`,
      isGood: true,
    };
  }
  const head = outcome === null ? "" : "Miss: ";
  if (price === null) {
    return { text: `${head}${head ? "p" : "P"}rice not known`, isGood: false };
  }
  const about = head ? "about" : "About";
  return {
    text: `${head}${about} ${usd(price)}${isSandbox ? ", not charged" : ""}`,
    isGood: false,
  };
}

/**
 * What a call is going to cost, in a few words.
 *
 * @param {{price: number | null, unit: string}} rate
 * @param {number} count of pictures
 */
export function estimate(rate, count) {
  if (typeof rate.price !== "number") {
    return "Price not known";
  }
  if (rate.unit === "megapixel") {
    return `${usd(rate.price * count)} a megapixel`;
  }
  return `About ${usd(rate.price * count)}`;
}
