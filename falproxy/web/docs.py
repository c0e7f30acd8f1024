"""`/docs`: the OpenAPI document as an interactive page, shown by Swagger UI."""

import re
from collections.abc import Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

from aiohttp import hdrs, web

from falproxy.errors import ProxyError

OPENAPI_PATH = "/openapi.json"
PATH = "/docs"
FILES = "/docs/{file}"

# The package swagger-ui-py, which contains Swagger UI. Its code is not imported.
SWAGGER_PACKAGE = "swagger_ui"
SWAGGER_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
ASSETS_DIR = Path(__file__).parent / "docs_static"
ASSETS = {"docs.js": "text/javascript", "docs.css": "text/css"}
# What the documents have for the other pages only.
PAGES_PART = re.compile(r" *<!-- The files in web.*?<!-- end -->\n", re.DOTALL)
# Scripts and responses come from the page's own origin only. Swagger UI uses style attributes, data
# URIs in its style sheet, and blob URLs for responses that are files.
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
    """Handlers for the page and its files.

    has_pages: the header of the other pages is shown, which the same proxy serves.
    package: the package that contains Swagger UI.
    """

    def __init__(self, package: str = SWAGGER_PACKAGE, *, has_pages: bool = False) -> None:
        self._package = package
        self._has_pages = has_pages

    async def show_page(self, request: web.Request) -> web.Response:
        """Handler for GET of PATH. The page explains how to install Swagger UI if it is missing."""
        name = "plain.html" if self._swagger_dir is None else "page.html"
        text = read_asset(name)
        if not self._has_pages:
            text = PAGES_PART.sub("", text)
        return web.Response(text=text, content_type="text/html", headers=SECURITY_HEADERS)

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
        """The files of Swagger UI; None if it is not installed. Searched on the first request."""
        spec = find_spec(self._package)
        locations = spec.submodule_search_locations if spec is not None else None
        directories = (Path(location) / "static" for location in locations or ())
        return next((directory for directory in directories if directory.is_dir()), None)


@cache
def read_asset(name: str) -> str:
    return (ASSETS_DIR / name).read_text("utf-8")
