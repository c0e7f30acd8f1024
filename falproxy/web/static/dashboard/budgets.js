/** Budgets, such as `5/day`, and the bars of their used parts. */
import { fetchFromProxy } from "../access_key.js";
import { el } from "../dom.js";
import { formatUsd, NONE } from "./format.js";

const UNITS = { s: 1, m: 60, h: 3600, d: 86_400 };
const NAMED = { second: 1, minute: 60, hour: 3600, day: 86_400, week: 604_800 };
const MONDAY_OFFSET = 4 * 86_400; // seconds: 1970-01-01 was a Thursday
const NEARLY = 0.8; // share from which a budget is nearly used up

/** @typedef {Map<string, Map<string, number>>} Spending USD by period and name */

/**
 * Load the spending in the current window of each budget.
 *
 * @param {"principal" | "user"} by @param {(string | null)[]} budgets
 * @param {AbortSignal} [signal] @returns {Promise<Spending>}
 */
export async function loadSpending(by, budgets, signal) {
  const known = budgets.filter((budget) => budget !== null);
  const periods = new Set(known.map((budget) => budget.split("/")[1]));
  const spending = new Map();
  for (const period of periods) {
    const since = windowStart(period, new Date());
    const path = since && `api/usage?by=${by}&since=${since.toISOString()}`;
    const response = path && (await fetchFromProxy(path, { signal }));
    if (response?.ok) {
      const { rows } = await response.json();
      spending.set(period, new Map(rows.map((row) => [budgetName(row), row.spent ?? 0])));
    }
  }
  return spending;
}

/** Return the name of the caller, or of the user of a caller, in a row of `api/usage`. */
export function budgetName({ name, principal }) {
  return principal === undefined ? name : JSON.stringify([principal, name]);
}

/**
 * Return the bar of the used part of a budget.
 *
 * @param {string | null} budget @param {string} name @param {Spending} spending
 */
export function budgetCell(budget, name, spending) {
  if (budget === null) {
    return NONE;
  }
  const [amount, period] = budget.split("/");
  const limit = Number(amount);
  const spent = spending.get(period)?.get(name) ?? (spending.has(period) ? 0 : null);
  const label = el("span", {}, `$${budget}`);
  if (spent === null || !(limit > 0)) {
    return label;
  }
  const share = Math.min(1, spent / limit);
  const bar = el("span", {
    className: share >= 1 ? "failed" : share >= NEARLY ? "nearly" : "succeeded",
  });
  bar.style.width = `${share * 100}%`;
  return el(
    "span",
    { className: "budget-cell" },
    label,
    el("span", { className: "call-bar", "aria-hidden": "true" }, bar),
    el("span", { className: "small muted" }, `${formatUsd(spent)} spent`),
  );
}

/** Return the start of the current window, in UTC; null for one that is not known. */
function windowStart(period, now) {
  if (period === "month") {
    return new Date(Date.UTC(now.getUTCFullYear(), now.getUTCMonth(), 1));
  }
  const match = /^(\d+)([smhd])$/.exec(period);
  const seconds = NAMED[period] ?? (match ? Number(match[1]) * UNITS[match[2]] : null);
  if (seconds === null) {
    return null;
  }
  const offset = seconds % NAMED.week === 0 ? MONDAY_OFFSET : 0;
  return new Date(
    (Math.floor((now.getTime() / 1000 - offset) / seconds) * seconds + offset) * 1000,
  );
}
