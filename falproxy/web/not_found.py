"""The page for browsers that request a path which does not exist. Other clients get JSON."""

from functools import cache

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from falproxy.proxy.head_only import head_only
from falproxy.web.docs import PATH as DOCS
from falproxy.web.page import DASHBOARD, REVALIDATE, SECURITY_HEADERS, STATIC_DIR

WITH_SLASH = (f"{DASHBOARD}/", f"{DOCS}/")
POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    **SECURITY_HEADERS,
    "Content-Security-Policy": POLICY,
    hdrs.CACHE_CONTROL: REVALIDATE,
    hdrs.VARY: hdrs.ACCEPT,
}


@head_only
@web.middleware
async def html_not_found(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: replace a 404 by a page if the client is a browser that navigates. Raises:
    web.HTTPFound, the path is that of a page with a final slash."""
    response = await handler(request)
    is_missing = response.status == web.HTTPNotFound.status_code
    if not is_missing or request.method != hdrs.METH_GET or not accepts_html(request):
        return response
    if request.path in WITH_SLASH:
        raise web.HTTPFound(f"..{request.path.rstrip('/')}")
    # The proxy may be at any path of its host, so that links are relative.
    root = "../" * (request.path.count("/") - 1) or "./"
    text = read_page().replace("{root}", root)
    return web.Response(
        text=text, content_type="text/html", status=response.status, headers=HEADERS
    )


def accepts_html(request: web.Request) -> bool:
    """Return True if the client names HTML itself: `*/*` is that of fetch and of programs."""
    types = request.headers.get(hdrs.ACCEPT, "").lower().split(",")
    return any(each.partition(";")[0].strip() == "text/html" for each in types)


@cache
def read_page() -> str:
    return (STATIC_DIR / "not_found.html").read_text("utf-8")
