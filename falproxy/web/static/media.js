/** Videos and sounds among the files of results. */
import { el } from "./dom.js";

const EXTENSIONS = {
  video: /\.(mp4|webm|mov|m4v)$/i,
  audio: /\.(mp3|wav|m4a|aac|flac|ogg|opus)$/i,
};
const ICONS = {
  video: "M18 14l16 10-16 10z",
  audio: "M14 20v8m6-13v18m6-22v26m6-20v14m6-9v4",
};

/**
 * Return what a file is, by its content type, otherwise by the extension of its URL.
 *
 * @param {{url: string, content_type?: unknown}} file
 * @returns {"image" | "video" | "audio"}
 */
export function kindOf({ url, content_type: contentType }) {
  const type = String(contentType ?? "").split("/")[0];
  if (["image", "video", "audio"].includes(type)) {
    return type;
  }
  const path = URL.canParse(url) ? new URL(url).pathname : "";
  return Object.keys(EXTENSIONS).find((kind) => EXTENSIONS[kind].test(path)) ?? "image";
}

/** @param {{kind?: string}} file an entry of a job's images; those of older versions have no kind */
export const isImage = (file) => (file.kind ?? "image") === "image";

/** @param {{kind: string, url: string}} file @param {string} label */
export function createPlayer({ kind, url }, label) {
  return el(kind, { className: "player", src: url, controls: true, "aria-label": label });
}

/** Return the URL of the thumbnail of a file without one. @param {{kind?: string, url: string}} file */
export function defaultThumbnail(file) {
  if (isImage(file)) {
    return file.url;
  }
  const isVideo = file.kind === "video";
  const color = isVideo
    ? 'fill="#808080"'
    : 'stroke="#808080" stroke-width="3" stroke-linecap="round"';
  const svg =
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">' +
    `<path ${color} d="${isVideo ? ICONS.video : ICONS.audio}"/></svg>`;
  return `data:image/svg+xml,${encodeURIComponent(svg)}`;
}
