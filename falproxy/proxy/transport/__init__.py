"""One request to a host and its answer: what a way there is, whichever of the two is taken."""

import errno
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple, Protocol

from multidict import CIMultiDict, CIMultiDictProxy

# fal keeps all response headers together below 16 KiB, which one field may fill; aiohttp's own
# limit for a field is 8190 bytes.
MAX_HEADER_FIELD = 32 * 1024
MAX_HEADERS = 512
# Idle connections are dropped before fal's side is likely to do so: what is written into a
# connection that just closed may or may not have arrived.
IDLE_SECONDS = 15.0


NO_HEADERS: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())


class ConnectError(Exception):
    """No connection came about, so that not a byte of the request has left."""


class ConnectionLostError(Exception):
    """The exchange broke off. The request may have arrived."""


def describe_error(error: BaseException | None) -> str:
    """What failed, and the system's word for it. Never its text, which may be the other side's."""
    number = getattr(error, "errno", None)
    return f"{type(error).__name__} {errno.errorcode.get(number or 0, '')}".strip()


class Origin(NamedTuple):
    """Where a request goes. host: without brackets."""

    host: str
    port: int
    is_tls: bool


class UpstreamRequest(NamedTuple):
    """A request as it goes out. path: with its query. headers: in order, `host` among them,
    nothing about framing. body: read once, None for none. length: of the body in bytes, None when
    that shows only at its end. head: all but the body in bytes, where it is known already."""

    origin: Origin
    method: str
    path: str
    headers: Iterable[tuple[str, str]]
    body: AsyncIterator[bytes] | None = None
    length: int | None = None
    head: bytes = b""


class TransportResponse(Protocol):
    """An answer whose head is here. It must be read to its end, or closed."""

    @property
    def method(self) -> str:
        """The request's."""

    @property
    def status(self) -> int: ...

    @property
    def reason(self) -> str: ...

    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """As they came: in order, repeats included."""

    @property
    def headers(self) -> CIMultiDictProxy[str]: ...

    @property
    def is_complete(self) -> bool:
        """Whether all of the body has arrived."""

    @property
    def is_consumed(self) -> bool:
        """Whether there is nothing more to read."""

    async def read(self) -> bytes:
        """The next bytes of the body as they arrived, empty at its end.

        Raises: TimeoutError, nothing came for too long; ConnectionLostError."""

    def drop_headers(self) -> None:
        """`headers` is needed no more, while the body may be under way for hours."""

    def close(self) -> None:
        """Gives up what was not read yet, and the connection with it."""


class Transport(Protocol):
    """A way to send requests, which keeps its connections."""

    async def send(self, request: UpstreamRequest) -> TransportResponse:
        """The answer, as soon as its head is here.

        Raises: ConnectError, ConnectionLostError, TimeoutError, and what the body raises."""
