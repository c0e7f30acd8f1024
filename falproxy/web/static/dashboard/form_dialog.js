/** A dialog whose form is sent to the proxy. */
import { fetchFromProxy } from "../access_key.js";
import { el } from "../dom.js";

/**
 * Open a dialog with a form.
 *
 * @param {string} title
 * @param {string} action name of the button that sends the form
 * @param {object} options content: nodes; send: returns the request; show: called with the document of the
 *   response and the dialog; onChange: called after it
 */
export function openDialog(
  title,
  action,
  { content, send, show, onChange, isDangerous = false, className = "" },
) {
  const problem = el("p", { className: "problem", role: "alert" });
  const kind = isDangerous ? "danger" : "primary";
  const submit = el("button", { type: "submit", className: `button ${kind}` }, action);
  const form = el(
    "form",
    { method: "dialog" },
    el("h2", { id: "key-dialog-title" }, title),
    ...content,
    el(
      "div",
      { className: "dialog-foot" },
      problem,
      el(
        "div",
        { className: "row end" },
        el(
          "button",
          { type: "button", className: "button quiet", onclick: () => dialog.close() },
          "Cancel",
        ),
        submit,
      ),
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
        await onChange();
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

/** Return an input with its label. @param {string} label @param {HTMLElement} input @param {Node[]} rest */
export function labelled(label, input, ...rest) {
  return el("div", { className: "field" }, el("label", { for: input.id }, label), input, ...rest);
}

/** Return the message of an error response. @param {Response} response */
export async function errorMessage(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `The proxy responded with status ${response.status}.`;
}
