/** A request of the page as code: curl, JavaScript, Python, the OpenAI SDK, and plain JSON. */

const KEY = "YOUR_ACCESS_KEY"; // never the real one
const OPENAI_OPTIONS = { num_images: "n", output_format: "output_format" };

/**
 * @typedef {object} CodeRequest
 * @property {string} endpoint
 * @property {string} task
 * @property {object} input with file names as values of the images that are files
 * @property {Record<string, string[]>} files names of files, by input
 * @property {string} base URL of the proxy, with a final slash
 * @property {object | null} output the result, if there is one
 * @property {boolean} isLocked whether the proxy requires a key
 *
 * @param {CodeRequest} request
 * @returns {{id: string, label: string, code: string}[]}
 */
export function createSnippets(request) {
  return [
    { id: "curl", label: "curl", code: curl(request) },
    { id: "javascript", label: "JavaScript", code: javascript(request) },
    { id: "python", label: "Python", code: python(request) },
    ...(isOpenAi(request) ? [{ id: "openai", label: "OpenAI SDK", code: openai(request) }] : []),
    { id: "input", label: "Input JSON", code: JSON.stringify(request.input, null, 2) },
    ...(request.output === null
      ? []
      : [{ id: "output", label: "Output JSON", code: JSON.stringify(request.output, null, 2) }]),
  ];
}

const quoteShell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl({ endpoint, input, files, base, isLocked }) {
  const lines = [
    `curl ${quoteShell(`${base}api/fal/run/${endpoint}`)} \\`,
    ...(isLocked ? [`  -H ${quoteShell(`Authorization: Bearer ${KEY}`)} \\`] : []),
    `  -H 'Content-Type: application/json' \\`,
  ];
  if (Object.keys(files).length === 0) {
    return [...lines, `  -d ${quoteShell(JSON.stringify(input, null, 2))}`].join("\n");
  }
  // The files are inserted as data URIs, by the standard input, because arguments are short.
  const escape = (text) => text.replace(/[\\`$]/g, "\\$&");
  const json = escape(JSON.stringify(input, null, 2));
  const body = replaceFiles(
    json,
    files,
    (name) => `"data:image/${formatOf(name)};base64,$(base64 < ${shellName(name)} | tr -d '\\n')"`,
    escape,
  );
  return [...lines, "  -d @- <<EOF", body, "EOF"].join("\n");
}

const shellName = (name) => (/^[\w.-]+$/.test(name) ? name : quoteShell(name));
const formatOf = (name) => (/\.(png|webp|gif|avif)$/i.exec(name)?.[1] ?? "jpeg").toLowerCase();

/** Replace the names of files, as JSON strings, by code. */
function replaceFiles(text, files, codeOf, escape = (mark) => mark) {
  return Object.values(files)
    .flat()
    .reduce(
      (result, name) => result.replace(escape(JSON.stringify(fileMark(name))), () => codeOf(name)),
      text,
    );
}

/** The placeholder of a file in the input. */
export const fileMark = (name) => `<${name}>`;

function javascript({ endpoint, input, files, base, isLocked }) {
  const hasFiles = Object.keys(files).length > 0;
  const body = replaceFiles(
    JSON.stringify(input, null, 2),
    files,
    (name) =>
      `new Blob([await readFile(${JSON.stringify(name)})], { type: "image/${formatOf(name)}" })`,
  );
  const key = isLocked ? `,\n  credentials: ${JSON.stringify(KEY)}` : "";
  return [
    'import { fal } from "@fal-ai/client";',
    ...(hasFiles ? ['import { readFile } from "node:fs/promises";'] : []),
    "",
    "fal.config({",
    `  proxyUrl: { url: ${JSON.stringify(`${base}api/fal/proxy`)}, when: "always" }${key},`,
    "});",
    "",
    `const result = await fal.subscribe(${JSON.stringify(endpoint)}, {`,
    `  input: ${indent(body, 2)},`,
    "});",
    "console.log(result.data);",
  ].join("\n");
}

const indent = (text, spaces) => text.replaceAll("\n", `\n${" ".repeat(spaces)}`);

function python({ endpoint, input, files, base, isLocked }) {
  const body = replaceFiles(
    toPython(input, 4),
    files,
    (name) => `fal.upload_file(${JSON.stringify(name)})`,
  );
  const url = JSON.stringify(base.replace(/\/$/, ""));
  return [
    "from falproxy.client import SyncClient",
    "",
    `fal = SyncClient(${url}${isLocked ? `, key=${JSON.stringify(KEY)}` : ""})`,
    "result = fal.subscribe(",
    `    ${JSON.stringify(endpoint)},`,
    `    ${body},`,
    ")",
    "print(result)",
  ].join("\n");
}

/** Return a value as a Python literal. JSON strings are valid ones. */
function toPython(value, spaces) {
  const inner = " ".repeat(spaces + 4);
  const close = " ".repeat(spaces);
  if (Array.isArray(value)) {
    return `[${value.map((item) => toPython(item, spaces)).join(", ")}]`;
  }
  if (typeof value === "object" && value !== null) {
    const items = Object.entries(value).map(
      ([name, item]) => `${inner}${JSON.stringify(name)}: ${toPython(item, spaces + 4)},\n`,
    );
    return items.length === 0 ? "{}" : `{\n${items.join("")}${close}}`;
  }
  const names = { true: "True", false: "False", null: "None" };
  return names[String(value)] !== undefined && typeof value !== "string"
    ? names[String(value)]
    : JSON.stringify(value);
}

/** The images API takes a prompt and few options; other inputs follow in `extra_body`. */
function isOpenAi({ task, input }) {
  return task === "create" && typeof input.prompt === "string";
}

function openai({ endpoint, input, base, isLocked }) {
  const { prompt, ...options } = input;
  const known = Object.entries(options).filter(([name]) => Object.hasOwn(OPENAI_OPTIONS, name));
  const extra = Object.fromEntries(
    Object.entries(options).filter(([name]) => !Object.hasOwn(OPENAI_OPTIONS, name)),
  );
  return [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${base}v1`)}, api_key=${JSON.stringify(isLocked ? KEY : "none")})`,
    "result = client.images.generate(",
    `    model=${JSON.stringify(endpoint)},`,
    `    prompt=${JSON.stringify(prompt)},`,
    ...known.map(([name, value]) => `    ${OPENAI_OPTIONS[name]}=${toPython(value, 4)},`),
    ...(Object.keys(extra).length > 0 ? [`    extra_body=${toPython(extra, 4)},`] : []),
    ")",
    "print(result.data[0].url)",
  ].join("\n");
}
