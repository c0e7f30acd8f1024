/** Numbers and times as texts, in the browser's locale. */

const wholeFormat = new Intl.NumberFormat();
const compactFormat = new Intl.NumberFormat(undefined, {
  notation: "compact",
  maximumFractionDigits: 1,
});
const percentFormat = new Intl.NumberFormat(undefined, {
  style: "percent",
  maximumFractionDigits: 1,
});

export const UNKNOWN = "unknown";
export const NONE = "–";

/** @param {number} value */
export function formatCount(value) {
  return wholeFormat.format(value);
}

/** Short form for an axis. @param {number} value */
export function formatShortCount(value) {
  return value < 10_000 ? wholeFormat.format(value) : compactFormat.format(value);
}

/** @param {number | null} value a share from 0 to 1 */
export function formatPercent(value) {
  return value === null ? NONE : percentFormat.format(value);
}

/** USD. Prices of less than a dollar have up to six digits. @param {number | null} value */
export function formatUsd(value) {
  if (value === null) {
    return UNKNOWN;
  }
  const digits = value < 1 ? 6 : 2;
  const format = { minimumFractionDigits: 2, maximumFractionDigits: digits };
  return `$${value.toLocaleString(undefined, format)}`;
}

/** In ms, s or min. @param {number | null} value seconds */
export function formatDuration(value) {
  if (value === null) {
    return NONE;
  }
  if (value === 0) {
    return "0 s";
  }
  if (value < 1) {
    const digits = { maximumSignificantDigits: 3, maximumFractionDigits: 2 };
    return `${(value * 1000).toLocaleString(undefined, digits)} ms`;
  }
  if (value < 120) {
    return `${value.toLocaleString(undefined, { maximumSignificantDigits: 3 })} s`;
  }
  return `${(value / 60).toLocaleString(undefined, { maximumSignificantDigits: 3 })} min`;
}

/** A count and its noun. @param {number} value @param {string} noun @param {string} [plural] */
export function formatQuantity(value, noun, plural = `${noun}s`) {
  return `${formatCount(value)} ${value === 1 ? noun : plural}`;
}

const TIME = { hour: "2-digit", minute: "2-digit" };
const DAY = { day: "numeric", month: "short" };

/** The full start time of an interval. Days are in UTC. @param {Date} at @param {string} step */
export function formatIntervalStart(at, step) {
  if (step === "day") {
    return `${at.toLocaleDateString(undefined, { ...DAY, weekday: "short", timeZone: "UTC" })} (UTC)`;
  }
  return at.toLocaleString(undefined, step === "hour" ? { ...DAY, ...TIME } : TIME);
}

/** The same as a label of an axis. @param {Date} at @param {string} step @param {number} span ms */
export function formatAxisTime(at, step, span) {
  if (step === "day") {
    return at.toLocaleDateString(undefined, { ...DAY, timeZone: "UTC" });
  }
  return span > 36 * 3_600_000
    ? at.toLocaleDateString(undefined, DAY)
    : at.toLocaleTimeString(undefined, TIME);
}

/** @param {Date} at */
export function formatTime(at) {
  return at.toLocaleTimeString();
}

/** A time with its day if that is not today. @param {Date} at */
export function formatWhen(at) {
  return isToday(at) ? at.toLocaleTimeString() : at.toLocaleString(undefined, { ...DAY, ...TIME });
}

/** The same without seconds. @param {Date} at */
export function formatMinute(at) {
  return at.toLocaleString(undefined, isToday(at) ? TIME : { ...DAY, ...TIME });
}

function isToday(at) {
  return at.toDateString() === new Date().toDateString();
}
