"""Handlers for the web pages: the files of `falproxy/web/static`, and the facts about this proxy
that their scripts need."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import ETag, hdrs, web

from falproxy.errors import ProxyError
from falproxy.settings import Settings
from falproxy.storage_backends import BACKENDS
from falproxy.version import __version__

STATIC_DIR = Path(__file__).parent / "static"
ROOT = "/"
DASHBOARD = "/dashboard"
FILES = "/web/{file:.+}"
ABOUT = "/web/about.json"

# Requested by browsers and crawlers on their own, beside the page.
WELL_KNOWN_FILES = ("favicon.ico", "robots.txt")

CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
DOCUMENT_SUFFIXES = (".html", ".svg")  # files that browsers open as documents
# Origins that browsers upload files to, and read fal's files from (fal-api.md, 3.5 and 3.6).
FAL_FILE_ORIGINS = ("https://fal.media", "https://*.fal.media", "https://storage.googleapis.com")
# The sandbox uses one of these in the URLs of its files; the user may have opened the other.
LOCALHOST_ORIGINS = ("http://localhost:*", "http://127.0.0.1:*")
SECURITY_HEADERS: Mapping[str, str] = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
REVALIDATE = "no-cache"
IMMUTABLE = "public, max-age=31536000, immutable"
FOR_A_DAY = "public, max-age=86400"
# Start of a relative URL in a page, without and with the content hash.
LINK_PREFIXES = ('"web/', '"web/{}/')


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file. gzipped: its content, compressed. is_document: browsers open it as a document."""

    content: bytes
    gzipped: bytes
    content_type: str
    etag: str
    is_document: bool


@dataclass(frozen=True, slots=True)
class WebFiles:
    """All files by name. content_hash: of all files together, with `@` before it."""

    by_name: Mapping[str, StaticFile]
    content_hash: str


class Pages:
    """Handlers for the pages and their files. is_locked: callers must authenticate themselves."""

    def __init__(self, settings: Settings, *, is_locked: bool) -> None:
        self._headers = {
            **SECURITY_HEADERS,
            "Content-Security-Policy": content_security_policy(settings),
        }
        self._about = {
            "version": __version__,
            "isSandbox": settings.sandbox,
            "isLocked": is_locked,
            "uploads": settings.auth.uploads,
            "formats": settings.images.formats,
            "maxBody": settings.server.max_body,
        }

    async def show_page(self, request: web.Request) -> web.Response:
        """Handler for GET of ROOT."""
        return self._file_response(request, self._get_file("index.html"), REVALIDATE)

    async def show_dashboard(self, request: web.Request) -> web.Response:
        """Handler for GET of DASHBOARD. Raises: ProxyError 404."""
        return self._file_response(request, self._get_file("dashboard.html"), REVALIDATE)

    async def show_file(self, request: web.Request) -> web.Response:
        """Handler for GET of FILES. Raises: ProxyError 404."""
        prefix, _, name = request.match_info["file"].partition("/")
        if prefix == read_files().content_hash:
            return self._file_response(request, self._get_file(name), IMMUTABLE)
        if prefix.startswith("@"):  # from the page of another version of the proxy
            return self._file_response(request, self._get_file(name), REVALIDATE)
        return self._file_response(request, self._get_file(request.match_info["file"]), REVALIDATE)

    async def show_well_known_file(self, request: web.Request) -> web.Response:
        """Handler for GET of WELL_KNOWN_FILES."""
        file = self._get_file(request.path.rpartition("/")[2])
        return self._file_response(request, file, FOR_A_DAY)

    async def show_about(self, request: web.Request) -> web.Response:
        """Handler for GET of ABOUT: facts about the proxy that need no authentication."""
        headers = {**SECURITY_HEADERS, hdrs.CACHE_CONTROL: "no-store"}
        return web.json_response(self._about, headers=headers)

    def _get_file(self, name: str) -> StaticFile:
        if (file := read_files().by_name.get(name)) is None:
            raise ProxyError(404, "file_not_found", "There is no such file.", SECURITY_HEADERS)
        return file

    def _file_response(
        self, request: web.Request, file: StaticFile, cache_control: str
    ) -> web.Response:
        headers = self._headers if file.is_document else SECURITY_HEADERS
        return file_response(request, file, {**headers, hdrs.CACHE_CONTROL: cache_control})


