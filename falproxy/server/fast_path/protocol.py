"""The server's protocol with the fast path in front of it.

It uses attributes that aiohttp does not document; `is_supported` checks that this release has them.
"""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server

from falproxy.metrics import METRICS
from falproxy.parse_digits import parse_digits
from falproxy.proxy.headers import HEAD_END
from falproxy.server.fast_path import LINE_END
from falproxy.server.fast_path.in_flight import InFlightRequest
from falproxy.server.fast_path.route_cache import RouteCache
from falproxy.server.limits import (
    CONNECTION_LIMITS,
    ConnectionLimits,
    Connections,
    LimitedProtocol,
)

PIPELINED_MAX = 2**16  # bytes that may wait behind a request on the fast path
HOLD_CALLBACKS = 4  # of the event loop, until aiohttp waits for the next request
SHUTDOWN_TIMEOUT_MIN = 0.1  # seconds
RAW_REQUEST_MAX = 2**15  # bytes of a request that may be added to the route cache
# The attributes of aiohttp's protocol that are used here.
REQUIRED_SLOTS = frozenset({
    "_close", "_force_close", "_keepalive_handle", "_keepalive_timeout", "_messages",
    "_next_keepalive_close_time", "_request_factory", "_request_in_progress", "_waiter",
})  # fmt: skip


