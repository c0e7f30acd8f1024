"""A client connection that is cheap enough not to distort the measurement: HTTP/1.1, keep-alive."""

import asyncio
from collections.abc import Callable
from typing import Self, cast

Sink = Callable[[bytes], None]
RESPONSE_TIMEOUT = 30.0


class BadResponseError(Exception):
    """A response is missing, incomplete or wrong."""


def ignore(part: bytes) -> None:
    pass


class Response:
    """Reads one response: its head, then a body with a length or in chunks, passed to `sink`."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.status = 0
        self.headers: dict[str, str] = {}
        self.length = 0
        self.is_done = False
        self._head = bytearray()
        self._line = bytearray()
        self._remaining = -1  # bytes of the body or of the current chunk; -1 while unknown
        self._is_chunked = False

    def feed(self, data: bytes) -> None:
        if not self.status:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            data = bytes(self._head[end + 4 :])
            self._parse_head(bytes(self._head[:end]).decode("latin-1"))
        if self._is_chunked:
            self._feed_chunks(data)
        else:
            self._pass_body(data)
            self._remaining -= len(data)
            self.is_done = self._remaining <= 0

    def _parse_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        self.status = int(first.split(" ", 2)[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "")
        if not self._is_chunked:
            self._remaining = int(self.headers["content-length"])

    def _pass_body(self, data: bytes) -> None:
        self.length += len(data)
        self.sink(data)

    def _feed_chunks(self, data: bytes) -> None:
        position = 0
        while position < len(data) and not self.is_done:
            if self._remaining > 0:  # of the chunk, with the two bytes that end it
                part = data[position : position + self._remaining]
                position += len(part)
                if content := part[: max(0, self._remaining - 2)]:
                    self._pass_body(content)
                self._remaining -= len(part)
                continue
            end = data.find(b"\n", position)
            self._line += data[position : end + 1 if end >= 0 else len(data)]
            position = end + 1 if end >= 0 else len(data)
            if end >= 0:
                self._next_chunk()

    def _next_chunk(self) -> None:
        line, self._line = bytes(self._line).strip(), bytearray()
        if self._remaining == 0 and not line:
            self.is_done = True  # the empty line behind the last chunk
        elif size := int(line.partition(b";")[0], 16):
            self._remaining = size + 2
        else:
            self._remaining = 0


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._done: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, port: int) -> Self:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, "127.0.0.1", port)
        return connection

    async def request(self, request: bytes, sink: Sink = ignore) -> Response:
        """Raises: BadResponseError, the response did not arrive, or not in time."""
        if self._transport is None:
            raise BadResponseError("the connection was closed between two requests")
        response = self._response = Response(sink)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT):
                await self._done
        except TimeoutError:
            got = f"{response.length} bytes came" if response.status else "nothing came"
            raise BadResponseError(
                f"the response was incomplete after {RESPONSE_TIMEOUT:g} s: {got}"
            ) from None
        return response

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # TCP has no other kind

    def data_received(self, data: bytes) -> None:
        if self._response is None or self._done is None:
            return
        self._response.feed(data)
        if self._response.is_done and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(
                BadResponseError("the connection broke before the response was complete")
            )


async def request_once(port: int, request: bytes) -> tuple[Response, bytes]:
    """Send one request on a new connection. Return the response and its body."""
    parts: list[bytes] = []
    connection = await Connection.open(port)
    try:
        return await connection.request(request, parts.append), b"".join(parts)
    finally:
        connection.close()
