/** Dialogs that create, rotate and revoke a key. */
import { byId, el } from "../dom.js";
import { labelled, openDialog } from "./form_dialog.js";

export const KEYS_PATH = "api/keys";
const LIMITS = [
  ["rate", "Rate", "60/minute", "Model calls in a window."],
  ["concurrency", "Concurrency", "8", "Model calls at once."],
  ["budget", "Budget in USD", "5/day", "In a window, such as a day or month."],
  [
    "endpoints",
    "Endpoints",
    "fal-ai/flux**",
    "Patterns, comma separated. Empty: all that the proxy allows.",
  ],
  ["expires", "Expires", "90d", "After a time, or on a date such as 2027-01-31. Empty: never."],
];

/** @param {() => Promise<void>} onChange called when the key is created */
export function openCreateDialog(onChange) {
  const name = el("input", {
    id: "key-name",
    required: true,
    autocomplete: "off",
    spellcheck: false,
  });
  const inputs = LIMITS.map(([field, label, placeholder, hint]) => {
    const id = `key-${field}`;
    const input = el("input", {
      id,
      placeholder,
      autocomplete: "off",
      "aria-describedby": `${id}-hint`,
    });
    const line = el("p", { className: "hint", id: `${id}-hint` }, hint);
    return { field, input, node: labelled(label, input, line) };
  });
  openDialog("Create a key", "Create", {
    content: [labelled("Name", name), ...inputs.map(({ node }) => node)],
    className: "wide",
    send: () => {
      const given = inputs.filter(({ input }) => input.value.trim() !== "");
      const fields = Object.fromEntries(
        given.map(({ field, input }) => [field, input.value.trim()]),
      );
      return { path: KEYS_PATH, method: "POST", body: { name: name.value.trim(), ...fields } };
    },
    show: showSecret,
    onChange,
  });
  name.focus();
}

/** @param {object} key @param {() => Promise<void>} onChange called when the secret is replaced */
export function openRotateDialog(key, onChange) {
  const id = "key-grace";
  const grace = el("input", {
    id,
    placeholder: "1h",
    autocomplete: "off",
    "aria-describedby": `${id}-hint`,
  });
  const explanation = "How long the old secret stays valid. Empty: not at all.";
  const hint = el("p", { className: "hint", id: `${id}-hint` }, explanation);
  openDialog(`Rotate the key ${key.name}?`, "Rotate", {
    content: [
      el(
        "p",
        { className: "muted" },
        "The key gets a new secret, and keeps its name, limits and jobs.",
      ),
      labelled("Grace period", grace, hint),
    ],
    send: () => ({
      path: `${KEYS_PATH}/${key.id}/rotate`,
      method: "POST",
      body: grace.value.trim() === "" ? {} : { grace: grace.value.trim() },
    }),
    show: showSecret,
    onChange,
  });
  grace.focus();
}

/** @param {object} key @param {() => Promise<void>} onChange called when the key is revoked */
export function openRevokeDialog(key, onChange) {
  openDialog(`Revoke the key ${key.name}?`, "Revoke", {
    content: [
      el("p", {}, "Its calls are refused within five seconds, also those about its running jobs."),
      el("p", {}, "This cannot be undone."),
    ],
    isDangerous: true,
    send: () => ({ path: `${KEYS_PATH}/${key.id}`, method: "DELETE" }),
    show: (revoked, dialog) => {
      announce(`The key ${revoked.name} is revoked.`);
      dialog.close();
    },
    onChange,
  });
}

/** Replace the content of a dialog by the secret of a key, which is shown only here. */
function showSecret(key, dialog) {
  const secret = el("input", {
    id: "key-secret",
    className: "mono",
    readOnly: true,
    value: key.secret,
    autocomplete: "off",
    spellcheck: false,
    onfocus: () => secret.select(),
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
  const done = el(
    "button",
    { type: "button", className: "button", onclick: () => dialog.close() },
    "Done",
  );
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

function announce(text) {
  byId("announcer").textContent = text;
}
