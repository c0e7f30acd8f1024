"""Pages of other origins: which of them may call, and what they may send and see."""

import re
from collections.abc import Sequence

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import head_only

ALLOWED_METHODS = "GET, POST, PUT"
# Beside what begins with x-fal- or x-app-fal-: what fal's clients for the web send.
ALLOWED_HEADERS = frozenset({
    "accept", "authorization", "cache-control", "content-type", "prefer", "traceparent",
    "tracestate", "x-falproxy-key", "x-request-id",
})  # fmt: skip
ALLOWED_HEADER_PREFIXES = ("x-fal-", "x-app-fal-")
EXPOSED_HEADERS = ", ".join((
    "age", "cache-status", "retry-after", "server-timing", "x-fal-billable-units",
    "x-fal-error-type", "x-fal-request-id", "x-fal-request-timeout-type", "x-fal-retryable",
    "x-falproxy-rehost", "x-falproxy-sandbox", "x-request-id",
))  # fmt: skip
# Types of bodies that a page may send anywhere (Fetch, CORS-safelisted request-header).
SAFELISTED_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded", "text/plain")
CROSS_ORIGIN_SITES = ("cross-site", "same-site")
PREFLIGHT_MAX_AGE = "600"
LABEL = "[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"


def cors(origins: Sequence[str]) -> Middleware:
    """Middleware: answers preflights of the allowed origins, and lets their pages read answers.

    origins: exact ones, or `https://*.example.com` for any name below.
    """
    allowed = origins_pattern(origins)

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get(hdrs.ORIGIN, "")
        is_allowed = allowed.fullmatch(origin) is not None
        if is_allowed and is_preflight(request):
            response: web.StreamResponse = preflight_response(request)
        else:
            response = await handler(request)
        # The answer depends on who asks, even where nobody is let in.
        add = response.add_header if isinstance(response, RelayedResponse) else response.headers.add
        add(hdrs.VARY, hdrs.ORIGIN)
        if is_allowed:
            add(hdrs.ACCESS_CONTROL_ALLOW_ORIGIN, origin)
            add(hdrs.ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED_HEADERS)
        return response

    return middleware


def check_origin(origins: Sequence[str]) -> Middleware:
    """Middleware: a page of another origin that is not allowed gets a 403, even for a request
    that its browser sends without asking first, such as a form's. Browsers say where a request
    comes from in `Sec-Fetch-Site` (Fetch Metadata, W3C), but not to an address without TLS in
    their own network; then a form's origin says it. Other programs send neither.
    """
    allowed = origins_pattern(origins)

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_cross_origin(request) and not allowed.fullmatch(request.headers.get(hdrs.ORIGIN, "")):
            raise ProxyError(
                403,
                "origin_forbidden",
                "Pages of this origin may not call the proxy (FALPROXY_ALLOWED_ORIGINS).",
            )
        return await handler(request)

    return middleware


def is_cross_origin(request: web.Request) -> bool:
    """Whether a page of another origin has sent a request, and its browser did not ask first."""
    if (site := request.headers.get("Sec-Fetch-Site")) is not None:
        return site in CROSS_ORIGIN_SITES
    origin = request.headers.get(hdrs.ORIGIN)
    is_other = origin is not None and origin.partition("://")[2] != request.host
    return is_other and request.content_type in SAFELISTED_TYPES


def check_host(hosts: Sequence[str]) -> Middleware:
    """Middleware: a request that calls this machine by another name is a 403.

    A page may have its own name point to this machine all of a sudden (DNS rebinding), and is then
    of the same origin; its name is all that gives it away. names: hosts as in a Host header,
    without a port.
    """
    known = re.compile(rf"(?:{'|'.join(map(re.escape, hosts))})(?::\d{{1,5}})?", re.IGNORECASE)

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not known.fullmatch(request.host):
            raise ProxyError(
                403,
                "host_forbidden",
                "An open proxy on this machine only is called by another name: lock it "
                "(FALPROXY_ACCESS_KEYS), or set FALPROXY_PUBLIC_URL to its address.",
            )
        return await handler(request)

    return middleware


def origins_pattern(origins: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(to_regex, origins)) or "(?!)")


def to_regex(origin: str) -> str:
    """A pattern for an origin as browsers write it: lower case, no default port."""
    return re.escape(origin).replace(r"\*", rf"{LABEL}(?:\.{LABEL})*")


def is_preflight(request: web.Request) -> bool:
    is_asked = hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    return request.method == hdrs.METH_OPTIONS and is_asked


def preflight_response(request: web.Request) -> web.Response:
    """The answer to a preflight: of the fields asked for, those that the proxy reads."""
    asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "").lower().split(",")
    names = (name.strip() for name in asked)
    return web.Response(
        status=web.HTTPNoContent.status_code,
        headers={
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: ALLOWED_METHODS,
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: ", ".join(
                name
                for name in names
                if name in ALLOWED_HEADERS or name.startswith(ALLOWED_HEADER_PREFIXES)
            ),
            hdrs.ACCESS_CONTROL_MAX_AGE: PREFLIGHT_MAX_AGE,
        },
    )
