"""Serves one ASGI request by a connection in memory to the HTTP server.

The HTTP server's protocol stays the only implementation of requests: limits, streams, errors and
the whole pipeline are those of `falproxy serve`.
"""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import hdrs
from aiohttp.web_server import Server

from falproxy.proxy.transport.http1 import LAST_CHUNK, encode_chunk
from falproxy.server.asgi.memory_transport import MemoryTransport
from falproxy.server.asgi.request_head import (
    InvalidRequestError,
    Scope,
    content_length,
    has_unknown_length,
    serialize_request,
    split_path,
)
from falproxy.server.asgi.response_parser import Message, MessageParser
from falproxy.server.refusals import BAD_REQUEST, HEAD_TIMEOUT, Refusal

Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

NOT_FOUND = Refusal(404, "Not Found", "not_found", "There is nothing at this path.")
PIECE = 64 * 2**10  # bytes of a body that are passed on at once


class IncompleteResponseError(ConnectionResetError):
    """The response ended before it was complete. The ASGI server closes the connection, so that the
    client does not take the part for the whole."""


class InvalidBodyError(ValueError):
    """The body of a request has another length than its head announced."""


async def serve_request(
    server: Server, scope: Scope, receive: Receive, send: Send, *, prefix: str, head_timeout: float
) -> None:
    """Serve an ASGI request.

    prefix: path below which the proxy is found, besides the `root_path` of the scope.
    head_timeout: seconds to the first message of a request whose length is not in its head.

    Raises: IncompleteResponseError, InvalidBodyError.
    """
    paths = split_path(scope, prefix)
    if paths is None:
        await refuse(send, NOT_FOUND)
        return
    root_path, path = paths
    try:
        body = await begin_body(scope, receive, head_timeout)
        head = serialize_request(scope, path or b"/", body.framing())
    except InvalidRequestError:
        await refuse(send, BAD_REQUEST)
    except TimeoutError:
        await refuse(send, HEAD_TIMEOUT)
    else:
        transport = MemoryTransport(scope, root_path)
        transport.connect(server())
        transport.feed_data(head)
        await relay(transport, body, receive, send)


async def refuse(send: Send, refusal: Refusal) -> None:
    """Respond to a request that the HTTP server does not see."""
    parser = MessageParser(hdrs.METH_GET)
    parser.feed_data(refusal.response_bytes())
    while parser.messages:
        await send(parser.take())
    parser.close()


class RequestBody:
    """Encodes the body of a request, and checks that it has the length that its head announced.

    length: bytes; None for no body.
    first: the first message, if it has been received.
    """

    __slots__ = ("_is_chunked", "_length", "_missing", "first")

    def __init__(
        self, length: int | None, *, is_chunked: bool = False, first: Message | None = None
    ) -> None:
        self.first = first
        self._length = length
        self._missing = length or 0
        self._is_chunked = is_chunked

    def framing(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that show where the body ends."""
        if self._is_chunked:
            return [(b"transfer-encoding", b"chunked")]
        return [] if self._length is None else [(b"content-length", b"%d" % self._length)]

    def encode(self, piece: bytes) -> bytes:
        """Raises: InvalidBodyError, the body is too long."""
        if self._is_chunked:
            return encode_chunk(piece)
        self._missing -= len(piece)
        if self._missing < 0:
            raise InvalidBodyError("The body is longer than its Content-Length")
        return piece

    def end(self) -> bytes:
        """Raises: InvalidBodyError, the body is too short."""
        if self._is_chunked:
            return LAST_CHUNK
        if self._missing:
            raise InvalidBodyError("The body is shorter than its Content-Length")
        return b""


async def begin_body(scope: Scope, receive: Receive, timeout: float) -> RequestBody:  # noqa: ASYNC109
    """Return the body of a request. If the head does not show whether there is one, as in HTTP/2,
    the first message does.

    Raises: InvalidRequestError, TimeoutError.
    """
    length = content_length(scope)
    if not has_unknown_length(scope):
        return RequestBody(length)
    async with asyncio.timeout(timeout):
        first = await receive()
    if first.get("more_body", False):
        return RequestBody(None, is_chunked=True, first=first)
    return RequestBody(len(first.get("body", b"")) or None, first=first)


async def relay(
    transport: MemoryTransport, body: RequestBody, receive: Receive, send: Send
) -> None:
    """Relay the body of a request and its response, until the response is sent or the client has
    left. Raises: IncompleteResponseError, InvalidBodyError."""
    reader = asyncio.create_task(  # noqa: TID251 - awaited below
        read_request(transport, body, receive)
    )
    is_sent = has_left = False
    try:
        is_sent, has_left = await send_response(transport, send)
    finally:
        if not is_sent:
            transport.disconnect()
        transport.release()
        reader.cancel()
        await asyncio.wait([reader])
    error = None if reader.cancelled() else reader.exception()
    if is_sent or has_left or (reader.done() and not reader.cancelled() and error is None):
        return
    raise error or IncompleteResponseError("The response is incomplete")


async def read_request(transport: MemoryTransport, body: RequestBody, receive: Receive) -> None:
    """Pass the body of a request to the transport, at the speed at which it is read. Return when
    the client has left."""
    has_ended = False
    message, body.first = body.first, None
    try:
        while True:
            message = message or await receive()
            if message["type"] == "http.disconnect":
                break
            data = message.get("body", b"")
            for start in range(0, len(data), PIECE):
                await transport.can_read.wait()
                transport.feed_data(body.encode(data[start : start + PIECE]))
            if not has_ended and not message.get("more_body", False):
                has_ended = True
                transport.feed_data(body.end())
            message = None
            await transport.can_read.wait()
    except Exception:
        transport.disconnect()
        raise
    transport.disconnect()


async def send_response(transport: MemoryTransport, send: Send) -> tuple[bool, bool]:
    """Send the response. Returns: whether it was sent completely, and whether the client left."""
    loop = asyncio.get_running_loop()
    limit = asyncio.timeout(None)
    is_last = False
    try:
        async with limit:
            transport.on_break = lambda: limit.reschedule(loop.time())
            while not is_last and (message := await transport.next_message()) is not None:
                await send(message)
                transport.message_sent()
                is_last = not message.get("more_body", True)
    except OSError:  # from `send`: the client left (ASGI specification); or a TimeoutError
        return False, not limit.expired()
    finally:
        transport.on_break = None
    return is_last, False
