/** Numbers and times in words, as the person's browser writes them. */

const whole = new Intl.NumberFormat();
const compact = new Intl.NumberFormat(undefined, { notation: "compact", maximumFractionDigits: 1 });
const percent = new Intl.NumberFormat(undefined, { style: "percent", maximumFractionDigits: 1 });

export const UNKNOWN = "unknown";
export const NONE = "–";

/** @param {number} value */
export function count(value) {
  return whole.format(value);
}

/** Short, for an axis. @param {number} value */
export function shortCount(value) {
  return value < 10_000 ? whole.format(value) : compact.format(value);
}

/** @param {number | null} value */
export function share(value) {
  return value === null ? NONE : percent.format(value);
}

/** USD. What is below a dollar keeps its digits: prices are. @param {number | null} value */
export function dollars(value) {
  if (value === null) {
    return UNKNOWN;
  }
  const digits = value < 1 ? 6 : 2;
  const format = { minimumFractionDigits: 2, maximumFractionDigits: digits };
  return `$${value.toLocaleString(undefined, format)}`;
}

/** Seconds in the unit that suits them. @param {number | null} value */
export function duration(value) {
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

/** A count and its noun. @param {number} value @param {string} one @param {string} [many] */
export function plural(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

const TIME = { hour: "2-digit", minute: "2-digit" };
const DAY = { day: "numeric", month: "short" };

/** When a step begins, in full. Days are UTC's. @param {Date} at @param {string} step */
export function moment(at, step) {
  if (step === "day") {
    return `${at.toLocaleDateString(undefined, { ...DAY, weekday: "short", timeZone: "UTC" })} (UTC)`;
  }
  return at.toLocaleString(undefined, step === "hour" ? { ...DAY, ...TIME } : TIME);
}

/** The same for an axis that spans so many milliseconds. @param {Date} at */
export function tick(at, step, span) {
  if (step === "day") {
    return at.toLocaleDateString(undefined, { ...DAY, timeZone: "UTC" });
  }
  return span > 36 * 3_600_000
    ? at.toLocaleDateString(undefined, DAY)
    : at.toLocaleTimeString(undefined, TIME);
}

/** @param {Date} at */
export function clock(at) {
  return at.toLocaleTimeString();
}
