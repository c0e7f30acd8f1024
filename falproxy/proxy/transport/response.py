"""An answer on a kept connection."""

from typing import Protocol

from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from falproxy.proxy.transport import NO_HEADERS


class ConnectionOwner(Protocol):
    """Whose answer it is."""

    def finish(self, *, is_consumed: bool) -> None:
        """The answer is read to its end, or nobody reads it any more. Called once."""

    def abandon(self) -> None:
        """The answer was dropped unread. Called instead, from any thread."""


class PooledResponse:
    """An answer on a kept connection, as `falproxy.proxy.transport.Answer` says."""

    __slots__ = (
        "_is_chunked",
        "_owner",
        "_payload",
        "headers",
        "method",
        "raw_headers",
        "reason",
        "status",
    )  # fmt: skip

    def __init__(
        self,
        owner: ConnectionOwner,
        method: str,
        message: RawResponseMessage,
        payload: StreamReader,
    ) -> None:
        self.method = method
        self.status = message.code
        self.reason = message.reason
        self.headers = message.headers
        self.raw_headers = message.raw_headers
        self._owner: ConnectionOwner | None = owner
        self._is_chunked = message.chunked
        self._payload = payload

    @property
    def is_complete(self) -> bool:
        return self._payload.is_eof()

    @property
    def is_consumed(self) -> bool:
        return self._payload.at_eof()

    async def read(self) -> bytes:
        payload = self._payload
        if payload.is_eof() or self._is_chunked:
            chunk = await payload.readany()
        else:  # piece by piece: to join large ones costs more than to send them one by one
            chunk, _ = await payload.readchunk()
        if payload.at_eof():
            self._release()
        return chunk

    def read_nowait(self) -> bytes:
        """The body, when all of it is here."""
        body: bytes = self._payload.read_nowait()
        self._release()
        return body

    def drop_headers(self) -> None:
        self.headers = NO_HEADERS

    def close(self) -> None:
        self._release()

    def __del__(self) -> None:
        if self._owner is not None:
            self._owner.abandon()

    def _release(self) -> None:
        """Only once: the connection may be in use for another answer afterwards."""
        holder, self._owner = self._owner, None
        if holder is not None:
            holder.finish(is_consumed=self._payload.at_eof())


class ResponseWaiter(Protocol):
    """Who waits for an answer: a future, or whoever can be told at once."""

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, result: PooledResponse, /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...
