"""The transparent dialect, `/api/fal/proxy`: the protocol of fal's official server proxies."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial

from aiohttp import StreamReader, hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.dialects import Dialect
from falproxy.errors import ProxyError, TemporaryError
from falproxy.fal.target import Operation, Target, parse_target
from falproxy.media.image_rules import InputRefused
from falproxy.proxy.call import Call
from falproxy.proxy.headers import decode_value

TARGET_URL = "x-fal-target-url"
RETRY_NOTE = "Repeat the request, as after an error of nginx."
BODY_IDLE_TIMEOUT = 30.0  # seconds without a byte in the middle of a body
# Seconds of waiting for a body, and the bytes that have to arrive in each such period.
BODY_PERIOD, BODY_PERIOD_MIN = 60.0, 30_000
# Cached requests without a body; bytes and number of the headers that such a request may have.
CACHE_SIZE, HEADER_BYTES_MAX, HEADER_COUNT_MAX = 1024, 2048, 24

RawHeaders = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits for the bodies of requests.

    max_body: bytes.
    allow_encoded: accept a `Content-Encoding`. True only if the server does not decode bodies, as
        aiohttp does by default.
    """

    max_body: int
    allow_encoded: bool


ReadTarget = Callable[[web.Request], Target]


def transparent_dialect(limits: BodyLimits, listed: frozenset[str] = frozenset()) -> Dialect:
    """Create the dialect of the route that takes its target from a header.

    listed: see `parse_target`.
    """
    read_listed = partial(read_target, listed=listed)
    read_plain = partial(read_call, read_target=read_listed, limits=limits)
    return Dialect(
        check=partial(check_method, read_target=read_listed),
        read=partial(read_call_memoized, read=read_plain, listed=listed),
        write=unchanged,
        refuse=refuse,
    )


class NotMemoizable(Exception):
    """The headers are too many or too large for the cache of `bodiless_call`."""


@lru_cache(CACHE_SIZE)
def bodiless_call(method: str, raw: RawHeaders, listed: frozenset[str] = frozenset()) -> Call:
    """Return the call of a request without a body. Cached, because clients that poll a job send the
    same request many times.

    Raises: ProxyError, NotMemoizable.
    """
    size = sum(len(name) + len(value) for name, value in raw)
    if size > HEADER_BYTES_MAX or len(raw) > HEADER_COUNT_MAX:
        raise NotMemoizable
    headers = CIMultiDictProxy(
        CIMultiDict((decode_value(name), decode_value(value)) for name, value in raw)
    )
    return Call(method, target_from_headers(headers, listed), headers, is_memoized=True)


async def read_call_memoized(
    request: web.Request,
    *,
    read: Callable[[web.Request], Awaitable[Call]],
    listed: frozenset[str],
) -> Call:
    if not request.body_exists:
        with suppress(NotMemoizable):
            return bodiless_call(request.method, request.raw_headers, listed)
    return await read(request)


async def read_call(request: web.Request, *, read_target: ReadTarget, limits: BodyLimits) -> Call:
    """Return the call that a request describes. The checks run in the order of fal's own proxies.

    Raises: ProxyError 400, 412, 413, 415.
    """
    target = read_target(request)
    if not request.body_exists:
        return Call(request.method, target, request.headers)
    length = request.content_length
    first = b"" if length else await next_chunk(request.content, BodyPace())
    if not length and not first:  # chunked, and empty
        return Call(request.method, target, request.headers)
    if request.method == hdrs.METH_GET:
        raise body_unexpected()
    check_body(request, limits)
    return Call(
        request.method,
        target,
        request.headers,
        body=body_chunks(request.content, limits.max_body, first),
        length=length,
    )


def check_method(request: web.Request, *, read_target: ReadTarget) -> None:
    """Allow GET, POST, and PUT for the cancellation of a job, which both of fal's clients send.

    Raises: ProxyError 405.
    """
    if request.method in (hdrs.METH_GET, hdrs.METH_POST):
        return
    if request.method == hdrs.METH_PUT and is_cancel(request, read_target):
        return
    raise ProxyError(
        405,
        "method_not_allowed",
        "Use GET or POST; PUT only cancels a queued request.",
        {hdrs.ALLOW: "GET, POST"},
    )


def is_cancel(request: web.Request, read_target: ReadTarget) -> bool:
    try:
        return read_target(request).operation is Operation.CANCEL
    except ProxyError:
        return False


def read_target(request: web.Request, *, listed: frozenset[str] = frozenset()) -> Target:
    return target_from_headers(request.headers, listed)


