"""A response on a pooled connection."""

from typing import Protocol

from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from falproxy.proxy.transport import NO_HEADERS


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


class PooledResponse:
    """A `TransportResponse` on a pooled connection."""

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

    def __repr__(self) -> str:
        state = "consumed" if self.is_consumed else "complete" if self.is_complete else "incomplete"
        return f"<PooledResponse {self.status} to {self.method}, {state}>"

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
        else:  # joining large pieces costs more than sending them one by one
            chunk, _ = await payload.readchunk()
        if payload.at_eof():
            self._release()
        return chunk

    def read_nowait(self) -> bytes:
        """Return the whole body, which must be complete."""
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
        """Give the connection back, once: afterwards it may serve another request."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.finish(is_consumed=self._payload.at_eof())
