"""What a dialect is, and the only place where exceptions become responses."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.proxy.call import CALL, ERROR_CODE, REQUEST_ID, Call
from falproxy.proxy.head_only import head_only

logger = logging.getLogger(__name__)

# An error in the client's shape, given with the id of the request that it belongs to.
ErrorResponder = Callable[[ProxyError, str], web.Response]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one API family speaks: functions with no I/O of their own.

    check: raises ProxyError 405, before anybody asks who is calling. read: the client's request
    as a call to fal; raises ProxyError 400, 412, 413, 415. write: fal's answer in the client's
    shape. refuse: an error in the client's shape.
    """

    check: Callable[[web.Request], None]
    read: Callable[[web.Request], Awaitable[Call]]
    write: Callable[[web.Request, web.StreamResponse], Awaitable[web.StreamResponse]]
    refuse: ErrorResponder


@dataclass(frozen=True, slots=True)
class DialectRoute:
    """How one path of the proxy is served: what its methods are, who reads and writes there, and
    the shape of its errors. check: raises ProxyError 405."""

    check: Callable[[web.Request], None]
    middleware: Middleware
    refuse: ErrorResponder


def dialect_route(dialect: Dialect) -> DialectRoute:
    return DialectRoute(dialect.check, dialect_middleware(dialect), dialect.refuse)


def method_check_middleware(check: Callable[[web.Request], None]) -> Middleware:
    """Middleware: refuses methods that a path has no word for, before anybody asks who calls."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        check(request)
        return await handler(request)

    return middleware


def dialect_middleware(dialect: Dialect) -> Middleware:
    """Middleware: reads the request and writes the answer, both in the dialect."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[CALL] = await dialect.read(request)
        return await dialect.write(request, await handler(request))

    return middleware


def handle_errors(refuse: ErrorResponder) -> Middleware:
    """Middleware: an exception becomes a response here and nowhere else."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ProxyError as error:
            refusal = error
        except web.HTTPException as error:  # aiohttp's own 404, 405 and 413
            if error.status < web.HTTPBadRequest.status_code:
                raise
            refusal = from_aiohttp(error)
        except Exception:
            logger.exception("A call failed inside the proxy")
            refusal = ProxyError(500, "internal_error", "The proxy failed; its log says why.")
        request[ERROR_CODE] = refusal.code
        return refuse(refusal, request.get(REQUEST_ID, ""))

    return middleware


def from_aiohttp(error: web.HTTPException) -> ProxyError:
    """aiohttp's own refusal as one of ours, with the `Allow` of a 405."""
    code = error.reason.lower().replace(" ", "_")
    allow = error.headers.get(hdrs.ALLOW)
    headers = {} if allow is None else {"Allow": allow}
    return ProxyError(error.status, code, f"{error.reason}.", headers)


def default_error(error: ProxyError, request_id: str) -> web.Response:
    """The shape of errors outside every dialect: `{"error": {"code", "message"}}`."""
    body = {"error": {"code": error.code, "message": error.message}}
    return web.json_response(body, status=error.status, headers=error.headers)
