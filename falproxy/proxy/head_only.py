"""Declarations that the fast path may skip a middleware.

The fast path sends a repeated request head to fal without running the middleware again. It is used
only for requests that pass no middleware without the declaration `head_only`. Polls of other jobs,
whose heads differ in the request id only, take it as well if they pass no middleware without the
declaration `any_request_id`, and so do heads that differ in identifiers of load balancers, cookies
and addresses of clients.
"""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

M = TypeVar("M", bound=Middleware)
# Returns whether a request about this request id is decided as the one that added the check.
IdCheck = Callable[[str], bool]
# Returns whether the caller may use its credential from this address.
AddressCheck = Callable[[str], bool]

# The name of a middleware that has to run for every request.
NEEDS_EVERY_REQUEST = web.RequestKey("falproxy.needs_every_request", str)
# Set if a middleware has to run for every request id.
NEEDS_EVERY_ID = web.RequestKey("falproxy.needs_every_id", bool)
# The fast path calls these for each request. They read memory only.
ID_CHECKS = web.RequestKey("falproxy.id_checks", tuple[IdCheck, ...])
ADDRESS_CHECK: web.RequestKey[AddressCheck] = web.RequestKey("falproxy.address_check")


def head_only(middleware: M) -> M:
    """Declare that the fast path may skip this middleware when the same request head is received
    again within a minute, because the middleware

    - decides by the head (method, URL and headers) alone,
    - or acts only on requests and responses that the fast path does not take,
    - or does something that the fast path does itself (accounting, image check).
    """
    middleware.is_head_only = True  # type: ignore[attr-defined]  # functions take attributes
    return middleware


def any_request_id(middleware: M) -> M:
    """Declare as `head_only`, and that the same applies to a request whose head differs only in
    identifiers of load balancers, cookies and addresses of clients (`REQUEST_TAGS`: X-Request-ID,
    CF-Ray, ...; `CALLER_TAGS`: Cookie, X-Forwarded-For, ...), and to a poll or a request for a
    result whose head differs in the id of the queued request, because the middleware

    - does not read the former, or sets `ADDRESS_CHECK`,
    - does not decide by the latter, or adds a check of it with `add_id_check`,
    - or sets `NEEDS_EVERY_ID` or `NEEDS_EVERY_REQUEST` for the request.
    """
    middleware.takes_any_id = True  # type: ignore[attr-defined]  # functions take attributes
    return head_only(middleware)


def add_id_check(request: web.Request, check: IdCheck) -> None:
    """Let the fast path check request ids before it decides about them as about this request."""
    request[ID_CHECKS] = (*request.get(ID_CHECKS, ()), check)


def is_head_only(middleware: object) -> bool:
    return bool(getattr(middleware, "is_head_only", False))


def takes_any_id(middleware: object) -> bool:
    return bool(getattr(middleware, "takes_any_id", False))


def keep_off_fast_path(middleware: Middleware) -> Middleware:
    """Wrap a middleware so that requests that pass it are kept off the fast path, as far as it is
    not declared. A middleware that is declared `any_request_id` is returned as it is."""
    if takes_any_id(middleware):
        return middleware
    if is_head_only(middleware):

        @wraps(middleware)
        @web.middleware
        async def every_id(request: web.Request, handler: Handler) -> web.StreamResponse:
            request[NEEDS_EVERY_ID] = True
            return await middleware(request, handler)

        return every_id
    name = getattr(middleware, "__qualname__", type(middleware).__qualname__)

    @web.middleware
    async def every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[NEEDS_EVERY_REQUEST] = name
        return await middleware(request, handler)

    return every_request
