"""aiohttp's server protocol, with the lane beside it.

What it stands on is not documented: `is_supported` says whether this release of aiohttp has it.
"""

import asyncio
from contextlib import suppress
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server

from falproxy.server.fast_path import HEAD_END, LINE_END
from falproxy.server.fast_path.in_flight import InFlightRequest
from falproxy.server.fast_path.route_cache import RouteCache

PIPELINED_MAX = 2**16  # bytes that may wait behind a request on the lane
SHUTDOWN_TIMEOUT_MIN = 0.1  # seconds
RAW_REQUEST_MAX = 2**15  # bytes of a request that is looked at again when it is answered
# Of aiohttp's protocol, what is used here.
REQUIRED_SLOTS = frozenset({
    "_close", "_force_close", "_keepalive_handle", "_keepalive_timeout", "_messages",
    "_next_keepalive_close_time", "_request_factory", "_waiter",
})  # fmt: skip


class FastPathProtocol(RequestHandler):
    """One client's connection. While its request is on the lane, aiohttp takes it for busy: the
    future by which it waits for the next request is out of its sight."""

    __slots__ = (
        "_at_boundary",
        "_drained",
        "_fallback",
        "_idle_waiter",
        "_in_flight",
        "_inner_request_factory",
        "_is_closing",
        "_pipelined",
        "_pipelined_size",
        "_raw_request",
        "_remaining",
        "_route_cache",
    )  # fmt: skip

    def __init__(self, manager: Server, route_cache: RouteCache, **options: Any) -> None:
        super().__init__(manager, **options)
        self._inner_request_factory, self._request_factory = (
            self._request_factory,
            self._make_request,
        )
        self._route_cache = route_cache
        self._in_flight: InFlightRequest | None = None
        self._idle_waiter: asyncio.Future[None] | None = None  # aiohttp's, out of sight
        self._pipelined: list[bytes] = []  # what came behind a request on the lane, as it came
        self._pipelined_size = 0
        self._fallback: InFlightRequest | None = None  # what the layers were given last
        self._raw_request: bytes | None = None  # the request that the layers have, as it came
        self._at_boundary = True  # whether what came so far is known to be whole requests
        self._remaining = 0  # bytes of a request that are still to come; below 0: nobody knows
        self._is_closing = False
        self._drained: asyncio.Future[None] | None = None

    # A request comes

    def data_received(self, data: bytes) -> None:
        if self._in_flight is not None:
            self._pipelined.append(data)
            self._pipelined_size += len(data)
            if self.transport is not None and self._pipelined_size > PIPELINED_MAX:
                self.transport.pause_reading()  # and then nobody hears that the client leaves
            return
        waiter = self._waiter
        if self._at_boundary and waiter is not None and not (waiter.done() or self._paused):
            self._in_flight = self._route_cache.start(self, data)
            if self._in_flight is not None:
                self._idle_waiter, self._waiter = waiter, None
                return
        self._feed_aiohttp(data)

    def _feed_aiohttp(self, data: bytes) -> None:
        """Leaves it to aiohttp and the layers. What is remembered must have been read from its
        first byte to its last: it is looked at only where a request is known to begin."""
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
        asked, self._fallback = self._raw_request, None
        finished = await super().finish_response(request, resp, start_time)
        if asked is not None and asked is self._raw_request and isinstance(request, web.Request):
            self._route_cache.add(asked, request, resp)
            self._raw_request = None
        return finished

    # A request leaves the lane

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
        for piece in self._pop_pipelined():
            self.data_received(piece)

    def fall_back(self, data: bytes, in_flight: InFlightRequest) -> None:
        self._restore_waiter()
        if self._force_close or self.transport is None:  # aiohttp takes nothing any more
            in_flight.abandon()
            return
        self._fallback = in_flight
        self._feed_aiohttp(data)
        for piece in self._pop_pipelined():
            self._feed_aiohttp(piece)
        if self._is_closing:
            super().close()

    def _restore_waiter(self) -> None:
        self._in_flight = None
        self._waiter, self._idle_waiter = self._idle_waiter, None
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _pop_pipelined(self) -> list[bytes]:
        behind = self._pipelined
        if behind:
            self._pipelined, self._pipelined_size = [], 0
            if self.transport is not None:
                self.transport.resume_reading()
        return behind

    # The connection ends

    def connection_lost(self, exc: BaseException | None) -> None:
        if (errand := self._in_flight) is not None:
            self._restore_waiter()
            errand.on_disconnect()
        if self._fallback is not None:
            self._fallback.abandon()
        super().connection_lost(exc)

    def close(self) -> None:
        """After what is on the lane."""
        self._is_closing = True
        if self._in_flight is None:
            super().close()

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's
        """What is on the lane has as long as aiohttp gives all others, which is twice that time."""
        if self._in_flight is not None and timeout is not None:
            until = self._loop.time() + 2 * timeout
            self._drained = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._drained
            timeout = max(SHUTDOWN_TIMEOUT_MIN, (until - self._loop.time()) / 2)
        await super().shutdown(timeout)


def remaining_bytes(message: object, data: bytes) -> int:
    """How many bytes of a request are still to come of which data is the beginning, with all of
    its head. Below 0: that cannot be told for sure."""
    if not isinstance(message, RawRequestMessage) or message.chunked or message.upgrade:
        return -1
    head, _, body = data.partition(HEAD_END)
    lines = head.count(LINE_END)
    if lines != len(message.raw_headers) or head.count(b"\n") != lines:
        return -1
    length = message.headers.get("Content-Length", "0")
    return int(length) - len(body) if length.isdecimal() else -1


class FastPathServer(Server):
    """What makes a door for every client that comes."""

    def __init__(self, server: Server, route_cache: RouteCache) -> None:
        super().__init__(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            loop=server._loop,
            **server._kwargs,
        )
        self._route_cache = route_cache

    def __call__(self) -> RequestHandler:
        return FastPathProtocol(self, self._route_cache, loop=self._loop, **self._kwargs)


def is_supported() -> bool:
    """Whether aiohttp's protocol still is what the door takes it for."""
    return REQUIRED_SLOTS.issubset(getattr(RequestHandler, "__slots__", ()))


ROUTE_CACHE = web.AppKey("falproxy.passes", RouteCache)


class FastPathRunner(web.AppRunner):
    """Serves an application, by doors where it has a lane."""

    async def _make_server(self) -> Server:
        server = await super()._make_server()
        passes = self.app.get(ROUTE_CACHE)
        return server if passes is None else FastPathServer(server, passes)
