"""CORS, and checks of the origin and host of a browser's request."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import ip_address

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.parsers import ANY_ORIGIN
from falproxy.proxy.forward import add_headers
from falproxy.proxy.head_only import any_request_id

ALLOWED_METHODS = "GET, POST, PUT, DELETE"
# Request headers of the browser clients that the proxy serves (fal's, OpenAI's, the AI SDK), and of
# tracing; beside those with a prefix below. Others are not allowed, such as load balancers'.
ALLOWED_HEADERS = frozenset({
    "accept", "accept-language", "authorization", "baggage", "cache-control", "content-type",
    "idempotency-key", "if-none-match", "last-event-id", "prefer", "traceparent", "tracestate",
    "user-agent", "x-request-id",
})  # fmt: skip
ALLOWED_HEADER_PREFIXES = ("openai-", "x-app-fal-", "x-fal-", "x-falproxy-", "x-stainless-")
# Response headers that pages may read: those by which clients decide whether and when to repeat a
# call, and those that describe a response. `*` is all others, for requests without credentials; the
# names are for browsers that do not know `*`.
EXPOSED_HEADERS = ", ".join((
    "age", "allow", "cache-status", "content-disposition", "content-length", "date", "etag",
    "idempotency-key", "idempotency-replayed", "location", "openai-processing-ms",
    "preference-applied", "ratelimit", "ratelimit-limit", "ratelimit-policy",
    "ratelimit-remaining", "ratelimit-reset", "retry-after",
    "retry-after-ms", "server-timing", "traceparent", "www-authenticate", "x-fal-billable-units",
    "x-fal-error-type", "x-fal-needs-retry", "x-fal-queue-priority", "x-fal-request-id",
    "x-fal-request-timeout-type", "x-fal-retryable", "x-fal-served-from", "x-falproxy-cost",
    "x-falproxy-ignored", "x-falproxy-rehost", "x-falproxy-sandbox", "x-falproxy-saved",
    "x-ratelimit-limit-requests", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens",
    "x-request-id", "x-should-retry", "*",
))  # fmt: skip
# Body types that a page may send to any origin without a preflight (Fetch standard,
# CORS-safelisted request-header).
SAFELISTED_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded", "text/plain")
CROSS_ORIGIN_SITES = ("cross-site", "same-site")
PREFLIGHT_MAX_AGE = "600"
# A name, an IPv4 address, or an IPv6 address in brackets, and a port.
HOST = re.compile(r"(\[[^\[\]]+\]|[^\s:\[\]]+?)\.?(?::\d{0,5})?")
HOST_CACHE_SIZE = 256
LABEL = "[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"


def cors(origins: Sequence[str]) -> Middleware:
    """Middleware: respond to preflights of allowed origins, and let their pages read responses.

    origins: exact, `https://*.example.com` for any subdomain, or `*` for all origins.
    """
    allowed = origins_pattern(origins)

    @any_request_id
    @web.middleware
    async def cors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get(hdrs.ORIGIN, "")
        is_allowed = allowed.fullmatch(origin) is not None
        if is_allowed and is_preflight(request):
            response: web.StreamResponse = preflight_response(request)
        else:
            response = await handler(request)
        # The response depends on the origin, even for one that is not allowed.
        fields: list[tuple[str, str]] = [(hdrs.VARY, hdrs.ORIGIN)]
        if is_allowed:
            fields.append((hdrs.ACCESS_CONTROL_ALLOW_ORIGIN, origin))
            fields.append((hdrs.ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED_HEADERS))
        add_headers(response, fields)
        return response

    return cors_middleware


def check_origin(origins: Sequence[str]) -> Middleware:
    """Middleware: refuse a page of another origin with 403, unless the origin is allowed.

    CORS alone does not stop requests without a preflight, such as a form's. Browsers send
    `Sec-Fetch-Site` (Fetch Metadata, W3C), except to a private address without TLS; there the
    `Origin` of a form is compared. Other programs send neither.
    """
    allowed = origins_pattern(origins)

    @any_request_id
    @web.middleware
    async def check_origin_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_cross_origin(request) and not allowed.fullmatch(request.headers.get(hdrs.ORIGIN, "")):
            raise ProxyError(
                403,
                "origin_forbidden",
                "Pages of this origin may not call the proxy (FALPROXY_ALLOWED_ORIGINS).",
            )
        return await handler(request)

    return check_origin_middleware


def is_cross_origin(request: web.Request) -> bool:
    """Return whether a page of another origin sent the request without a preflight."""
    if (site := request.headers.get("Sec-Fetch-Site")) is not None:
        return site in CROSS_ORIGIN_SITES
    origin = request.headers.get(hdrs.ORIGIN)
    is_other = origin is not None and origin.partition("://")[2] != request.host
    return is_other and request.content_type in SAFELISTED_TYPES


def check_host(names: Iterable[str]) -> Middleware:
    """Middleware: refuse a request whose Host header has an unknown name with 403.

    Against DNS rebinding: a page whose own name is made to point to this machine is of the same
    origin as the proxy, and only the Host header shows it. IP addresses and `localhost` are no
    names that an attacker can own, and a request without the header is not a browser's.

    names: further host names; `*.example.com` stands for all subdomains, `*` for any name.
    """
    allowed = re.compile("|".join(map(host_to_regex, names)) or "(?!)", re.DOTALL)

    @lru_cache(HOST_CACHE_SIZE)
    def is_allowed(host: str) -> bool:
        name = host_name(host)
        return is_local_name(name) or allowed.fullmatch(name) is not None

    @any_request_id
    @web.middleware
    async def check_host_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not all(map(is_allowed, request.headers.getall(hdrs.HOST, ()))):
            raise ProxyError(
                403,
                "host_forbidden",
                "A proxy that is open to everyone is not called by this host name: add the name to "
                "FALPROXY_ALLOWED_HOSTS, set FALPROXY_PUBLIC_URL to the address that clients use, "
                "or require an access key (FALPROXY_ACCESS_KEYS).",
            )
        return await handler(request)

    return check_host_middleware


def host_name(host: str) -> str:
    """Return the name in a Host header: in lower case, without port and final dot. Return an empty
    string for an invalid header."""
    match = HOST.fullmatch(host)
    return match[1].lower() if match else ""


def is_local_name(name: str) -> bool:
    """Return whether a name is `localhost`, below it, or an IP address."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    is_ipv6 = name.startswith("[")
    try:
        return (ip_address(name.strip("[]")).version == 6) is is_ipv6
    except ValueError:
        return False


def host_to_regex(name: str) -> str:
    if name == "*":
        return ".*"
    return re.escape(name.lower().rstrip(".")).replace(r"\*", rf"{LABEL}(?:\.{LABEL})*")


def origins_pattern(origins: Sequence[str]) -> re.Pattern[str]:
    if ANY_ORIGIN in origins:
        return re.compile(r"[\x21-\x7e]+")
    return re.compile("|".join(map(to_regex, origins)) or "(?!)")


def to_regex(origin: str) -> str:
    """Return a pattern for an origin as browsers send it: in lower case, without a default port."""
    return re.escape(origin).replace(r"\*", rf"{LABEL}(?:\.{LABEL})*")


def is_preflight(request: web.Request) -> bool:
    has_method = hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    return request.method == hdrs.METH_OPTIONS and has_method


def preflight_response(request: web.Request) -> web.Response:
    """Return the response to a preflight, allowing those of the requested headers that the proxy
    reads."""
    requested = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "").lower().split(",")
    names = (name.strip() for name in requested)
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
