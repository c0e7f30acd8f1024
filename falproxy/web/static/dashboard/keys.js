/** The keys of callers, for admins of a proxy that requires authentication. */
import { fetchFromProxy } from "../access_key.js";
import { byId, el } from "../dom.js";
import { proxyInfo } from "../proxy_status.js";
import { NONE } from "./format.js";
import { setTable } from "./tables.js";

const PATH = "api/keys";
const STATE_CLASSES = { active: "good", expired: "warn", revoked: "bad" };
const LIMITS = [
  ["rate", "Rate", "60/minute", "Model calls in a window."],
  ["concurrency", "Concurrency", "8", "Model calls at once."],
  ["budget", "Budget in USD", "5/day", "In a window, such as a day or month."],
  ["endpoints", "Endpoints", "fal-ai/flux*", "Patterns, comma separated. Empty: all that the proxy allows."],
  ["expires", "Expires", "90d", "After a time, or on a date such as 2027-01-31. Empty: never."],
];

let isLoading = false;
let isStarted = false;

/** Load the keys and show them, if the caller may see them. @param {object} usage document of `api/usage` */
export async function showKeys(usage) {
  if (!proxyInfo.isLocked || usage.principal !== null || isLoading) {
    return;
  }
  if (!isStarted) {
    isStarted = true;
    byId("create-key").addEventListener("click", openCreateDialog);
  }
  await refreshKeys();
}

