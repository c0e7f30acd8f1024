"""`/docs`: the document of `/openapi.json` as a page to read and to try, by Swagger UI."""

from collections.abc import Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

from aiohttp import hdrs, web

from falproxy.errors import ProxyError

OPENAPI_PATH = "/openapi.json"
PATH = "/docs"
FILES = "/docs/{file}"

# Where Swagger UI is: the package swagger-ui-py, of which no code is run.
SWAGGER_PACKAGE = "swagger_ui"
SWAGGER_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
ASSETS_DIR = Path(__file__).parent / "docs_static"
ASSETS = {"docs.js": "text/javascript", "docs.css": "text/css"}
# Scripts and answers come from the page's own origin only. Swagger UI writes style attributes, and
# draws with pictures that stand in its style sheet; an answer that is a file is shown as a blob.
SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    hdrs.CACHE_CONTROL: "no-cache",
}


class Docs:
    """The page and its files. package: which has Swagger UI."""

    def __init__(self, package: str = SWAGGER_PACKAGE) -> None:
        self._package = package

    async def show_page(self, request: web.Request) -> web.Response:
        """Handler for GET of PATH. Without Swagger UI it says how to get it."""
        name = "plain.html" if self._swagger_dir is None else "page.html"
        return web.Response(
            text=read_asset(name), content_type="text/html", headers=SECURITY_HEADERS
        )

    async def show_file(self, request: web.Request) -> web.StreamResponse:
        """Handler for GET of FILES. Raises: ProxyError 404."""
        name = request.match_info["file"]
        if name in ASSETS:
            return web.Response(
                text=read_asset(name), content_type=ASSETS[name], headers=SECURITY_HEADERS
            )
        if name not in SWAGGER_FILES or self._swagger_dir is None:
            raise ProxyError(404, "file_not_found", "There is no such file.", SECURITY_HEADERS)
        headers = {**SECURITY_HEADERS, hdrs.CONTENT_TYPE: f"{SWAGGER_FILES[name]}; charset=utf-8"}
        return web.FileResponse(self._swagger_dir / name, headers=headers)

    @cached_property
    def _swagger_dir(self) -> Path | None:
        """Where the files of Swagger UI are; None where it is not installed. It is not looked for
        before somebody asks for the page."""
        found = find_spec(self._package)
        places = found.submodule_search_locations if found is not None else None
        directories = (Path(place) / "static" for place in places or ())
        return next((directory for directory in directories if directory.is_dir()), None)


@cache
def read_asset(name: str) -> str:
    """The text of one of our own files."""
    return (ASSETS_DIR / name).read_text("utf-8")
