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
from falproxy.version import __version__

WEB = Path(__file__).parent / "static"
ROOT = "/"
DASHBOARD = "/dashboard"
FILES = "/web/{file:.+}"
ABOUT = "/web/about.json"

KINDS = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
SHOWN = ("text/html", "image/svg+xml")  # what a browser can open by itself
# Where fal has a browser put a file, and where its files are read (fal-api.md, 3.5 and 3.6).
FAL_FILES = ("https://fal.media", "https://*.fal.media", "https://storage.googleapis.com")
# The sandbox names its files by one of these, a visitor the proxy perhaps by the other.
THIS_MACHINE = ("http://localhost:*", "http://127.0.0.1:*")
SAFE: Mapping[str, str] = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
ASKED_EACH_TIME = "no-cache"
NEVER_ASKED_AGAIN = "public, max-age=31536000, immutable"
# An address in a page, relative to it, of one of its files.
NAMED = ('"web/', '"web/{}/')


@dataclass(frozen=True, slots=True)
class File:
    """One file as it is sent. packed: gzip of it. tag: changes when the content does."""

    content: bytes
    packed: bytes
    kind: str
    tag: str


@dataclass(frozen=True, slots=True)
class WebFiles:
    """All files by name. edition: changes when one of them does."""

    by_name: Mapping[str, File]
    edition: str


class Pages:
    """Handlers for the pages and their files. is_locked: whether callers must show who they are."""

    def __init__(self, settings: Settings, *, is_locked: bool) -> None:
        self._headers = {**SAFE, "Content-Security-Policy": content_policy(settings)}
        self._about = {
            "version": __version__,
            "isSandbox": settings.sandbox,
            "isLocked": is_locked,
            "uploads": settings.uploads,
            "formats": settings.image_formats,
            "maxBody": settings.max_body,
        }

    async def show_page(self, request: web.Request) -> web.Response:
        """Handler for GET of ROOT."""
        return self._send(request, self._find("index.html"), ASKED_EACH_TIME)

    async def show_dashboard(self, request: web.Request) -> web.Response:
        """Handler for GET of DASHBOARD. Raises: ProxyError 404."""
        return self._send(request, self._find("dashboard.html"), ASKED_EACH_TIME)

    async def show_file(self, request: web.Request) -> web.Response:
        """Handler for GET of FILES. Raises: ProxyError 404."""
        edition, _, name = request.match_info["file"].partition("/")
        if edition == self._files.edition:
            return self._send(request, self._find(name), NEVER_ASKED_AGAIN)
        if edition.startswith("@"):  # of another edition: the page comes from another process
            return self._send(request, self._find(name), ASKED_EACH_TIME)
        return self._send(request, self._find(request.match_info["file"]), ASKED_EACH_TIME)

    async def tell_about(self, request: web.Request) -> web.Response:
        """Handler for GET of ABOUT: what a page may know before anybody shows a key."""
        headers = {**SAFE, hdrs.CACHE_CONTROL: "no-store"}
        return web.json_response(self._about, headers=headers)

    @cached_property
    def _files(self) -> WebFiles:
        """They are read when somebody asks for the first one."""
        return read_files()

    def _find(self, name: str) -> File:
        if (file := self._files.by_name.get(name)) is None:
            raise ProxyError(404, "file_not_found", "There is no such file.", SAFE)
        return file

    def _send(self, request: web.Request, file: File, caching: str) -> web.Response:
        is_packed = takes_gzip(request)
        tag = f"{file.tag}-gzip" if is_packed else file.tag
        headers = {
            **(self._headers if file.kind in SHOWN else SAFE),
            hdrs.CACHE_CONTROL: caching,
            hdrs.ETAG: f'"{tag}"',
            hdrs.VARY: hdrs.ACCEPT_ENCODING,
        }
        if is_known(request.if_none_match, tag):
            return web.Response(status=web.HTTPNotModified.status_code, headers=headers)
        headers[hdrs.CONTENT_TYPE] = f"{file.kind}; charset=utf-8"
        if is_packed:
            headers[hdrs.CONTENT_ENCODING] = "gzip"
        return web.Response(body=file.packed if is_packed else file.content, headers=headers)


async def lead_to_page(request: web.Request) -> web.Response:
    """Handler for the prefix itself, without the slash that the page's addresses count on."""
    last = request.path.rpartition("/")[2]
    raise web.HTTPFound(f"{last}/")  # relative: a proxy before this one may have cut the path


def content_policy(settings: Settings) -> str:
    """Scripts and styles are the page's own; pictures may be anybody's; what is sent goes to this
    proxy, to fal's files, and to where outputs are kept."""
    kept = settings.project.url if settings.project is not None else None
    known = filter(None, (kept, settings.upstream_origin, settings.public_url))
    local = THIS_MACHINE if settings.sandbox else ()
    origins = " ".join((*FAL_FILES, *local, *dict.fromkeys(map(origin_of, known))))
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        f"connect-src 'self' data: blob: {origins}; img-src 'self' data: blob: https: {origins}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def takes_gzip(request: web.Request) -> bool:
    """Whether the client names gzip among what it takes, and not as what it does not."""
    for offer in request.headers.get(hdrs.ACCEPT_ENCODING, "").lower().split(","):
        name, _, weight = offer.replace(" ", "").partition(";q=")
        if name in ("gzip", "*"):
            return weight.strip("0.") != "" if weight else True
    return False


def is_known(tags: tuple[ETag, ...] | None, tag: str) -> bool:
    return any(known.value in (tag, "*") for known in tags or ())


def read_files() -> WebFiles:
    """All files of the pages. The pages name the others below the edition, so that browsers need
    not ask whether they have changed."""
    found = dict(walk(WEB, ""))
    digest = hashlib.sha256()
    for name, content in sorted(found.items()):
        digest.update(b"%b\0%b\0" % (name.encode(), hashlib.sha256(content).digest()))
    edition = f"@{digest.hexdigest()[:16]}"
    own, named = NAMED
    return WebFiles(
        {
            name: pack(name, content.replace(own.encode(), named.format(edition).encode()))
            if name.endswith(".html")
            else pack(name, content)
            for name, content in found.items()
        },
        edition,
    )


def walk(directory: Path, above: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that a page may ask for."""
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from walk(entry, f"{above}{entry.name}/")
        elif suffix_of(entry.name) in KINDS:
            yield above + entry.name, entry.read_bytes()


def pack(name: str, content: bytes) -> File:
    import gzip

    tag = hashlib.sha256(content).hexdigest()[:32]
    packed = gzip.compress(content, compresslevel=9, mtime=0)
    return File(content, packed, KINDS[suffix_of(name)], tag)


def suffix_of(name: str) -> str:
    return name[name.rfind(".") :]