async function refreshKeys() {
  isLoading = true;
  try {
    const response = await fetchFromProxy(PATH);
    byId("keys-panel").hidden = !response.ok && response.status !== 503;
    if (response.ok) {
      renderKeys((await response.json()).keys);
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

function renderKeys(keys) {
  const lines = keys.map((key) => [
    el("th", { scope: "row" }, key.name),
    el("td", { className: "text" }, el("span", { className: `chip ${STATE_CLASSES[key.state]}` }, key.state)),
    el("td", {}, key.rate ?? NONE),
    el("td", {}, key.concurrency === null ? NONE : String(key.concurrency)),
    el("td", {}, key.budget === null ? NONE : `$${key.budget}`),
    el("td", { className: "text" }, key.endpoints.join(", ") || "all"),
    el("td", {}, formatDate(key.expires_at, "never")),
    el("td", {}, formatDate(key.last_used_at, "never")),
    el("td", {}, actions(key)),
  ]);
  const headings = [
    "Name", "State", "Rate", "Concurrency", "Budget", "Endpoints", "Expires", "Last used", "Actions",
  ];
  keepFocus(() => setTable("keys", headings, lines, [1, 5]));
}

/** Run `render`, which replaces the buttons of the table, and focus the same button again. */
function keepFocus(render) {
  const id = byId("keys").contains(document.activeElement) ? document.activeElement.id : "";
  render();
  if (id) {
    byId(id)?.focus();
  }
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
    button("Rotate", "", () => openRotateDialog(key), key.state === "active"),
    button("Revoke", "danger", () => openRevokeDialog(key), key.state !== "revoked"),
  );
}

function openCreateDialog() {
  const name = el("input", { id: "key-name", required: true, autocomplete: "off", spellcheck: false });
  const inputs = LIMITS.map(([field, label, placeholder, hint]) => {
    const id = `key-${field}`;
    const input = el("input", { id, placeholder, autocomplete: "off", "aria-describedby": `${id}-hint` });
    const line = el("p", { className: "hint", id: `${id}-hint` }, hint);
    return { field, input, node: labelled(label, input, line) };
  });
  openDialog("Create a key", "Create", {
    content: [labelled("Name", name), ...inputs.map(({ node }) => node)],
    className: "wide",
    send: () => {
      const given = inputs.filter(({ input }) => input.value.trim() !== "");
      const fields = Object.fromEntries(given.map(({ field, input }) => [field, input.value.trim()]));
      return { path: PATH, method: "POST", body: { name: name.value.trim(), ...fields } };
    },
    show: showSecret,
  });
  name.focus();
}

function openRotateDialog(key) {
  const grace = el("input", { id: "key-grace", placeholder: "1h", autocomplete: "off", "aria-describedby": "key-grace-hint" });
  const hint = el("p", { className: "hint", id: "key-grace-hint" }, "How long the old secret stays valid. Empty: not at all.");
  openDialog(`Rotate the key ${key.name}?`, "Rotate", {
    content: [
      el("p", { className: "muted" }, "The key gets a new secret, and keeps its name, limits and jobs."),
      labelled("Grace period", grace, hint),
    ],
    send: () => ({
      path: `${PATH}/${key.id}/rotate`,
      method: "POST",
      body: grace.value.trim() === "" ? {} : { grace: grace.value.trim() },
    }),
    show: showSecret,
  });
  grace.focus();
}

function openRevokeDialog(key) {
  openDialog(`Revoke the key ${key.name}?`, "Revoke", {
    content: [
      el("p", {}, "Its calls are refused within five seconds, also those about its running jobs. This cannot be undone."),
    ],
    isDangerous: true,
    send: () => ({ path: `${PATH}/${key.id}`, method: "DELETE" }),
    show: (revoked, dialog) => {
      announce(`The key ${revoked.name} is revoked.`);
      dialog.close();
    },
  });
}

/**
 * Open a dialog with a form.
 *
 * @param {string} title
 * @param {string} action name of the button that sends the form
 * @param {object} options content: nodes; send: returns the request; show: called with the document of the
 *   response and the dialog
 */
function openDialog(title, action, { content, send, show, isDangerous = false, className = "" }) {
  const problem = el("p", { className: "problem", role: "alert" });
  const kind = isDangerous ? "danger" : "primary";
  const submit = el("button", { type: "submit", className: `button ${kind}` }, action);
  const form = el(
    "form",
    { method: "dialog" },
    el("h2", { id: "key-dialog-title" }, title),
    ...content,
    problem,
    el(
      "div",
      { className: "row end" },
      el("button", { type: "button", className: "button quiet", onclick: () => dialog.close() }, "Cancel"),
      submit,
    ),
  );
  const dialog = el("dialog", { className, "aria-labelledby": "key-dialog-title" }, form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    submit.disabled = true;
    problem.textContent = "";
    try {
      const { path, method, body } = send();
      const response = await fetchFromProxy(path, {
        method,
        headers: body === undefined ? {} : { "Content-Type": "application/json" },
        body: body === undefined ? undefined : JSON.stringify(body),
      });
      if (response.ok) {
        show(await response.json(), dialog);
        await refreshKeys();
      } else {
        problem.textContent = await errorMessage(response);
      }
    } catch {
      problem.textContent = "The proxy does not respond. Look at the list before you try again.";
    }
    submit.disabled = false;
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

/** Replace the content of a dialog by the secret of a key, which is shown only here. */
function showSecret(key, dialog) {
  const secret = el("input", {
    id: "key-secret", className: "mono", readOnly: true, value: key.secret, autocomplete: "off",
    spellcheck: false, onfocus: () => secret.select(),
  });
  const copied = el("span", { className: "muted small", role: "status" });
  const copy = el(
    "button",
    {
      type: "button",
      className: "button primary",
      onclick: async () => {
        copied.textContent = (await copyText(secret)) ? "Copied." : "Press Ctrl+C to copy.";
      },
    },
    "Copy",
  );
  const done = el("button", { type: "button", className: "button", onclick: () => dialog.close() }, "Done");
  dialog.replaceChildren(
    el(
      "div",
      { className: "secret" },
      el("h2", { id: "key-dialog-title" }, `The key ${key.name}`),
      el("p", { className: "notice warn" }, "Store the secret now: it is not shown again."),
      labelled("Secret", secret),
      el("div", { className: "row end" }, copied, copy, done),
    ),
  );
  copy.focus();
}

/** Return whether the text was copied. Without https, browsers offer the older way only. */
async function copyText(input) {
  try {
    await navigator.clipboard.writeText(input.value);
    return true;
  } catch {
    input.select();
    return document.execCommand("copy");
  }
}

function labelled(label, input, ...rest) {
  return el("div", { className: "field" }, el("label", { for: input.id }, label), input, ...rest);
}

async function errorMessage(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `The proxy responded with status ${response.status}.`;
}

function formatDate(text, none) {
  return text === null ? none : new Date(text).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

function showProblem(text) {
  byId("keys-problem").textContent = text;
}

function announce(text) {
  byId("announcer").textContent = text;
}