class FastPathProtocol(LimitedProtocol):
    """One client's connection.

    While a request is on the fast path, aiohttp must not see the connection as idle: `_waiter`, the
    future on which aiohttp waits for the next request, is then moved to `_idle_waiter`.

    At first and after a response, aiohttp waits for the next request only some callbacks later.
    Data that comes before is held until then: otherwise connections under load would stay off the
    fast path.
    """

    __slots__ = (
        "_at_boundary",
        "_drained",
        "_fallback",
        "_idle_waiter",
        "_in_flight",
        "_inner_request_factory",
        "_is_closing",
        "_is_holding",
        "_peer",
        "_pipelined",
        "_pipelined_size",
        "_raw_request",
        "_remaining",
        "_route_cache",
        "_waits_soon",
        "number",
    )  # fmt: skip

    def __init__(
        self, manager: Server, connections: Connections, route_cache: RouteCache, **options: Any
    ) -> None:
        super().__init__(manager, connections, **options)
        self._inner_request_factory, self._request_factory = (
            self._request_factory,
            self._make_request,
        )
        self._route_cache = route_cache
        self.number = route_cache.next_connection()
        self._in_flight: InFlightRequest | None = None
        self._idle_waiter: asyncio.Future[None] | None = None
        self._waits_soon = True  # aiohttp starts, or sends a response, and then waits for a request
        self._is_holding = False
        self._pipelined: list[bytes] = []  # held, or received behind a request on the fast path
        self._pipelined_size = 0
        self._fallback: InFlightRequest | None = None  # the last one passed to aiohttp
        self._raw_request: bytes | None = None  # the request that aiohttp is handling
        self._at_boundary = True  # the data so far is known to end with a request
        self._peer: str | None = None  # set with the first request on the fast path
        self._remaining = 0  # bytes missing to the end of a request; negative if unknown
        self._is_closing = False
        self._drained: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = "disconnected" if self.transport is None else "connected"
        return f"<FastPathProtocol {state}, {self._in_flight!r}>"

    def restrict_to_health_checks(self) -> None:
        super().restrict_to_health_checks()
        self._leave_fast_path()

    @property
    def current_work(self) -> object | None:
        return self._in_flight or self._fallback or super().current_work

    def adopt_handlers(self, server: Server) -> None:
        super().adopt_handlers(server)
        assert isinstance(server, ProxyServer)
        if self._inner_request_factory is not None:
            self._inner_request_factory = server.request_factory
            self._request_factory = self._make_request
        self._raw_request = None  # the route of a request in progress is the old application's
        if server.route_cache is None:
            self._leave_fast_path()
        else:
            self._route_cache = server.route_cache

    def _leave_fast_path(self) -> None:
        self._at_boundary, self._remaining = False, -1

    # A request arrives

    def data_received(self, data: bytes) -> None:
        waiter = self._waiter
        if self._is_too_early():
            self._hold()
        if self._in_flight is not None or self._is_holding:
            self._pipelined.append(data)
            self._pipelined_size += len(data)
            if self.transport is not None and self._pipelined_size > PIPELINED_MAX:
                self.transport.pause_reading()  # a disconnect is then not noticed either
            return
        if self._at_boundary and waiter is not None and not (waiter.done() or self._paused):
            self._in_flight = self._route_cache.start(self, data)
            if self._in_flight is not None:
                self._idle_waiter, self._waiter = waiter, None
                self._head_started = None
                return
        self._feed_aiohttp(data)

    def _is_too_early(self) -> bool:
        """Return whether aiohttp will wait for a request only some callbacks later."""
        is_idle = self._in_flight is None and self._waiter is None and self._at_boundary
        return is_idle and self._waits_soon

    def _hold(self) -> None:
        """Hold data until aiohttp waits for it."""
        self._waits_soon, self._is_holding = False, True
        self._loop.call_soon(self._release_held, HOLD_CALLBACKS)

    def _release_held(self, callbacks: int) -> None:
        """Process the held data, if aiohttp waits for it, or at the latest after some callbacks."""
        if self._waiter is None and callbacks and self.transport is not None:
            self._loop.call_soon(self._release_held, callbacks - 1)
            return
        self._is_holding = False
        for data in self._pop_pipelined():
            if self.transport is not None:
                self.data_received(data)

    def _feed_aiohttp(self, data: bytes) -> None:
        """Pass data to aiohttp. Remember it as the raw request only if it is exactly one request:
        it must begin at a boundary and end with the request."""
        self._waits_soon = False
        before, waiter = len(self._messages), self._waiter
        is_idle = not before and waiter is not None and not waiter.done()
        super().data_received(data)
        if not data:
            return
        self._raw_request = None
        if not self._at_boundary:
            self._remaining -= len(data)
        elif len(self._messages) == before + 1:
            self._remaining = remaining_bytes(self._messages[-1][0], data)
            if is_idle and not self._remaining and len(data) <= RAW_REQUEST_MAX:
                self._raw_request = data
        else:
            self._remaining = -1
        self._at_boundary = not self._remaining

    def _make_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: "asyncio.Task[None]",
    ) -> web.BaseRequest:
        assert self._inner_request_factory is not None
        request = self._inner_request_factory(message, payload, protocol, writer, task)
        if self._fallback is not None:
            self._fallback.attach_to(request)
        return request

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        raw, self._fallback = self._raw_request, None
        self._waits_soon = True
        finished = await super().finish_response(request, resp, start_time)
        if raw is not None and raw is self._raw_request and isinstance(request, web.Request):
            self._route_cache.add(self, raw, request, resp)
            self._raw_request = None
        return finished

    # A request leaves the fast path: the methods of `ClientConnection`

    @property
    def peer(self) -> str:
        if self._peer is None:
            name = self.peername
            self._peer = str(name[0] if isinstance(name, list | tuple) else name or "")
        return self._peer

    def write_response(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def release(self) -> None:
        self._restore_waiter()
        if self._is_closing:
            super().close()
            if self.transport is not None:
                self.transport.close()
            return
        loop = self._loop
        self._next_keepalive_close_time = loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            when = self._next_keepalive_close_time
            self._keepalive_handle = loop.call_at(when, self._process_keepalive)
        for data in self._pop_pipelined():
            self.data_received(data)

    def fall_back(self, data: bytes, in_flight: InFlightRequest) -> None:
        self._restore_waiter()
        if self._force_close or self.transport is None:  # aiohttp drops new data
            in_flight.abandon()
            return
        self._fallback = in_flight
        self._feed_aiohttp(data)
        for pipelined in self._pop_pipelined():
            self._feed_aiohttp(pipelined)
        if self._is_closing:
            super().close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _restore_waiter(self) -> None:
        self._in_flight = None
        self._waiter, self._idle_waiter = self._idle_waiter, None
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _pop_pipelined(self) -> list[bytes]:
        pipelined = self._pipelined
        if pipelined:
            self._pipelined, self._pipelined_size = [], 0
            if self.transport is not None:
                self.transport.resume_reading()
        return pipelined

    # The connection ends

    def connection_lost(self, exc: BaseException | None) -> None:
        if (in_flight := self._in_flight) is not None:
            self._restore_waiter()
            in_flight.on_disconnect()
        if self._fallback is not None:
            self._fallback.abandon()
        super().connection_lost(exc)

    def close(self) -> None:
        """Close the connection, after the request on the fast path."""
        self._is_closing = True
        if self._in_flight is None:
            super().close()

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's
        """Wait for the request on the fast path for as long as aiohttp waits for its own, which is
        twice `timeout`, then shut down."""
        if self._in_flight is not None and timeout is not None:
            deadline = self._loop.time() + 2 * timeout
            self._drained = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._drained
            timeout = max(SHUTDOWN_TIMEOUT_MIN, (deadline - self._loop.time()) / 2)
        await super().shutdown(timeout)


def remaining_bytes(message: object, data: bytes) -> int:
    """Return the bytes missing to the end of a request that begins with `data`, negative if that
    is not certain.

    data: includes the whole head.
    """
    if not isinstance(message, RawRequestMessage) or message.chunked or message.upgrade:
        return -1
    head, _, body = data.partition(HEAD_END)
    lines = head.count(LINE_END)
    if lines != len(message.raw_headers) or head.count(b"\n") != lines:
        return -1
    length = parse_digits(message.headers.get("Content-Length", "0"))
    return -1 if length is None else length - len(body)


@dataclass(frozen=True, slots=True)
class ConnectionWork:
    """The request that a connection was handling at some time."""

    connection: LimitedProtocol
    work: object

    @property
    def is_current(self) -> bool:
        """Whether it is still being handled."""
        return self.connection.current_work is self.work


class ProxyServer(Server):
    """The protocol factory: makes a `LimitedProtocol` for each connection, which is a
    `FastPathProtocol` if there is a route cache."""

    def __init__(
        self, server: Server, connections: Connections, route_cache: RouteCache | None
    ) -> None:
        options = server._kwargs | {"keepalive_timeout": connections.limits.idle_timeout}
        super().__init__(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            loop=server._loop,
            **options,
        )
        self.client_connections = connections
        self.route_cache = route_cache

    def __call__(self) -> RequestHandler:
        if self.route_cache is None:
            return LimitedProtocol(self, self.client_connections, loop=self._loop, **self._kwargs)
        return FastPathProtocol(
            self, self.client_connections, self.route_cache, loop=self._loop, **self._kwargs
        )

    def adopt(self, other: "ProxyServer") -> None:
        """Send all new requests to the application of another server, on open connections too."""
        self.request_handler, self.request_factory = other.request_handler, other.request_factory
        self.route_cache = other.route_cache
        for connection in self._protocols():
            connection.adopt_handlers(self)

    def current_work(self) -> list[ConnectionWork]:
        """Return the requests that are being handled."""
        return [
            ConnectionWork(connection, connection.current_work)
            for connection in self._protocols()
            if connection.current_work is not None
        ]

    def _protocols(self) -> Iterator[LimitedProtocol]:
        for connection in self.connections:
            assert isinstance(connection, LimitedProtocol)
            yield connection


def is_supported() -> bool:
    """Return whether aiohttp's protocol has the attributes that are used here."""
    return REQUIRED_SLOTS.issubset(getattr(RequestHandler, "__slots__", ()))


ROUTE_CACHE = web.AppKey("falproxy.route_cache", RouteCache)


class FastPathRunner(web.AppRunner):
    """Serves an application with limits for its connections, and with the fast path if the
    application has a route cache."""

    async def _make_server(self) -> Server:
        server = await super()._make_server()
        limits = self.app.get(CONNECTION_LIMITS) or ConnectionLimits()
        connections = Connections(limits, self.app.get(METRICS))
        return ProxyServer(server, connections, self.app.get(ROUTE_CACHE))

    @property
    def connections(self) -> Connections:
        assert isinstance(self.server, ProxyServer)
        return self.server.client_connections
