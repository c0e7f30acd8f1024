"""aiohttp's server protocol, with the lane beside it.

What it stands on is not documented: `is_usable` says whether this release of aiohttp has it.
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
from falproxy.server.fast_path.in_flight import Errand
from falproxy.server.fast_path.route_cache import Passes

BEHIND_MAX = 2**16  # bytes that may wait behind a request on the lane
LAST_MOMENT = 0.1  # seconds
ASKED_MAX = 2**15  # bytes of a request that is looked at again when it is answered
# Of aiohttp's protocol, what is used here.
USED = frozenset({
    "_close", "_force_close", "_keepalive_handle", "_keepalive_timeout", "_messages",
    "_next_keepalive_close_time", "_request_factory", "_waiter",
})  # fmt: skip


class Door(RequestHandler):
    """One client's connection. While its request is on the lane, aiohttp takes it for busy: the
    future by which it waits for the next request is out of its sight."""

    __slots__ = (
        "_asked", "_behind", "_behind_size", "_errand", "_freed", "_handed", "_is_between",
        "_is_closing", "_left", "_make", "_passes", "_resting",
    )  # fmt: skip

    def __init__(self, manager: Server, passes: Passes, **options: Any) -> None:
        super().__init__(manager, **options)
        self._make, self._request_factory = self._request_factory, self._make_request
        self._passes = passes
        self._errand: Errand | None = None
        self._resting: asyncio.Future[None] | None = None  # aiohttp's, out of sight
        self._behind: list[bytes] = []  # what came behind a request on the lane, as it came
        self._behind_size = 0
        self._handed: Errand | None = None  # what the layers were given last
        self._asked: bytes | None = None  # the request that the layers have, as it came
        self._is_between = True  # whether what came so far is known to be whole requests
        self._left = 0  # bytes of a request that are still to come; below 0: nobody knows
        self._is_closing = False
        self._freed: asyncio.Future[None] | None = None

    # A request comes

    def data_received(self, data: bytes) -> None:
        if self._errand is not None:
            self._behind.append(data)
            self._behind_size += len(data)
            if self.transport is not None and self._behind_size > BEHIND_MAX:
                self.transport.pause_reading()  # and then nobody hears that the client leaves
            return
        waiter = self._waiter
        if self._is_between and waiter is not None and not (waiter.done() or self._paused):
            self._errand = self._passes.begin(self, data)
            if self._errand is not None:
                self._resting, self._waiter = waiter, None
                return
        self._take_in(data)

    def _take_in(self, data: bytes) -> None:
        """Leaves it to aiohttp and the layers. What is remembered must have been read from its
        first byte to its last: it is looked at only where a request is known to begin."""
        before, waiter = len(self._messages), self._waiter
        is_idle = not before and waiter is not None and not waiter.done()
        super().data_received(data)
        if not data:
            return
        self._asked = None
        if not self._is_between:
            self._left -= len(data)
        elif len(self._messages) == before + 1:
            self._left = left_of(self._messages[-1][0], data)
            if is_idle and not self._left and len(data) <= ASKED_MAX:
                self._asked = data
        else:
            self._left = -1
        self._is_between = not self._left

    def _make_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: "asyncio.Task[None]",
    ) -> web.BaseRequest:
        assert self._make is not None
        request = self._make(message, payload, protocol, writer, task)
        if self._handed is not None:
            self._handed.give(request)
        return request

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        asked, self._handed = self._asked, None
        finished = await super().finish_response(request, resp, start_time)
        if asked is not None and asked is self._asked and isinstance(request, web.Request):
            self._passes.add(asked, request, resp)
            self._asked = None
        return finished

    # A request leaves the lane

    def answer(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def free(self) -> None:
        self._come_back()
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
        for piece in self._take_behind():
            self.data_received(piece)

    def hand_over(self, data: bytes, errand: Errand) -> None:
        self._come_back()
        if self._force_close or self.transport is None:  # aiohttp takes nothing any more
            errand.settle()
            return
        self._handed = errand
        self._take_in(data)
        for piece in self._take_behind():
            self._take_in(piece)
        if self._is_closing:
            super().close()

    def _come_back(self) -> None:
        self._errand = None
        self._waiter, self._resting = self._resting, None
        if self._freed is not None and not self._freed.done():
            self._freed.set_result(None)

    def _take_behind(self) -> list[bytes]:
        behind = self._behind
        if behind:
            self._behind, self._behind_size = [], 0
            if self.transport is not None:
                self.transport.resume_reading()
        return behind

    # The connection ends

    def connection_lost(self, exc: BaseException | None) -> None:
        if (errand := self._errand) is not None:
            self._come_back()
            errand.leave()
        if self._handed is not None:
            self._handed.settle()
        super().connection_lost(exc)

    def close(self) -> None:
        """After what is on the lane."""
        self._is_closing = True
        if self._errand is None:
            super().close()

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's
        """What is on the lane has as long as aiohttp gives all others, which is twice that time."""
        if self._errand is not None and timeout is not None:
            until = self._loop.time() + 2 * timeout
            self._freed = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._freed
            timeout = max(LAST_MOMENT, (until - self._loop.time()) / 2)
        await super().shutdown(timeout)


def left_of(message: object, data: bytes) -> int:
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


class Doors(Server):
    """What makes a door for every client that comes."""

    def __init__(self, server: Server, passes: Passes) -> None:
        super().__init__(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            loop=server._loop,
            **server._kwargs,
        )
        self._passes = passes

    def __call__(self) -> RequestHandler:
        return Door(self, self._passes, loop=self._loop, **self._kwargs)


def is_usable() -> bool:
    """Whether aiohttp's protocol still is what the door takes it for."""
    return USED.issubset(getattr(RequestHandler, "__slots__", ()))


PASSES = web.AppKey("falproxy.passes", Passes)


class DoorRunner(web.AppRunner):
    """Serves an application, by doors where it has a lane."""

    async def _make_server(self) -> Server:
        server = await super()._make_server()
        passes = self.app.get(PASSES)
        return server if passes is None else Doors(server, passes)
