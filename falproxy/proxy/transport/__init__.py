"""The interface of a transport: sends one request to an origin and returns its response.

Two implementations: `pool.Pool`, falproxy's own connections, and
`aiohttp_transport.AiohttpTransport`, on aiohttp's client.
"""

import errno
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple, Protocol

from multidict import CIMultiDict, CIMultiDictProxy

# fal limits all response headers together to 16 KiB, which one field may fill; aiohttp's own
# limit for a field is 8190 bytes.
MAX_HEADER_FIELD = 32 * 1024
MAX_HEADERS = 512
# Idle connections are closed before fal is likely to close them: a request that is written into a
# connection that fal has just closed may or may not have arrived.
IDLE_SECONDS = 15.0


NO_HEADERS: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())


class ConnectError(Exception):
    """No connection could be opened. No byte of the request has been sent."""


class ConnectionLostError(Exception):
    """The connection ended before the response was complete. The request may have arrived."""


def describe_error(error: BaseException | None) -> str:
    """Return the type of an error and its errno symbol, such as `OSError ECONNREFUSED`. Its text
    is left out, since it may come from the peer."""
    number = getattr(error, "errno", None)
    return f"{type(error).__name__} {errno.errorcode.get(number or 0, '')}".strip()


class Origin(NamedTuple):
    """Scheme, host and port of a server. host: an IPv6 address has no brackets."""

    host: str
    port: int
    is_tls: bool


class UpstreamRequest(NamedTuple):
    """A request as it is sent.

    path: includes the query.
    headers: in order, with `host`, without the framing headers.
    body: read once; None for no body.
    length: bytes of the body; None if unknown until its end.
    head: request line and headers as bytes; empty if not serialized yet.
    """

    origin: Origin
    method: str
    path: str
    headers: Iterable[tuple[str, str]]
    body: AsyncIterator[bytes] | None = None
    length: int | None = None
    head: bytes = b""

    def __repr__(self) -> str:  # the headers hold fal's key
        return f"<UpstreamRequest {self.method} {self.origin.host}{self.path}>"


class TransportResponse(Protocol):
    """A response whose head has arrived. Its body must be read to the end, or closed."""

    @property
    def method(self) -> str: ...

    @property
    def status(self) -> int: ...

    @property
    def reason(self) -> str: ...

    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The header fields as received: in order, repeated ones included."""

    @property
    def headers(self) -> CIMultiDictProxy[str]: ...

    @property
    def is_complete(self) -> bool:
        """Whether all of the body has arrived."""

    @property
    def is_consumed(self) -> bool:
        """Whether all of the body has been read."""

    async def read(self) -> bytes:
        """Return the next bytes of the body as they arrive, empty at its end.

        Raises: TimeoutError, no byte arrived within the read timeout; ConnectionLostError.
        """

    def drop_headers(self) -> None:
        """Free `headers`: the body may take hours."""

    def close(self) -> None:
        """Discard the unread rest of the body and close the connection."""


class Transport(Protocol):
    """Sends requests and keeps connections open between them."""

    async def send(self, request: UpstreamRequest) -> TransportResponse:
        """Send a request and return its response as soon as the head has arrived.

        Raises: ConnectError, ConnectionLostError, TimeoutError, and the exceptions of the body.
        """
