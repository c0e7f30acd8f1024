"""Connections to hosts that users name: each address is judged when it is connected to."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial

from aiohttp import ClientConnectorError, ClientSession, DummyCookieJar, TCPConnector
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import AddrInfoType

from falproxy.concurrency import run_in_daemon_thread
from falproxy.version import __version__

MAX_CONNECTIONS = 64  # at once; who comes later waits
MAX_CONNECTIONS_PER_HOST = 16  # host, which may be slow
MAX_LOOKUPS = 16
HEADERS = {
    "User-Agent": f"falproxy/{__version__}",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
}
NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
# Of the addresses that the exchange of this task tried, which ones were let through.
CHECKED: ContextVar[list[bool]] = ContextVar("falproxy.fetch.asked")


class PrivateAddressError(OSError):
    """An address that is not connected to. Only after an OSError is the next one tried."""


def ssrf_connector(resolver: AbstractResolver, is_allowed: Callable[[str], bool]) -> TCPConnector:
    """Connects to allowed addresses only. This is the one place that sees them all: aiohttp asks
    no resolver about addresses in URLs, and the answers of a resolver may change."""

    def open_socket(info: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = info
        CHECKED.get().append(is_allowed(str(address[0])))
        if not CHECKED.get()[-1]:
            raise PrivateAddressError
        return socket.socket(family, kind, protocol)

    # A connection serves one exchange, so that nothing which a host says later is anybody's answer.
    return TCPConnector(
        resolver=resolver,
        use_dns_cache=False,
        socket_factory=open_socket,
        limit=MAX_CONNECTIONS,
        limit_per_host=MAX_CONNECTIONS_PER_HOST,
        force_close=True,
    )


def is_private_address_error(error: Exception) -> bool:
    """Whether the exchange of this task failed because all its addresses were refused."""
    asked = CHECKED.get()
    return isinstance(error, ClientConnectorError) and True not in asked and False in asked


def open_session(connector: TCPConnector) -> ClientSession:
    """A session that keeps no cookies, decodes nothing and goes through no proxy."""
    session = ClientSession(
        connector=connector,
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        headers=HEADERS,
    )
    session._retry_connection = False  # as in upstream.py: how often is tried is ours to say
    return session


class ThreadedResolver(AbstractResolver):
    """The system's resolver in threads of its own: names whose servers are slow would otherwise
    take all of the event loop's, and nobody else could look anything up. A thread that waits for
    such a server does not keep the process from ending."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(MAX_LOOKUPS)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        async with self._slots:
            infos = await run_in_daemon_thread(partial(look_up, host, port, family))
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=found,
                proto=protocol,
                flags=NUMERIC,
            )
            for found, _, protocol, _, address in infos
        ]

    async def close(self) -> None:
        """There is nothing to close: what still waits ends by itself."""


def look_up(host: str, port: int, family: int) -> Sequence[AddrInfoType]:
    return socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
