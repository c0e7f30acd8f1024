/** Videos and sounds among the files of results. */
import { el } from "./dom.js";

const EXTENSIONS = {
  video: /\.(mp4|webm|mov|m4v)$/i,
  audio: /\.(mp3|wav|m4a|aac|flac|ogg|opus)$/i,
};
const PLAY_ICON =
  "data:image/svg+xml," +
  encodeURIComponent(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">' +
      '<path fill="#808080" d="M18 14l16 10-16 10z"/></svg>',
  );

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
export const defaultThumbnail = (file) => (isImage(file) ? file.url : PLAY_ICON);
