/**
 * Links to the page with the content of the form in their fragment: never a key, never an image. A
 * fragment is not sent to any server.
 */

const NAMES = ["task", "model", "prompt", "options"];

/**
 * Return the link to a request.
 *
 * @param {{endpoint: string, task?: string | null, prompt: string, options: object}} settings
 */
export function shareLink({ endpoint, task, prompt, options }) {
  const values = {
    task: task ?? "",
    model: endpoint,
    prompt,
    options: Object.keys(options).length > 0 ? JSON.stringify(options) : "",
  };
  const parameters = new URLSearchParams(
    Object.entries(values).filter(([, value]) => value !== ""),
  );
  // A plus is a space in forms only; chat programs cut links at other characters.
  return `${new URL(".", document.baseURI).href}#${parameters}`.replaceAll("+", "%20");
}

/**
 * Return what the fragment of a URL contains; null if that is nothing of this page.
 *
 * @param {string} hash
 * @returns {{task: string | null, endpoint: string | null, prompt: string, options: object} | null}
 */
export function parseFragment(hash) {
  const parameters = new URLSearchParams(hash.replace(/^#/, ""));
  if (!NAMES.some((name) => parameters.has(name))) {
    return null;
  }
  return {
    task: parameters.get("task"),
    endpoint: parameters.get("model"),
    prompt: parameters.get("prompt") ?? "",
    options: parseOptions(parameters.get("options")),
  };
}

function parseOptions(text) {
  try {
    const value = JSON.parse(text ?? "{}");
    return typeof value === "object" && value !== null && !Array.isArray(value) ? value : {};
  } catch {
    return {};
  }
}
