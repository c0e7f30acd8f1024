"""The transparent dialect, `/api/fal/proxy`: fal's official proxy formula, rule by rule."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial

from aiohttp import StreamReader, hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.dialects import Dialect
from falproxy.errors import ProxyError
from falproxy.fal.target import Operation, Target, parse_target
from falproxy.media.image_rules import InputRefused
from falproxy.proxy.call import Call

TARGET_URL = "x-fal-target-url"
# A client that sends nothing for so many seconds in the middle of its body has gone.
BODY_IDLE_TIMEOUT = 60.0
# How many requests without a body are remembered, and how many bytes of headers, and headers, they
# may have.
CACHE_SIZE, HEADER_BYTES_MAX, HEADER_COUNT_MAX = 1024, 2048, 24

RawHeaders = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """max_body: bytes that a request's body may have. are_encoded: whether the server leaves
    bodies in the content coding they came in (aiohttp decodes them unless told not to)."""

    max_body: int
    allow_encoded: bool


ReadTarget = Callable[[web.Request], Target]


def transparent_dialect(limits: BodyLimits) -> Dialect:
    """The dialect of the header route."""
    read_plain = partial(read_call, read_target=read_target, limits=limits)
    return Dialect(
        check=partial(check_method, read_target=read_target),
        read=partial(read_call_memoized, read=read_plain),
        write=unchanged,
        refuse=refuse,
    )


class NotMemoizable(Exception):
    """Headers of which no copy is kept."""


@lru_cache(CACHE_SIZE)
def bodiless_call(method: str, raw: RawHeaders) -> Call:
    """The call of a request without a body. A client asks the same question many times a second,
    and what was read of it is remembered. Raises: ProxyError, NotMemoizable."""
    size = sum(len(name) + len(value) for name, value in raw)
    if size > HEADER_BYTES_MAX or len(raw) > HEADER_COUNT_MAX:
        raise NotMemoizable
    headers = CIMultiDictProxy(
        CIMultiDict((decode_header(name), decode_header(value)) for name, value in raw)
    )
    return Call(method, target_from_headers(headers), headers)


async def read_call_memoized(
    request: web.Request, *, read: Callable[[web.Request], Awaitable[Call]]
) -> Call:
    """The call that a request names."""
    if not request.body_exists:
        with suppress(NotMemoizable):
            return bodiless_call(request.method, request.raw_headers)
    return await read(request)


def decode_header(raw: bytes) -> str:
    """As aiohttp does it."""
    return raw.decode("utf-8", "surrogateescape")


async def read_call(request: web.Request, *, read_target: ReadTarget, limits: BodyLimits) -> Call:
    """The call that a request names, or the formula's refusal in the formula's order."""
    target = read_target(request)
    if not request.body_exists:
        return Call(request.method, target, request.headers)
    check_body(request, limits)
    return Call(
        request.method,
        target,
        request.headers,
        body=body_chunks(request.content, limits.max_body),
        length=request.content_length,
    )


def check_method(request: web.Request, *, read_target: ReadTarget) -> None:
    """Raises: ProxyError 405. Both of fal's clients cancel with PUT; nothing else may."""
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


def read_target(request: web.Request) -> Target:
    return target_from_headers(request.headers)


def target_from_headers(headers: CIMultiDictProxy[str]) -> Target:
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
    return parse_target(values[0])


def check_body(request: web.Request, limits: BodyLimits) -> None:
    """Raises: ProxyError 400 for a transfer coding that would be lost on the way, 415 for a body
    that is not JSON or that the server decoded, 413 for one that says it is too long."""
    if request.headers.get(hdrs.TRANSFER_ENCODING, "chunked").lower() != "chunked":
        raise ProxyError(400, "body_broken", "Send the body without a transfer coding.")
    if request.content_type != "application/json":
        raise not_json()
    if hdrs.CONTENT_ENCODING in request.headers and not limits.allow_encoded:
        raise ProxyError(
            415, "unsupported_content_encoding", "Send the body without a content encoding."
        )
    if (request.content_length or 0) > limits.max_body:
        raise too_large(limits.max_body)


async def body_chunks(content: StreamReader, max_body: int) -> AsyncIterator[bytes]:
    """The client's body as it arrives.

    Raises: ProxyError 413 past max_body, 408 when the client falls silent, 400 when its framing
    is broken, 499 when it left.
    """
    received = 0
    while chunk := read_buffered(content) or await next_chunk(content):
        received += len(chunk)
        if received > max_body:
            raise too_large(max_body)
        yield chunk


def read_buffered(content: StreamReader) -> bytes:
    """What is there already."""
    return b"" if content.at_eof() or content.exception() else content.read_nowait()


async def next_chunk(content: StreamReader) -> bytes:
    if content.at_eof() and content.exception() is None:
        return b""
    try:
        async with asyncio.timeout(BODY_IDLE_TIMEOUT):
            return await content.readany()
    except TimeoutError as error:
        raise ProxyError(408, "body_timeout", "The request's body stopped arriving.") from error
    except web.RequestPayloadError as error:
        raise ProxyError(400, "body_broken", "The request's body is not framed right.") from error
    except OSError as error:
        raise ProxyError(499, "client_disconnected", "The client left.") from error


def not_json() -> ProxyError:
    return ProxyError(415, "unsupported_media_type", "The content type must be application/json.")


def too_large(max_body: int) -> ProxyError:
    return ProxyError(
        413, "body_too_large", f"The body has more than {max_body} bytes (FALPROXY_MAX_BODY)."
    )


async def unchanged(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    return response


def refuse(error: ProxyError, request_id: str) -> web.Response:
    """An error that fal's clients can show: `@fal-ai/client` reads `message`, `fal_client`
    reads `detail`, which is a list where an input is refused, as in fal's own 422."""
    body: dict[str, object] = {
        "message": error.message,
        "detail": error.detail if isinstance(error, InputRefused) else error.message,
        "type": error.code,
        "request_id": request_id,
    }
    return web.json_response(body, status=error.status, headers=error.headers)
