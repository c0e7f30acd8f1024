"""Declaration that the fast path may skip a middleware.

The fast path sends a repeated request head to fal without running the middleware again. It is used
only for requests that pass no middleware without this declaration.
"""

from typing import TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

M = TypeVar("M", bound=Middleware)

# The name of a middleware that has to run for every request.
NEEDS_EVERY_REQUEST = web.RequestKey("falproxy.needs_every_request", str)


def head_only(middleware: M) -> M:
    """Declare that the fast path may skip this middleware when the same request head is received
    again within a minute, because the middleware

    - decides by the head (method, URL and headers) alone,
    - or acts only on requests and responses that the fast path does not take,
    - or does something that the fast path does itself (accounting, image check).
    """
    middleware.is_head_only = True  # type: ignore[attr-defined]  # functions take attributes
    return middleware


def is_head_only(middleware: object) -> bool:
    return bool(getattr(middleware, "is_head_only", False))


def keep_off_fast_path(middleware: Middleware) -> Middleware:
    """Wrap a middleware so that requests that pass it are kept off the fast path. A middleware
    that is declared `head_only` is returned as it is."""
    if is_head_only(middleware):
        return middleware
    name = getattr(middleware, "__qualname__", type(middleware).__qualname__)

    @web.middleware
    async def every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[NEEDS_EVERY_REQUEST] = name
        return await middleware(request, handler)

    return every_request
