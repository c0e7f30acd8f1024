"""Connections to hosts that users name. Each IP address is checked when it is connected to."""

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

MAX_CONNECTIONS = 64
MAX_CONNECTIONS_PER_HOST = 16  # a slow host must not use all connections
MAX_LOOKUPS = 16  # concurrent DNS lookups
HEADERS = {
    "User-Agent": f"falproxy/{__version__}",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
}
NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
# For each address that the current task tried to connect to: whether it was allowed.
CHECKED: ContextVar[list[bool]] = ContextVar("falproxy.fetch.checked")


class PrivateAddressError(OSError):
    """The address is private. After an OSError, aiohttp tries the next address."""


def ssrf_connector(resolver: AbstractResolver, is_allowed: Callable[[str], bool]) -> TCPConnector:
    """Return a connector that connects to allowed addresses only.

    The check is made when a socket is opened: aiohttp does not resolve IP addresses in URLs, and a
    resolver may return other addresses the next time.
    """

    def open_socket(info: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = info
        CHECKED.get().append(is_allowed(str(address[0])))
        if not CHECKED.get()[-1]:
            raise PrivateAddressError
        return socket.socket(family, kind, protocol)

    # One request for each connection, so that late data of a host is never taken for the response
    # to another request.
    return TCPConnector(
        resolver=resolver,
        use_dns_cache=False,
        socket_factory=open_socket,
        limit=MAX_CONNECTIONS,
        limit_per_host=MAX_CONNECTIONS_PER_HOST,
        force_close=True,
    )


def is_private_address_error(error: Exception) -> bool:
    """Return whether the current task's request failed because all addresses were refused."""
    checked = CHECKED.get()
    return isinstance(error, ClientConnectorError) and True not in checked and False in checked


def open_session(connector: TCPConnector) -> ClientSession:
    """Return a session without cookies, decompression and environment proxies."""
    session = ClientSession(
        connector=connector,
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        headers=HEADERS,
    )
    session._retry_connection = False  # as in upstream.py: retries are ours to decide
    return session


class ThreadedResolver(AbstractResolver):
    """The system's resolver in daemon threads.

    Names with slow servers would otherwise occupy the event loop's thread pool, which blocks all
    other lookups and the end of the process.
    """

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
                family=address_family,
                proto=protocol,
                flags=NUMERIC,
            )
            for address_family, _, protocol, _, address in infos
        ]

    async def close(self) -> None:
        """Do nothing: running lookups end by themselves."""


def look_up(host: str, port: int, family: int) -> Sequence[AddrInfoType]:
    return socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
