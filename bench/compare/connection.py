"""A client's connection, fast enough not to be what is measured: HTTP/1.1, kept alive."""

import asyncio
from collections.abc import Callable
from typing import Self, cast

Sink = Callable[[bytes], None]
ASK_SECONDS = 30.0


class BrokenError(Exception):
    """An answer is not what it has to be."""


def ignore(part: bytes) -> None:
    pass


class Answer:
    """Reads one answer: its head, then a body with a length or in chunks, which goes to `sink`."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.status = 0
        self.headers: dict[str, str] = {}
        self.length = 0
        self.is_done = False
        self._head = bytearray()
        self._line = bytearray()
        self._left = -1  # of the body, or of the present chunk; -1 before it is known
        self._is_chunked = False

    def feed(self, data: bytes) -> None:
        if not self.status:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            data = bytes(self._head[end + 4 :])
            self._begin(bytes(self._head[:end]).decode("latin-1"))
        if self._is_chunked:
            self._feed_chunks(data)
        else:
            self._take(data)
            self._left -= len(data)
            self.is_done = self._left <= 0

    def _begin(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        self.status = int(first.split(" ", 2)[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "")
        if not self._is_chunked:
            self._left = int(self.headers["content-length"])

    def _take(self, data: bytes) -> None:
        self.length += len(data)
        self.sink(data)

    def _feed_chunks(self, data: bytes) -> None:
        place = 0
        while place < len(data) and not self.is_done:
            if self._left > 0:  # of the chunk, with the two bytes that end it
                part = data[place : place + self._left]
                place += len(part)
                if kept := part[: max(0, self._left - 2)]:
                    self._take(kept)
                self._left -= len(part)
                continue
            end = data.find(b"\n", place)
            self._line += data[place : end + 1 if end >= 0 else len(data)]
            place = end + 1 if end >= 0 else len(data)
            if end >= 0:
                self._next_chunk()

    def _next_chunk(self) -> None:
        line, self._line = bytes(self._line).strip(), bytearray()
        if self._left == 0 and not line:
            self.is_done = True  # the empty line behind the last chunk
        elif size := int(line.partition(b";")[0], 16):
            self._left = size + 2
        else:
            self._left = 0


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, port: int) -> Self:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, "127.0.0.1", port)
        return connection

    async def ask(self, request: bytes, sink: Sink = ignore) -> Answer:
        """Raises: BrokenError, the connection broke, or nothing came of it in time."""
        if self._transport is None:
            raise BrokenError("the connection was closed between two requests")
        answer = self._answer = Answer(sink)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            async with asyncio.timeout(ASK_SECONDS):
                await self._done
        except TimeoutError:
            got = f"{answer.length} bytes came" if answer.status else "nothing came"
            raise BrokenError(f"an answer was not whole after {ASK_SECONDS:g} s: {got}") from None
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # TCP has no other kind

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._done is None:
            return
        self._answer.feed(data)
        if self._answer.is_done and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(BrokenError("the connection broke in the middle"))


async def ask_once(port: int, request: bytes) -> tuple[Answer, bytes]:
    """One request on a connection of its own, and the body of its answer."""
    parts: list[bytes] = []
    connection = await Connection.open(port)
    try:
        return await connection.ask(request, parts.append), b"".join(parts)
    finally:
        connection.close()
