/** The states of the services and stores that the proxy depends on, for those who see all calls. */
import { fetchFromProxy } from "../access_key.js";
import { byId, el } from "../dom.js";
import { formatCount, formatQuantity, formatWhen } from "./format.js";
import { showBudgets } from "./tables.js";
import { setTile } from "./tiles_and_charts.js";
import { rangeQuery } from "./time_range.js";

const NAMES = {
  fal: "fal.ai",
  ledger: "Ledger",
  cache: "Result cache",
  limits: "Limits",
  idempotency: "Idempotency keys",
  storage: "Storage of files",
  owners: "Request owners",
  postgres: "PostgreSQL",
  redis: "Redis",
  supabase: "Supabase",
};

/**
 * Load the state and show it.
 *
 * @param {boolean} isVisible whether the caller may see it @param {AbortSignal} signal
 */
export async function showState(isVisible, signal) {
  byId("in-flight").hidden = !isVisible;
  byId("state-panel").hidden = !isVisible;
  if (!isVisible) {
    return;
  }
  const response = await fetchFromProxy(`api/usage/state?${rangeQuery()}`, { signal });
  if (!response.ok) {
    byId("state-panel").hidden = true;
    return;
  }
  const state = await response.json();
  const jobs = state.running_jobs === null ? "unknown" : formatCount(state.running_jobs);
  const jobsBefore = state.running_jobs_before;
  setTile(
    "in-flight",
    jobs,
    `jobs of the last hour; ${formatQuantity(state.in_progress, "request")} open`,
    jobsBefore === null ? "" : `${formatCount(jobsBefore)} before`,
  );
  byId("state").replaceChildren(
    ...state.dependencies.map(dependencyItem),
    ...state.backup_hosts.map(({ host, is_used }) =>
      item(host, is_used ? "warn" : "good", is_used ? "backup host in use" : "direct"),
    ),
    keysItem(state),
  );
  byId("state-summary").textContent = summary(state);
  await showBudgets(state.budgets, signal);
}

function dependencyItem({ name, is_up, since, error }) {
  const when = `since ${since === null ? "the start" : formatWhen(new Date(since))}`;
  const reason = error === null ? "" : is_up ? `last error ${error}` : error;
  return item(NAMES[name] ?? name, is_up ? "good" : "bad", is_up ? "works" : "fails", [
    when,
    reason,
  ]);
}

function keysItem({ fal_keys, fal_keys_resting }) {
  const hasResting = fal_keys_resting > 0;
  const text = hasResting
    ? `${formatCount(fal_keys_resting)} of ${formatCount(fal_keys)} set aside`
    : `${formatCount(fal_keys)} in use`;
  return item("fal keys", hasResting ? "warn" : "good", text);
}

function item(name, className, text, details = []) {
  const more = details.filter((detail) => detail !== "").join(": ");
  return el(
    "li",
    {},
    el("span", {}, name),
    el("span", { className: `chip ${className}` }, text),
    more && el("span", { className: "muted small" }, more),
  );
}

function summary(state) {
  const parts = [
    `falproxy ${state.version}`,
    formatQuantity(state.workers, "process", "processes"),
    state.started_at === null ? "" : `started ${formatWhen(new Date(state.started_at))}`,
    state.worker_restarts ? `${formatQuantity(state.worker_restarts, "restart")} of workers` : "",
    state.ledger_backlog_rows
      ? `${formatQuantity(state.ledger_backlog_rows, "row")} not written yet`
      : "",
    state.ledger_dropped_rows
      ? `${formatQuantity(state.ledger_dropped_rows, "row")} of the ledger lost`
      : "",
  ];
  return `${parts.filter((part) => part !== "").join(" · ")}`;
}
