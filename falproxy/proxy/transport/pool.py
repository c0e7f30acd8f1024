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

from falproxy.proxy.transport import Answer, Ask, BrokenError, NotConnectedError, Origin, kind_of
from falproxy.proxy.transport.buffered_protocol import SIZE, Reading
from falproxy.proxy.transport.connection import Connection
from falproxy.proxy.transport.sockets import address, literal_address
from falproxy.proxy.transport.wire import head_of

# Connections to one host that are kept while nobody needs them.
IDLE_MAX = 512
# Seconds after which the next address of a host is tried beside the first (RFC 8305).
NEXT_ADDRESS = 0.25
# Seconds that a host's addresses are remembered.
NAMES_SECONDS = 10.0

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
        trust: ssl.SSLContext | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._connect, self._silence = timeouts
        self._trust = trust
        self._resolver = resolver
        self._idle: dict[Origin, list[Connection]] = defaultdict(list)
        self._open: WeakSet[Connection] = WeakSet()
        self._dialling: set[asyncio.Task[Connection]] = set()
        self._buffer = memoryview(bytearray(SIZE))
        self._names: dict[Origin, tuple[float, asyncio.Future[Addresses]]] = {}

    async def send(self, ask: Ask) -> Answer:
        head = ask.head or head_of(ask)
        connection = self.kept(ask.origin) or await self._new(ask.origin)
        if ask.body is None:
            return await connection.exchange(ask, head, b"")
        first = await self._begin(ask, ask.body, connection)
        if not connection.is_fresh(surely=connection.has_served):
            connection.close()
            connection = self.kept(ask.origin) or await self._new_for_begun(ask.origin)
        return await connection.exchange(ask, head, first)

    async def close(self) -> None:
        for dialling in [*self._dialling]:
            dialling.cancel()
        for connection in [*self._open]:
            connection.close()
        self._idle.clear()
        if self._resolver is not None:
            await self._resolver.close()

    async def _begin(self, ask: Ask, body: AsyncIterator[bytes], connection: Connection) -> bytes:
        """The first bytes of a body. Until they are here, nothing is sent."""
        try:
            return await anext(body, b"")
        except BaseException:
            self._release(ask.origin, connection)
            raise

    async def _new_for_begun(self, origin: Origin) -> Connection:
        """Nobody can send a body again of which some is read: no other host is to be tried."""
        try:
            return await self._new(origin)
        except NotConnectedError as error:
            raise BrokenError(str(error)) from error

    def kept(self, origin: Origin) -> Connection | None:
        """A connection that stands already."""
        idle = self._idle[origin]
        while idle:
            connection = idle.pop()
            if connection.is_fresh(surely=True):
                return connection
            connection.close()
        return None

    def _release(self, origin: Origin, connection: Connection) -> None:
        idle = self._idle[origin]
        if len(idle) < IDLE_MAX:
            idle.append(connection)
        else:
            connection.close()

    async def _new(self, origin: Origin) -> Connection:
        dialling = asyncio.get_running_loop().create_task(self._dial_in_time(origin))
        self._dialling.add(dialling)
        dialling.add_done_callback(self._dialling.discard)
        try:
            return await asyncio.shield(dialling)
        except asyncio.CancelledError:
            # A connection that is cancelled while it comes about leaves its socket in a state that
            # depends on the event loop. This one is for whoever comes next.
            dialling.add_done_callback(partial(self._put_by, origin))
            raise
        except (OSError, ssl.SSLError, ssl.CertificateError, TimeoutError) as error:
            self._names.pop(origin, None)
            raise NotConnectedError(kind_of(error)) from error

    async def _dial_in_time(self, origin: Origin) -> Connection:
        async with asyncio.timeout(self._connect):
            return await self._dial(origin)

    def _put_by(self, origin: Origin, dialled: asyncio.Task[Connection]) -> None:
        if not dialled.cancelled() and dialled.exception() is None:
            self._release(origin, dialled.result())

    async def _dial(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = await self._look_up(origin)
        reached = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=NEXT_ADDRESS, interleave=1, loop=loop
        )
        reached.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        release = partial(self._release, origin)
        transport, reading = await loop.create_connection(
            lambda: Reading(Connection(loop, self._silence, release), self._buffer),
            sock=reached,
            ssl=self._context() if origin.is_tls else None,
            server_hostname=origin.host if origin.is_tls else None,
        )
        if described := transport.get_extra_info("peercert"):
            described.clear()  # the certificate in words, 2 KB of them, which nobody reads
        self._open.add(reading.connection)
        return reading.connection

    def _context(self) -> ssl.SSLContext:
        if self._trust is None:
            self._trust = ssl.create_default_context()
            self._trust.set_alpn_protocols(("http/1.1",))
        return self._trust

    async def _look_up(self, origin: Origin) -> Addresses:
        """The addresses of a host. All who need them at once wait for one answer."""
        if literal := literal_address(origin):
            return [literal]
        loop = asyncio.get_running_loop()
        now = loop.time()
        until, asked = self._names.get(origin, (0.0, None))
        if asked is None or now > until:
            asked = loop.create_task(self._resolve(origin))
            self._names[origin] = (now + NAMES_SECONDS, asked)
        return await asyncio.shield(asked)

    async def _resolve(self, origin: Origin) -> Addresses:
        if self._resolver is None:
            self._resolver = DefaultResolver()
        found = await self._resolver.resolve(origin.host, origin.port, AF_UNSPEC)
        return [address(each["family"], each["host"], each["port"]) for each in found]
