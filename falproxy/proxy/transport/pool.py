"""Kept connections, and how new ones come about."""

import asyncio
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator
from functools import partial
from socket import AF_UNSPEC, SO_KEEPALIVE, SOL_SOCKET
from weakref import WeakSet

import aiohappyeyeballs
from aiohttp.abc import AbstractResolver
from aiohttp.resolver import DefaultResolver

from falproxy.proxy.transport import (
    ConnectError,
    ConnectionLostError,
    Origin,
    TransportResponse,
    UpstreamRequest,
    describe_error,
)
from falproxy.proxy.transport.buffered_protocol import BUFFER_SIZE, SharedBufferProtocol
from falproxy.proxy.transport.connection import Connection
from falproxy.proxy.transport.sockets import addr_info, literal_addr_info
from falproxy.proxy.transport.wire import serialize_request_head

# Connections to one host that are kept while nobody needs them.
IDLE_MAX = 512
# Seconds after which the next address of a host is tried beside the first (RFC 8305).
HAPPY_EYEBALLS_DELAY = 0.25
# Seconds that a host's addresses are remembered.
DNS_TTL = 10.0

Addresses = list[aiohappyeyeballs.AddrInfoType]


class Pool:
    """A way to send requests. There is no limit on connections, which would be a hidden queue.

    timeouts: seconds until a connection must stand, and seconds that the other side may be silent
    while it is its turn. trust: whose certificates are believed.
    """

    def __init__(
        self,
        timeouts: tuple[float, float],
        *,
        ssl_context: ssl.SSLContext | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._connect_timeout, self._read_timeout = timeouts
        self._ssl_context = ssl_context
        self._resolver = resolver
        self._idle: dict[Origin, list[Connection]] = defaultdict(list)
        self._open_connections: WeakSet[Connection] = WeakSet()
        self._connecting: set[asyncio.Task[Connection]] = set()
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._dns_cache: dict[Origin, tuple[float, asyncio.Future[Addresses]]] = {}

    async def send(self, request: UpstreamRequest) -> TransportResponse:
        head = request.head or serialize_request_head(request)
        connection = self.acquire_idle(request.origin) or await self._new_connection(request.origin)
        if request.body is None:
            return await connection.exchange(request, head, b"")
        first = await self._read_first_chunk(request, request.body, connection)
        if not connection.is_reusable(check_socket=connection.was_used):
            connection.close()
            connection = self.acquire_idle(request.origin) or await self._reconnect(request.origin)
        return await connection.exchange(request, head, first)

    async def close(self) -> None:
        for dialling in [*self._connecting]:
            dialling.cancel()
        for connection in [*self._open_connections]:
            connection.close()
        self._idle.clear()
        if self._resolver is not None:
            await self._resolver.close()

    async def _read_first_chunk(
        self, request: UpstreamRequest, body: AsyncIterator[bytes], connection: Connection
    ) -> bytes:
        """The first bytes of a body. Until they are here, nothing is sent."""
        try:
            return await anext(body, b"")
        except BaseException:
            self._release(request.origin, connection)
            raise

    async def _reconnect(self, origin: Origin) -> Connection:
        """Nobody can send a body again of which some is read: no other host is to be tried."""
        try:
            return await self._new_connection(origin)
        except ConnectError as error:
            raise ConnectionLostError(str(error)) from error

    def acquire_idle(self, origin: Origin) -> Connection | None:
        """A connection that stands already."""
        idle = self._idle[origin]
        while idle:
            connection = idle.pop()
            if connection.is_reusable(check_socket=True):
                return connection
            connection.close()
        return None

    def _release(self, origin: Origin, connection: Connection) -> None:
        idle = self._idle[origin]
        if len(idle) < IDLE_MAX:
            idle.append(connection)
        else:
            connection.close()

    async def _new_connection(self, origin: Origin) -> Connection:
        dialling = asyncio.get_running_loop().create_task(self._connect_with_timeout(origin))
        self._connecting.add(dialling)
        dialling.add_done_callback(self._connecting.discard)
        try:
            return await asyncio.shield(dialling)
        except asyncio.CancelledError:
            # A connection that is cancelled while it comes about leaves its socket in a state that
            # depends on the event loop. This one is for whoever comes next.
            dialling.add_done_callback(partial(self._release_late, origin))
            raise
        except (OSError, ssl.SSLError, ssl.CertificateError, TimeoutError) as error:
            self._dns_cache.pop(origin, None)
            raise ConnectError(describe_error(error)) from error

    async def _connect_with_timeout(self, origin: Origin) -> Connection:
        async with asyncio.timeout(self._connect_timeout):
            return await self._open_connection(origin)

    def _release_late(self, origin: Origin, connecting: asyncio.Task[Connection]) -> None:
        if not connecting.cancelled() and connecting.exception() is None:
            self._release(origin, connecting.result())

    async def _open_connection(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = await self._resolve_cached(origin)
        reached = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY, interleave=1, loop=loop
        )
        reached.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        release = partial(self._release, origin)
        transport, reading = await loop.create_connection(
            lambda: SharedBufferProtocol(
                Connection(loop, self._read_timeout, release), self._buffer
            ),
            sock=reached,
            ssl=self._get_ssl_context() if origin.is_tls else None,
            server_hostname=origin.host if origin.is_tls else None,
        )
        if described := transport.get_extra_info("peercert"):
            described.clear()  # the certificate in words, 2 KB of them, which nobody reads
        self._open_connections.add(reading.connection)
        return reading.connection

    def _get_ssl_context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
            self._ssl_context.set_alpn_protocols(("http/1.1",))
        return self._ssl_context

    async def _resolve_cached(self, origin: Origin) -> Addresses:
        """The addresses of a host. All who need them at once wait for one answer."""
        if literal := literal_addr_info(origin):
            return [literal]
        loop = asyncio.get_running_loop()
        now = loop.time()
        until, asked = self._dns_cache.get(origin, (0.0, None))
        if asked is None or now > until:
            asked = loop.create_task(self._resolve(origin))
            self._dns_cache[origin] = (now + DNS_TTL, asked)
        return await asyncio.shield(asked)

    async def _resolve(self, origin: Origin) -> Addresses:
        if self._resolver is None:
            self._resolver = DefaultResolver()
        found = await self._resolver.resolve(origin.host, origin.port, AF_UNSPEC)
        return [addr_info(each["family"], each["host"], each["port"]) for each in found]