def file_response(
    request: web.Request, file: StaticFile, headers: Mapping[str, str]
) -> web.Response:
    """Return a file, compressed if the client accepts gzip, or 304 if it has the file already."""
    is_gzipped = accepts_gzip(request)
    etag = f"{file.etag}-gzip" if is_gzipped else file.etag
    headers = {**headers, hdrs.ETAG: f'"{etag}"', hdrs.VARY: hdrs.ACCEPT_ENCODING}
    if matches_etag(request.if_none_match, etag):
        return web.Response(status=web.HTTPNotModified.status_code, headers=headers)
    headers[hdrs.CONTENT_TYPE] = file.content_type
    if is_gzipped:
        headers[hdrs.CONTENT_ENCODING] = "gzip"
    return web.Response(body=file.gzipped if is_gzipped else file.content, headers=headers)


async def redirect_to_page(request: web.Request) -> web.Response:
    """Handler for the path of the page without the final slash, which the relative URLs of the
    page need."""
    last = request.path.rpartition("/")[2]
    raise web.HTTPFound(f"{last}/")  # relative, because a reverse proxy may have changed the path


def content_security_policy(settings: Settings) -> str:
    """Return the `Content-Security-Policy` of the pages. Scripts and styles come from the proxy,
    images, videos and sounds from any https origin. Requests go to the proxy, to fal's files, and
    to the storage of outputs."""
    project = settings.storage.project
    storage_url = project.url if project is not None else None
    backend = BACKENDS.get(settings.storage_backend)
    prefixes = backend.url_prefixes(settings) if backend else []
    places = (storage_url, settings.upstream.origin, settings.server.public_url, *prefixes)
    urls = filter(None, places)
    localhost = LOCALHOST_ORIGINS if settings.sandbox else ()
    origins = " ".join((*FAL_FILE_ORIGINS, *localhost, *dict.fromkeys(map(origin_of, urls))))
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        f"connect-src 'self' data: blob: {origins}; img-src 'self' data: blob: https: {origins}; "
        f"media-src 'self' blob: https: {origins}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def accepts_gzip(request: web.Request) -> bool:
    """Return True if the client accepts gzip with a weight above 0 (RFC 9110 §12.5.3)."""
    for coding in request.headers.get(hdrs.ACCEPT_ENCODING, "").lower().split(","):
        name, _, weight = coding.replace(" ", "").partition(";q=")
        if name in ("gzip", "*"):
            return weight.strip("0.") != "" if weight else True
    return False


def matches_etag(if_none_match: tuple[ETag, ...] | None, etag: str) -> bool:
    return any(each.value in (etag, "*") for each in if_none_match or ())


@cache
def read_files() -> WebFiles:
    """Return all files of the pages, which do not change. They are read on the first request, not
    at the start. Links in the pages get the content hash in their path, so that browsers can cache
    the files without revalidation."""
    contents = dict(walk_files(STATIC_DIR, ""))
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(b"%b\0%b\0" % (name.encode(), hashlib.sha256(content).digest()))
    content_hash = f"@{digest.hexdigest()[:16]}"
    plain_prefix, hashed_prefix = LINK_PREFIXES
    for name, content in contents.items():
        if name.endswith(".html"):
            contents[name] = content.replace(
                plain_prefix.encode(), hashed_prefix.format(content_hash).encode()
            )
    return WebFiles(
        {name: compress_file(name, content) for name, content in contents.items()}, content_hash
    )


def walk_files(directory: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file with one of CONTENT_TYPES."""
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from walk_files(entry, f"{prefix}{entry.name}/")
        elif suffix_of(entry.name) in CONTENT_TYPES:
            yield prefix + entry.name, entry.read_bytes()


def compress_file(name: str, content: bytes) -> StaticFile:
    import gzip

    etag = hashlib.sha256(content).hexdigest()[:32]
    gzipped = gzip.compress(content, compresslevel=9, mtime=0)
    suffix = suffix_of(name)
    return StaticFile(content, gzipped, CONTENT_TYPES[suffix], etag, suffix in DOCUMENT_SUFFIXES)


def suffix_of(name: str) -> str:
    return name[name.rfind(".") :]
