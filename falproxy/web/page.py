"""The pages: the files of `falproxy/web`, and what they have to know of this proxy."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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

CONTENT_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
DOCUMENT_TYPES = ("text/html", "image/svg+xml")  # what a browser can open by itself
# Where fal has a browser put a file, and where its files are read (fal-api.md, 3.5 and 3.6).
FAL_FILE_ORIGINS = ("https://fal.media", "https://*.fal.media", "https://storage.googleapis.com")
# The sandbox names its files by one of these, a visitor the proxy perhaps by the other.
LOCALHOST_ORIGINS = ("http://localhost:*", "http://127.0.0.1:*")
SECURITY_HEADERS: Mapping[str, str] = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
REVALIDATE = "no-cache"
IMMUTABLE = "public, max-age=31536000, immutable"
# An address in a page, relative to it, of one of its files.
LINK_PREFIXES = ('"web/', '"web/{}/')


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file as it is sent. packed: gzip of it. tag: changes when the content does."""

    content: bytes
    gzipped: bytes
    content_type: str
    etag: str


@dataclass(frozen=True, slots=True)
class WebFiles:
    """All files by name. edition: changes when one of them does."""

    by_name: Mapping[str, StaticFile]
    content_hash: str


class Pages:
    """Handlers for the pages and their files. is_locked: whether callers must show who they are."""

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
        edition, _, name = request.match_info["file"].partition("/")
        if edition == self._files.content_hash:
            return self._file_response(request, self._get_file(name), IMMUTABLE)
        if edition.startswith("@"):  # of another edition: the page comes from another process
            return self._file_response(request, self._get_file(name), REVALIDATE)
        return self._file_response(request, self._get_file(request.match_info["file"]), REVALIDATE)

    async def show_about(self, request: web.Request) -> web.Response:
        """Handler for GET of ABOUT: what a page may know before anybody shows a key."""
        headers = {**SECURITY_HEADERS, hdrs.CACHE_CONTROL: "no-store"}
        return web.json_response(self._about, headers=headers)

    @cached_property
    def _files(self) -> WebFiles:
        """They are read when somebody asks for the first one."""
        return read_files()

    def _get_file(self, name: str) -> StaticFile:
        if (file := self._files.by_name.get(name)) is None:
            raise ProxyError(404, "file_not_found", "There is no such file.", SECURITY_HEADERS)
        return file

    def _file_response(
        self, request: web.Request, file: StaticFile, cache_control: str
    ) -> web.Response:
        is_packed = accepts_gzip(request)
        tag = f"{file.etag}-gzip" if is_packed else file.etag
        headers = {
            **(self._headers if file.content_type in DOCUMENT_TYPES else SECURITY_HEADERS),
            hdrs.CACHE_CONTROL: cache_control,
            hdrs.ETAG: f'"{tag}"',
            hdrs.VARY: hdrs.ACCEPT_ENCODING,
        }
        if matches_etag(request.if_none_match, tag):
            return web.Response(status=web.HTTPNotModified.status_code, headers=headers)
        headers[hdrs.CONTENT_TYPE] = f"{file.content_type}; charset=utf-8"
        if is_packed:
            headers[hdrs.CONTENT_ENCODING] = "gzip"
        return web.Response(body=file.gzipped if is_packed else file.content, headers=headers)


async def redirect_to_page(request: web.Request) -> web.Response:
    """Handler for the prefix itself, without the slash that the page's addresses count on."""
    last = request.path.rpartition("/")[2]
    raise web.HTTPFound(f"{last}/")  # relative: a proxy before this one may have cut the path


def content_security_policy(settings: Settings) -> str:
    """Scripts and styles are the page's own; pictures may be anybody's; what is sent goes to this
    proxy, to fal's files, and to where outputs are kept."""
    kept = settings.storage.project.url if settings.storage.project is not None else None
    backend = BACKENDS.get(settings.storage_backend)
    stored = backend.url_prefixes(settings) if backend else []
    known = filter(None, (kept, settings.upstream.origin, settings.server.public_url, *stored))
    local = LOCALHOST_ORIGINS if settings.sandbox else ()
    origins = " ".join((*FAL_FILE_ORIGINS, *local, *dict.fromkeys(map(origin_of, known))))
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        f"connect-src 'self' data: blob: {origins}; img-src 'self' data: blob: https: {origins}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def accepts_gzip(request: web.Request) -> bool:
    """Whether the client names gzip among what it takes, and not as what it does not."""
    for offer in request.headers.get(hdrs.ACCEPT_ENCODING, "").lower().split(","):
        name, _, weight = offer.replace(" ", "").partition(";q=")
        if name in ("gzip", "*"):
            return weight.strip("0.") != "" if weight else True
    return False


def matches_etag(if_none_match: tuple[ETag, ...] | None, etag: str) -> bool:
    return any(known.value in (etag, "*") for known in if_none_match or ())


def read_files() -> WebFiles:
    """All files of the pages. The pages name the others below the edition, so that browsers need
    not ask whether they have changed."""
    found = dict(walk_files(STATIC_DIR, ""))
    digest = hashlib.sha256()
    for name, content in sorted(found.items()):
        digest.update(b"%b\0%b\0" % (name.encode(), hashlib.sha256(content).digest()))
    edition = f"@{digest.hexdigest()[:16]}"
    own, named = LINK_PREFIXES
    return WebFiles(
        {
            name: compress_file(name, content.replace(own.encode(), named.format(edition).encode()))
            if name.endswith(".html")
            else compress_file(name, content)
            for name, content in found.items()
        },
        edition,
    )


def walk_files(directory: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that a page may ask for."""
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from walk_files(entry, f"{prefix}{entry.name}/")
        elif suffix_of(entry.name) in CONTENT_TYPES:
            yield prefix + entry.name, entry.read_bytes()


def compress_file(name: str, content: bytes) -> StaticFile:
    import gzip

    tag = hashlib.sha256(content).hexdigest()[:32]
    packed = gzip.compress(content, compresslevel=9, mtime=0)
    return StaticFile(content, packed, CONTENT_TYPES[suffix_of(name)], tag)


def suffix_of(name: str) -> str:
    return name[name.rfind(".") :]
