/** The keys of callers, for admins of a proxy that requires authentication. */
import { fetchFromProxy } from "../access_key.js";
import { byId, el } from "../dom.js";
import { proxyInfo } from "../proxy_status.js";
import { budgetCell, loadSpending } from "./budgets.js";
import { addExportButton } from "./csv.js";
import { errorMessage } from "./form_dialog.js";
import { NONE } from "./format.js";
import { KEYS_PATH, openCreateDialog, openRevokeDialog, openRotateDialog } from "./key_dialogs.js";
import { setTable } from "./tables.js";

const STATE_CLASSES = { active: "good", expired: "warn", revoked: "bad" };

let isLoading = false;
let isStarted = false;
let shown = [];
let shownNumber = 0; // of the request whose keys are shown
let lastNumber = 0; // of the last request

/** Load the keys and show them, if the caller may see them. @param {object} usage document of `api/usage` */
export async function showKeys(usage) {
  if (!proxyInfo.isLocked || usage.principal !== null || isLoading) {
    return;
  }
  if (!isStarted) {
    isStarted = true;
    addExportButton(byId("keys-panel"), "keys", exportedKeys);
    byId("create-key").addEventListener("click", () => openCreateDialog(refreshKeys));
  }
  await refreshKeys();
}

/** Load the keys again. A response that is older than what is shown is dropped. */
async function refreshKeys() {
  const number = (lastNumber += 1);
  isLoading = true;
  try {
    const response = await fetchFromProxy(KEYS_PATH);
    byId("keys-panel").hidden = !response.ok && response.status !== 503;
    if (response.ok) {
      const { keys } = await response.json();
      const budgets = keys.map(({ budget }) => budget);
      const spending = await loadSpending("principal", budgets);
      if (number > shownNumber) {
        shownNumber = number;
        shown = keys;
        renderKeys(keys, spending);
      }
      showProblem("");
    } else if (response.status === 503) {
      showProblem(await errorMessage(response));
    }
  } catch {
    showProblem("The keys could not be loaded.");
  } finally {
    isLoading = false;
  }
}

function exportedKeys() {
  const names = ["name", "state", "rate", "concurrency", "budget", "expires_at", "last_used_at"];
  const rows = shown.map((key) => [...names.map((name) => key[name]), key.endpoints.join(" ")]);
  return [[...names, "endpoints"], ...rows];
}

function renderKeys(keys, spending) {
  const lines = keys.map((key) => [
    el("th", { scope: "row" }, key.name),
    el(
      "td",
      { className: "text" },
      el("span", { className: `chip ${STATE_CLASSES[key.state]}` }, key.state),
    ),
    el("td", {}, key.rate ?? NONE),
    el("td", {}, key.concurrency === null ? NONE : String(key.concurrency)),
    el("td", { className: "budget" }, budgetCell(key.budget, key.name, spending)),
    el("td", { className: "text wraps" }, key.endpoints.join(", ") || "all"),
    el("td", {}, formatDate(key.expires_at, "never")),
    el("td", {}, formatDate(key.last_used_at, "never")),
    el("td", {}, actions(key)),
  ]);
  const headings = [
    "Name",
    "State",
    "Rate",
    "Concurrency",
    "Budget",
    "Endpoints",
    "Expires",
    "Last used",
    "Actions",
  ];
  setTable("keys", headings, lines, [1, 5]);
}

function actions(key) {
  const button = (name, className, onclick, isEnabled) =>
    el(
      "button",
      {
        type: "button",
        id: `${name.toLowerCase()}-${key.id}`,
        className: `button ${className}`,
        "aria-label": `${name} the key ${key.name}`,
        disabled: !isEnabled,
        onclick,
      },
      name,
    );
  return el(
    "span",
    { className: "key-actions" },
    button("Rotate", "", () => openRotateDialog(key, refreshKeys), key.state === "active"),
    button("Revoke", "danger", () => openRevokeDialog(key, refreshKeys), key.state !== "revoked"),
  );
}

function formatDate(text, none) {
  return text === null
    ? none
    : new Date(text).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

function showProblem(text) {
  byId("keys-problem").textContent = text;
}