def target_from_headers(headers: CIMultiDictProxy[str], listed: frozenset[str]) -> Target:
    """Raises: ProxyError 400 `target_missing`, `target_ambiguous`; 412 `target_not_fal`."""
    values = headers.getall(TARGET_URL, ())
    if len(values) > 1:
        raise ProxyError(
            400, "target_ambiguous", f"The {TARGET_URL} header was sent more than once."
        )
    if not values or not values[0]:
        raise ProxyError(
            400,
            "target_missing",
            f"Send the fal URL to call in the {TARGET_URL} header (proxyUrl in fal's clients).",
        )
    return parse_target(values[0], listed)


def body_unexpected() -> ProxyError:
    """Return the refusal of a GET with a body: servers differ in what they do with it, and it has
    no meaning (RFC 9110 §9.3.1)."""
    return ProxyError(
        400,
        "body_unexpected",
        "A GET must not have a body: send the input by POST, or in the query of the target.",
    )


def check_body(request: web.Request, limits: BodyLimits) -> None:
    """Check the headers that describe the body.

    Raises: ProxyError 400, a transfer coding that forwarding would lose; 413, `Content-Length`
        exceeds the limit; 415, the body is not JSON, or the server has decoded it.
    """
    codings = request.headers.getall(hdrs.TRANSFER_ENCODING, ["chunked"])
    if [coding.lower() for coding in codings] != ["chunked"]:
        raise ProxyError(400, "body_broken", "Send the body without a transfer coding.")
    if request.content_type != "application/json":
        raise not_json()
    if hdrs.CONTENT_ENCODING in request.headers and not limits.allow_encoded:
        raise ProxyError(
            415, "unsupported_content_encoding", "Send the body without a content encoding."
        )
    if (request.content_length or 0) > limits.max_body:
        raise too_large(limits.max_body)


class BodyPace:
    """The pace at which a client sends a body: a stopwatch that runs while it is waited for."""

    def __init__(self) -> None:
        self._waited = 0.0  # seconds in this period
        self._received = 0  # bytes in this period

    @asynccontextmanager
    async def wait(self) -> AsyncIterator[None]:
        """Context manager: wait for bytes. Raises: TimeoutError, they take too long."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with asyncio.timeout(BODY_IDLE_TIMEOUT):
            yield
        self._waited += loop.time() - started

    def add(self, count: int) -> None:
        """Count received bytes. Raises: TimeoutError, too few arrived in this period."""
        self._received += count
        if self._waited >= BODY_PERIOD:
            if self._received < BODY_PERIOD_MIN:
                raise TimeoutError
            self._waited, self._received = 0.0, 0


async def body_chunks(
    content: StreamReader, max_body: int, first: bytes = b""
) -> AsyncIterator[bytes]:
    """Yield the body of a request as it arrives.

    max_body: bytes.
    first: bytes that were read before.
    Raises: ProxyError 400, broken framing; 408, it arrives too slowly; 413, it exceeds max_body;
        499, the client has disconnected.
    """
    received, pace = 0, BodyPace()
    while chunk := first or read_buffered(content) or await next_chunk(content, pace):
        first = b""
        received += len(chunk)
        if received > max_body:
            raise too_large(max_body)
        yield chunk


def read_buffered(content: StreamReader) -> bytes:
    """Return the bytes that can be read without waiting."""
    return b"" if content.at_eof() or content.exception() else content.read_nowait()


async def next_chunk(content: StreamReader, pace: BodyPace) -> bytes:
    if content.at_eof() and content.exception() is None:
        return b""
    try:
        async with pace.wait():
            chunk = await content.readany()
        pace.add(len(chunk))
    except TimeoutError as error:
        raise ProxyError(408, "body_timeout", "The request's body stopped arriving.") from error
    except web.RequestPayloadError as error:
        raise ProxyError(400, "body_broken", "The request's body is not framed right.") from error
    except OSError as error:
        raise ProxyError(499, "client_disconnected", "The client disconnected.") from error
    return chunk


def not_json() -> ProxyError:
    return ProxyError(415, "unsupported_media_type", "The content type must be application/json.")


def too_large(max_body: int) -> ProxyError:
    return ProxyError(
        413, "body_too_large", f"The body has more than {max_body} bytes (FALPROXY_MAX_BODY)."
    )


async def unchanged(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    return response


def refuse(error: ProxyError, request_id: str) -> web.Response:
    """Render an error for fal's clients: `@fal-ai/client` reads `message`, `fal_client` reads
    `detail`. For a rejected input, `detail` is a list as in fal's own 422.

    `@fal-ai/client` repeats a request after 502, 503 and 504; `fal_client` only if the text also
    contains the name of fal's load balancer (fal-api.md, 8.2).
    """
    body: dict[str, object] = {
        "message": error.message,
        "detail": error.detail if isinstance(error, InputRefused) else error.message,
        "type": error.code,
        "request_id": request_id,
    }
    if isinstance(error, TemporaryError):
        body["retry"] = RETRY_NOTE
    return web.json_response(body, status=error.status, headers=error.headers)
