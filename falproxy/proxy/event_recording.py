"""An event stream that is read to its end, even if the client leaves, so that it is replayable."""

import asyncio
from collections.abc import Iterable
from typing import Self

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter

from falproxy.errors import ProxyError
from falproxy.proxy.forward import (
    LINE_MAX,
    RelayedResponse,
    Rewrite,
    apply_rewrites,
    reset_connection,
)

EVENT_STREAM = "text/event-stream"
STALL_TIMEOUT = 300.0  # seconds after which a client that reads nothing counts as gone
WAITING_MAX = 16  # pieces that the client has not read; reading pauses then


class RecordedEventStream(web.StreamResponse):
    """The events of a response, for the client and for a recording.

    Reading (`record`) and sending run in different tasks. Like a RelayedResponse, it can be read by
    a caller that does not send it.
    """

    def __init__(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        super().__init__(status=status)
        self.headers.extend(headers)
        self.headers.popall(hdrs.CONTENT_LENGTH, None)
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(WAITING_MAX)
        self._rewrites: list[Rewrite] = []
        self._error: ProxyError | None = None
        self._is_left = False

    @classmethod
    def replay(cls, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> Self:
        """Return a stream of recorded events."""
        response = cls(status, headers)
        for piece in (body, b""):
            response._waiting.put_nowait(piece)
        return response

    async def record(self, source: RelayedResponse, limit: int) -> bytes | None:
        """Read fal's response to its end, and return it; None if it has more than `limit` bytes.

        Raises: ProxyError 502, 504.
        """
        recorded: list[bytes] = []
        size, rest, chunk = 0, b"", b"-"
        try:
            while chunk:
                chunk = await source.read_chunk()
                lines, line_end, rest = (rest + chunk).rpartition(b"\n")
                is_last = not chunk or len(rest) > LINE_MAX
                lines, rest = (
                    (lines + line_end + rest, b"") if is_last else (lines + line_end, rest)
                )
                if not lines:
                    continue
                piece = await source.rewrite(lines)
                size += len(piece)
                if size <= limit:
                    recorded.append(piece)
                await self._put(piece)
        except ProxyError as error:
            self._error = error
            raise
        finally:
            source.discard()
            await self._put(b"")
        return b"".join(recorded) if size <= limit else None

    async def _put(self, piece: bytes) -> None:
        if self._is_left:
            return
        try:
            async with asyncio.timeout(STALL_TIMEOUT):
                await self._waiting.put(piece)
        except TimeoutError:
            self.discard()

    def rewrite_lines(self, rewrite: Rewrite) -> None:
        self._rewrites.append(rewrite)

    async def read_chunk(self) -> bytes:
        """Return the next events, empty at the end. Raises: ProxyError 502, 504."""
        piece = await self._waiting.get()
        if not piece:
            self._waiting.put_nowait(b"")
            if self._error is not None:
                raise self._error
        return piece

    async def rewrite(self, lines: bytes) -> bytes:
        return b"".join([piece async for piece in apply_rewrites(lines, self._rewrites)])

    def discard(self) -> None:
        """Stop passing events on. They are still recorded."""
        self._is_left = True
        while not self._waiting.empty():
            self._waiting.get_nowait()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if self.prepared:
            return await super().prepare(request)
        if request.version < HttpVersion11:
            self.force_close()  # the end of the connection marks the end of the stream
        try:
            writer = await super().prepare(request)
            while piece := await self.read_chunk():
                async for rewritten in apply_rewrites(piece, self._rewrites):
                    await self.write(rewritten)
            await self.write_eof()
        except ProxyError as error:
            reset_connection(request)
            raise ConnectionResetError(error.code) from error
        finally:
            self.discard()
        return writer
