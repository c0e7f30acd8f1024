"""A transport of falproxy's own: a pool of connections, and how they are opened."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from functools import partial
from ipaddress import ip_address
from socket import (
    AF_INET,
    AF_INET6,
    AF_UNSPEC,
    IPPROTO_TCP,
    SO_KEEPALIVE,
    SOCK_STREAM,
    SOL_SOCKET,
)
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
from falproxy.proxy.transport.connection import BUFFER_SIZE, Connection, SharedBufferProtocol
from falproxy.proxy.transport.http1 import serialize_request_head

IDLE_MAX = 512  # idle connections to one origin
ORIGINS_MAX = 64  # origins that are remembered; above that, those without use are dropped
HAPPY_EYEBALLS_DELAY = 0.25  # seconds until a host's next address is tried in parallel (RFC 8305)
DNS_TTL = 10.0  # seconds

Addresses = list[aiohappyeyeballs.AddrInfoType]


class Pool:
    """A `Transport`. The number of connections is not limited: a limit would be a hidden queue.

    timeouts: seconds to connect, and seconds without a byte while a response is expected.
    ssl_context: None for the system's certificates.
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
        self._idle: dict[Origin, list[Connection]] = {}
        self._open_connections: WeakSet[Connection] = WeakSet()
        self._connecting: set[asyncio.Task[Connection]] = set()
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._dns_cache: dict[Origin, tuple[float, asyncio.Future[Addresses]]] = {}

    def __repr__(self) -> str:
        idle = sum(map(len, self._idle.values()))
        return (
            f"<Pool {len(self._open_connections)} open, {idle} idle, "
            f"{len(self._connecting)} connecting>"
        )

    async def send(self, request: UpstreamRequest) -> TransportResponse:
        head = request.head or serialize_request_head(request)
        connection = self.acquire_idle(request.origin) or await self._new_connection(request.origin)
        if request.body is None:
            return await connection.exchange(request, head, b"")
        first_chunk = await self._read_first_chunk(request, request.body, connection)
        if not connection.is_reusable(check_socket=connection.was_used):
            connection.close()
            connection = self.acquire_idle(request.origin) or await self._reconnect(request.origin)
        return await connection.exchange(request, head, first_chunk)

    async def close(self) -> None:
        for task in [*self._connecting]:
            task.cancel()
        for connection in [*self._open_connections]:
            connection.close()
        self._idle.clear()
        if self._resolver is not None:
            await self._resolver.close()

    async def _read_first_chunk(
        self, request: UpstreamRequest, body: AsyncIterator[bytes], connection: Connection
    ) -> bytes:
        """Return the first bytes of a body. The head is sent together with them."""
        try:
            return await anext(body, b"")
        except BaseException:
            self._release(request.origin, connection)
            raise

    async def _reconnect(self, origin: Origin) -> Connection:
        """Open a connection for a request whose body was begun. A failure is no ConnectError: the
        body cannot be sent again to another host."""
        try:
            return await self._new_connection(origin)
        except ConnectError as error:
            raise ConnectionLostError(str(error)) from error

    def acquire_idle(self, origin: Origin) -> Connection | None:
        """Take an idle connection out of the pool. None if there is none that is reusable."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.is_reusable(check_socket=True):
                return connection
            connection.close()
        return None

    def _release(self, origin: Origin, connection: Connection) -> None:
        idle = self._idle.get(origin)
        if idle is None:
            self._drop_unused_origins()
            idle = self._idle[origin] = []
        if len(idle) < IDLE_MAX:
            idle.append(connection)
        else:
            connection.close()

    def _forget(self, origin: Origin, connection: Connection) -> None:
        """Drop a connection that has ended while it was idle. After a peak there may be hundreds,
        each of which would keep a piece of memory from being returned to the system."""
        idle = self._idle.get(origin, [])
        if connection in idle:
            idle.remove(connection)

    def _drop_unused_origins(self) -> None:
        """Free the lists of origins without a connection: clients may name any number of hosts."""
        if len(self._idle) >= ORIGINS_MAX:
            self._idle = {
                origin: reusable
                for origin, idle in self._idle.items()
                if (reusable := [each for each in idle if each.is_reusable(check_socket=False)])
            }

    async def _new_connection(self, origin: Origin) -> Connection:
        connecting = asyncio.get_running_loop().create_task(self._connect_with_timeout(origin))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            # Cancelling `create_connection` leaves the socket in a state that depends on the event
            # loop. So it runs to its end, and the next request gets the connection.
            connecting.add_done_callback(partial(self._release_late, origin))
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
        connected = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY, interleave=1, loop=loop
        )
        connected.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        release, forget = partial(self._release, origin), partial(self._forget, origin)
        transport, protocol = await loop.create_connection(
            lambda: SharedBufferProtocol(
                Connection(loop, self._read_timeout, release, forget), self._buffer
            ),
            sock=connected,
            ssl=self._get_ssl_context() if origin.is_tls else None,
            server_hostname=origin.host if origin.is_tls else None,
        )
        if certificate := transport.get_extra_info("peercert"):
            certificate.clear()  # the decoded certificate: 2 KB that are not used
        self._open_connections.add(protocol.connection)
        return protocol.connection

    def _get_ssl_context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
            self._ssl_context.set_alpn_protocols(("http/1.1",))
        return self._ssl_context

    async def _resolve_cached(self, origin: Origin) -> Addresses:
        """Return the addresses of a host. Concurrent callers share one look-up."""
        if literal := literal_addr_info(origin):
            return [literal]
        loop = asyncio.get_running_loop()
        now = loop.time()
        expires_at, lookup = self._dns_cache.get(origin, (0.0, None))
        if lookup is None or now > expires_at:
            if len(self._dns_cache) >= ORIGINS_MAX:
                self._dns_cache.clear()  # clients may name any number of hosts
            lookup = loop.create_task(self._resolve(origin))
            self._dns_cache[origin] = (now + DNS_TTL, lookup)
        return await asyncio.shield(lookup)

    async def _resolve(self, origin: Origin) -> Addresses:
        if self._resolver is None:
            self._resolver = DefaultResolver()
        results = await self._resolver.resolve(origin.host, origin.port, AF_UNSPEC)
        return [addr_info(result["family"], result["host"], result["port"]) for result in results]


def literal_addr_info(origin: Origin) -> aiohappyeyeballs.AddrInfoType | None:
    """Return the address of an origin whose host is an IP address, else None."""
    try:
        version = ip_address(origin.host).version
    except ValueError:
        return None
    return addr_info(AF_INET if version == 4 else AF_INET6, origin.host, origin.port)


def addr_info(family: int, host: str, port: int) -> aiohappyeyeballs.AddrInfoType:
    """Return an address in the form of `socket.getaddrinfo`."""
    address = (host, port, 0, 0) if family == AF_INET6 else (host, port)
    return (family, SOCK_STREAM, IPPROTO_TCP, "", address)
