"""A response on a pooled connection, and the unread part of its body."""

import asyncio
from collections import deque
from typing import NamedTuple, Protocol

from multidict import CIMultiDict, CIMultiDictProxy, istr

from falproxy.proxy.headers import NameCache, decode_value
from falproxy.proxy.transport import NO_HEADERS

# Unread bytes of a body at which reading from the connection pauses and resumes. One read must not
# cause a pause.
READ_BUFFER_HIGH = 2**18
READ_BUFFER_LOW = 2**17
PIECE_OVERHEAD = 64  # bytes of memory that a piece needs besides its data


class ConnectionOwner(Protocol):
    """The connection that a response occupies until it is finished."""

    def finish(self, *, is_consumed: bool) -> None:
        """End the exchange: the body was consumed, or the rest is discarded. Called once."""

    def abandon(self) -> None:
        """End the exchange of a response that was garbage collected. Called instead of `finish`,
        from any thread."""


class ResponseWaiter(Protocol):
    """Receives a response or an error: a future, or an object that acts at once."""

    def done(self) -> bool:
        """Return whether a result is no longer wanted."""

    def set_result(self, result: "PooledResponse", /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...


class ReadFlow(Protocol):
    """Reading from a connection, which may be paused."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None:
        """Continue to read. No effect unless reading is paused."""


class ResponseHead(NamedTuple):
    """The status line and the headers of a response.

    length: the `Content-Length`, None without.
    is_chunked: there is a `Transfer-Encoding`.
    should_close: the connection ends with this response.
    """

    status: int
    reason: str
    raw_headers: tuple[tuple[bytes, bytes], ...]
    length: int | None
    is_chunked: bool
    should_close: bool


class BodyBuffer:
    """The part of a response body that has arrived and has not been read. It has one reader.

    error: raised by the reading methods, even if there are unread bytes.
    """

    __slots__ = ("_flow", "_pieces", "_size", "_waiter", "error", "is_complete")

    def __init__(self, flow: ReadFlow) -> None:
        self.error: Exception | None = None
        self.is_complete = False
        self._flow = flow
        self._pieces: deque[bytes] = deque()
        self._size = 0  # with `PIECE_OVERHEAD`
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_consumed(self) -> bool:
        return self.is_complete and not self._pieces

    def feed_data(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data) + PIECE_OVERHEAD
        if self._waiter is not None:
            self._wake_reader()
        if self._size > READ_BUFFER_HIGH:
            self._flow.pause_reading()

    def feed_eof(self) -> None:
        self.is_complete = True
        if self._waiter is not None:
            self._wake_reader()
        self._flow.resume_reading()

    def fail(self, error: Exception) -> None:
        """Set the error, unless the body is complete or has failed."""
        if not self.is_complete and self.error is None:
            self.error = error
            self._wake_reader()

    async def read_piece(self) -> bytes:
        """Return the next piece as it was received, empty at the end of the body."""
        await self._wait()
        if not self._pieces:
            return b""
        piece = self._pieces.popleft()
        self._size -= len(piece) + PIECE_OVERHEAD
        if self._size < READ_BUFFER_LOW:
            self._flow.resume_reading()
        return piece

    async def read_available(self) -> bytes:
        """Return all unread bytes, empty at the end of the body."""
        await self._wait()
        return self.read_nowait()

    def read_nowait(self) -> bytes:
        """Return all unread bytes, empty if there are none."""
        if self.error is not None:
            raise self.error
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._size = 0
        self._flow.resume_reading()
        return data

    async def _wait(self) -> None:
        """Wait for unread bytes or the end of the body."""
        while not self._pieces and not self.is_complete and self.error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.error is not None:
            raise self.error

    def _wake_reader(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class PooledResponse:
    __slots__ = (
        "_body",
        "_headers",
        "_is_chunked",
        "_owner",
        "method",
        "raw_headers",
        "reason",
        "status",
    )  # fmt: skip

    def __init__(
        self, owner: ConnectionOwner, method: str, head: ResponseHead, body: BodyBuffer
    ) -> None:
        self.method = method
        self.status = head.status
        self.reason = head.reason
        self.raw_headers = head.raw_headers
        self._headers: CIMultiDictProxy[str] | None = None
        self._is_chunked = head.is_chunked
        self._body = body
        self._owner: ConnectionOwner | None = owner

    def __repr__(self) -> str:
        state = "consumed" if self.is_consumed else "complete" if self.is_complete else "incomplete"
        return f"<PooledResponse {self.status} to {self.method}, {state}>"

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        if self._headers is None:
            self._headers = decode_headers(self.raw_headers)
        return self._headers

    @property
    def is_complete(self) -> bool:
        return self._body.is_complete

    @property
    def is_consumed(self) -> bool:
        return self._body.is_consumed

    async def read(self) -> bytes:
        body = self._body
        if body.is_complete or self._is_chunked:
            data = await body.read_available()
        else:  # joining large pieces costs more than sending them one by one
            data = await body.read_piece()
        if body.is_consumed:
            self._release()
        return data

    def read_nowait(self) -> bytes:
        """Return the whole body, which must be complete."""
        data = self._body.read_nowait()
        self._release()
        return data

    def drop_headers(self) -> None:
        self._headers = NO_HEADERS

    def close(self) -> None:
        self._release()

    def __del__(self) -> None:
        if self._owner is not None:
            self._owner.abandon()

    def _release(self) -> None:
        """Give the connection back, once: afterwards it may serve another request."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.finish(is_consumed=self._body.is_consumed)


def decode_name(raw_name: bytes) -> istr:
    return istr(decode_value(raw_name))


NAMES = NameCache(decode_name)


def decode_headers(raw_headers: tuple[tuple[bytes, bytes], ...]) -> CIMultiDictProxy[str]:
    """Return header fields as text. Bytes that are not UTF-8 become surrogates."""
    try:
        fields = [(NAMES[name], value.decode()) for name, value in raw_headers]
    except UnicodeDecodeError:
        fields = [(NAMES[name], decode_value(value)) for name, value in raw_headers]
    return CIMultiDictProxy(CIMultiDict(fields))
