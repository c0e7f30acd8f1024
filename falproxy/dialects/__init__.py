"""The interface of a dialect, which is the way that one API family reads requests and writes
responses. This is the only module that turns exceptions into responses."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.parse_digits import DIGITS_MAX
from falproxy.proxy.call import CALL, ERROR_CODE, REQUEST_ID, Call
from falproxy.proxy.head_only import any_request_id

logger = logging.getLogger(__name__)

PREFLIGHT_REFUSED = (
    "A page of another origin was refused: add its origin to FALPROXY_ALLOWED_ORIGINS if it may "
    "call the proxy"
)

BROKEN_BODY = "body_broken"  # the code of errors in the framing of a request

# Renders an error in the shape of the dialect. The string is the request id.
ErrorResponder = Callable[[ProxyError, str], web.Response]


@dataclass(frozen=True, slots=True)
class Dialect:
    """The functions of one API family. They do no I/O of their own.

    check: raises ProxyError 405. It runs before authentication.
    read: returns the client's request as a call to fal; raises ProxyError 400, 412, 413, 415.
    write: returns fal's response in the shape of the dialect.
    refuse: renders an error in the shape of the dialect.
    """

    check: Callable[[web.Request], None]
    read: Callable[[web.Request], Awaitable[Call]]
    write: Callable[[web.Request, web.StreamResponse], Awaitable[web.StreamResponse]]
    refuse: ErrorResponder


@dataclass(frozen=True, slots=True)
class DialectRoute:
    """How one path of the proxy is served.

    check: raises ProxyError 405. It runs before authentication.
    middleware: reads the request and writes the response.
    refuse: renders an error in the shape of the dialect.
    """

    check: Callable[[web.Request], None]
    middleware: Middleware
    refuse: ErrorResponder


def dialect_route(dialect: Dialect) -> DialectRoute:
    return DialectRoute(dialect.check, dialect_middleware(dialect), dialect.refuse)


def method_check_middleware(check: Callable[[web.Request], None]) -> Middleware:
    """Create the middleware that refuses methods that a path does not support, and requests whose
    end is uncertain."""

    @any_request_id
    @web.middleware
    async def check_method(request: web.Request, handler: Handler) -> web.StreamResponse:
        check_framing(request)
        if request.method == hdrs.METH_OPTIONS:
            log_preflight(request)
        check(request)
        return await handler(request)

    return check_method


def log_preflight(request: web.Request) -> None:
    """Log a preflight (Fetch standard) of an origin that is not allowed. Those of allowed origins
    have a response before."""
    if hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
        fields = {"request_id": request.get(REQUEST_ID)}
        logger.info(PREFLIGHT_REFUSED, extra={"fields": fields})


def check_framing(request: web.Request) -> None:
    """Raises: ProxyError 400, a transfer coding in HTTP/1.0, which has none (RFC 9112 §6.1), or a
    length of too many digits."""
    headers = request.headers
    has_coding = hdrs.TRANSFER_ENCODING in headers and request.version < HttpVersion11
    if has_coding or len(headers.get(hdrs.CONTENT_LENGTH, "")) > DIGITS_MAX:
        raise ProxyError(400, BROKEN_BODY, "The request's body is not framed right.")


def dialect_middleware(dialect: Dialect) -> Middleware:
    """Create the middleware that reads requests and writes responses in a dialect."""

    @any_request_id
    @web.middleware
    async def read_and_write(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[CALL] = await dialect.read(request)
        return await dialect.write(request, await handler(request))

    return read_and_write


def handle_errors(refuse: ErrorResponder) -> Middleware:
    """Create the middleware that turns exceptions into responses."""

    @any_request_id
    @web.middleware
    async def errors_to_responses(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            return error_to_response(request, error, refuse)

    return errors_to_responses


def handle_unrouted_errors(
    responder_of: Callable[[str], ErrorResponder], layers: Sequence[Middleware]
) -> Middleware:
    """Create the middleware of the application, for errors outside the routes: no route serves the
    path, or another middleware of the application refuses the request.

    responder_of: returns the responder of the dialect of a path.
    layers: middleware around these responses, innermost first.
    """

    @any_request_id
    @web.middleware
    async def unrouted_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            respond: Handler = partial(respond_with_error, error=error, responder_of=responder_of)
        for layer in layers:
            respond = partial(layer, handler=respond)
        return await respond(request)

    return unrouted_errors


async def respond_with_error(
    request: web.Request, *, error: Exception, responder_of: Callable[[str], ErrorResponder]
) -> web.StreamResponse:
    return error_to_response(request, error, responder_of(request.path))


def error_to_response(
    request: web.Request, error: Exception, refuse: ErrorResponder
) -> web.Response:
    """Return the response for an exception. Raises: web.HTTPException, a redirect."""
    if isinstance(error, ProxyError):
        refusal = error
    elif isinstance(error, web.HTTPException):  # aiohttp's own 404, 405 and 413
        if error.status < web.HTTPBadRequest.status_code:
            raise error
        refusal = from_aiohttp(error)
    else:
        logger.error("A call failed inside the proxy", exc_info=error)
        refusal = ProxyError(500, "internal_error", "The proxy failed; its log has the reason.")
    request[ERROR_CODE] = refusal.code
    response = refuse(refusal, request.get(REQUEST_ID, ""))
    if refusal.code == BROKEN_BODY:
        response.force_close()  # where the next request begins is uncertain
    return response


def from_aiohttp(error: web.HTTPException) -> ProxyError:
    """Convert an error that aiohttp raises, with the `Allow` header of a 405."""
    code = error.reason.lower().replace(" ", "_")
    allow = error.headers.get(hdrs.ALLOW)
    headers = {} if allow is None else {"Allow": allow}
    return ProxyError(error.status, code, f"{error.reason}.", headers)


def default_error(error: ProxyError, request_id: str) -> web.Response:
    """Render an error as `{"error": {"code", "message"}}`, the shape of all paths that have none of
    their own."""
    body = {"error": {"code": error.code, "message": error.message}}
    return web.json_response(body, status=error.status, headers=error.headers)
