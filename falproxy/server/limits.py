"""Limits of client connections that hold before authentication: the size and duration of a request
head, idle time, unread responses, and the number of connections.

All connections of `falproxy serve` are `LimitedProtocol`s. A request on the fast path costs one
assignment here: durations are checked once a second for all connections together.

It uses attributes that aiohttp does not document; `fast_path.protocol.is_supported` checks them.
"""

import asyncio
import heapq
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from aiohttp.web_server import Server

from falproxy.metrics import Metrics
from falproxy.server.open_files import open_files_limit
from falproxy.server.refusals import (
    FIELD_TOO_LARGE,
    HEAD_TIMEOUT,
    HEAD_TOO_LARGE,
    REFUSALS,
    TOO_MANY_CONNECTIONS,
    Refusal,
)

logger = logging.getLogger(__name__)

# Bytes of all incomplete heads together; the oldest are dropped first.
INCOMPLETE_HEADS_MAX = 32 * 2**20
# Descriptors that are not for clients and their calls to fal: stores, logs, listening sockets.
RESERVED_FILES = 96
# Connections above the limit on which health checks are served, and nothing else.
HEALTH_CONNECTIONS = 16
HEALTH_REQUESTS = (b"GET /health", b"HEAD /health")
CONNECTIONS_MIN = 8
EVICTED_SHARE = 64  # one of so many connections is closed at once, since finding them takes a scan
SCAN_SHARE = 20  # a search for idle connections that finds none takes one of so many seconds
CHECK_INTERVAL = 1.0  # seconds
LINGER = 2.0  # seconds to receive what the client still sends, so that it can read the response
REPORT_INTERVAL = 60.0  # seconds between log lines about the limit on connections


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """max_head: bytes of a request line with its header fields.
    head_timeout: seconds from the connection, or the first byte of a request, to the end of its
        head.
    idle_timeout: seconds between two requests.
    send_timeout: seconds without progress of a response that the client does not read.
    max_connections: at the same time; see `connection_limit`.
    """

    max_head: int = 64 * 2**10
    head_timeout: float = 15.0
    idle_timeout: float = 75.0
    send_timeout: float = 60.0
    max_connections: int = 10_000


CONNECTION_LIMITS = web.AppKey("falproxy.connection_limits", ConnectionLimits)


def connection_limit(max_connections: int, open_files: int | None) -> int:
    """Return the number of connections that a process accepts.

    open_files: limit on open files, None for no limit. A connection may need a second one to fal.
    """
    if open_files is None:
        return max_connections
    return min(max_connections, max((open_files - RESERVED_FILES) // 2, CONNECTIONS_MIN))


class Connections:
    """The client connections of a process.

    limit: number of connections, except for health checks.
    """

    def __init__(self, limits: ConnectionLimits, metrics: Metrics | None) -> None:
        self.limits = limits
        self.limit = connection_limit(limits.max_connections, open_files_limit())
        self.incomplete_heads = 0  # bytes
        self._metrics = metrics
        self._open: set[LimitedProtocol] = set()
        self._check_interval = min(CHECK_INTERVAL, limits.head_timeout / 4, limits.send_timeout / 4)
        self._checking: asyncio.TimerHandle | None = None
        self._next_scan = 0.0
        self._unreported: Counter[str] = Counter()
        self._reported_at = self._closed_at = float("-inf")

    def __repr__(self) -> str:
        return f"<Connections {len(self._open)} of {self.limit}>"

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_full(self) -> bool:
        return len(self._open) > self.limit

    def add(self, connection: "LimitedProtocol") -> None:
        """Admit a new connection. Above the limit, close the longest idle ones; if there are none,
        admit it for health checks only, or refuse it."""
        self._open.add(connection)
        self._count_open()
        if self._checking is None:
            self._checking = connection.loop.call_later(self._check_interval, self._check_all)
        if self.has_room_for(connection):
            return
        if len(self._open) <= self.limit + HEALTH_CONNECTIONS:
            connection.restrict_to_health_checks()
        else:
            connection.refuse(TOO_MANY_CONNECTIONS, linger=0.0)
            self.count("limit")

    def has_room_for(self, connection: "LimitedProtocol") -> bool:
        """Return whether the open connections are not too many, after closing other idle ones."""
        return not self.is_full or self._evict_idle(connection)

    def was_used_since(self, time: float) -> bool:
        """Return whether a connection was used or closed after a time."""
        used = (not each.is_idle or each.idle_since() > time for each in self._open)
        return self._closed_at > time or any(used)

    def has_unfinished_heads(self) -> bool:
        """Return whether a connection has sent nothing yet, or only a part of a request head."""
        return any(each.is_idle and each.awaits_head for each in self._open)

    def discard(self, connection: "LimitedProtocol") -> None:
        self._closed_at = connection.loop.time()
        self._open.discard(connection)
        self._count_open()

    def count(self, reason: str) -> None:
        """Count a connection that was closed or refused by one of the limits."""
        if self._metrics is not None:
            self._metrics.record_closed_connection(reason)
        if reason in ("evicted", "limit"):
            self._unreported[reason] += 1
            self._report()

    def add_incomplete_head(self, size: int) -> None:
        """Count bytes of a head; negative when it is complete or dropped."""
        self.incomplete_heads += size
        if self.incomplete_heads > INCOMPLETE_HEADS_MAX:
            self._evict_incomplete_heads()

    def _evict_idle(self, exempt: "LimitedProtocol") -> bool:
        """Close the connections that wait longest for a request. Return whether that sufficed."""
        now = exempt.loop.time()
        if now < self._next_scan:
            return False
        started = time.thread_time()  # does not count the time that the system gives to others
        idle = [each for each in self._open if each.is_idle and each is not exempt]
        if not idle:
            self._next_scan = now + SCAN_SHARE * (time.thread_time() - started)
            return False
        excess = max(len(self._open) - self.limit, self.limit // EVICTED_SHARE)
        for connection in heapq.nsmallest(excess, idle, key=LimitedProtocol.idle_since):
            self._evict(connection)
        return not self.is_full

    def _evict_incomplete_heads(self) -> None:
        incomplete = [connection for connection in self._open if connection.has_incomplete_head]
        for connection in sorted(incomplete, key=LimitedProtocol.idle_since):
            if self.incomplete_heads <= INCOMPLETE_HEADS_MAX * 7 // 8:
                break
            self._evict(connection)

    def _evict(self, connection: "LimitedProtocol") -> None:
        self.discard(connection)
        connection.drop()
        self.count("evicted")

    def _check_all(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in [*self._open]:
            connection.check_time(now)
        self._report()
        still_needed = self._open or self._unreported
        self._checking = (
            loop.call_later(self._check_interval, self._check_all) if still_needed else None
        )

    def _count_open(self) -> None:
        if self._metrics is not None:
            self._metrics.connections = len(self._open)

    def _report(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self._unreported or now - self._reported_at < REPORT_INTERVAL:
            return
        logger.warning(
            "The limit of %d connections is reached: %d idle ones were closed and %d refused "
            "(FALPROXY_MAX_CONNECTIONS, and the limit on open files)",
            self.limit,
            self._unreported["evicted"],
            self._unreported["limit"],
        )
        self._reported_at = now
        self._unreported.clear()


class LimitedProtocol(RequestHandler):
    """One client's connection, with limits."""

    __slots__ = (
        "_closing_since",
        "_connections",
        "_finishing",
        "_head_size",
        "_head_started",
        "_is_refused",
        "_is_restricted",
        "_limits",
        "_own_transport",
        "_payload",
        "_write_stalled_since",
    )

    def __init__(self, manager: Server, connections: Connections, **options: Any) -> None:
        super().__init__(manager, **options)
        self._connections = connections
        self._limits = connections.limits
        # When the head that is expected next began; None between two requests, and for a head that
        # arrived completely.
        self._head_started: float | None = None
        self._head_size = 0  # bytes of an incomplete head
        self._payload: StreamReader = EMPTY_PAYLOAD  # the body of the last request
        self._finishing: web.BaseRequest | None = None  # whose response is being sent
        self._is_restricted = False
        self._is_refused = False
        self._write_stalled_since: float | None = None
        self._closing_since: float | None = None
        self._own_transport: asyncio.Transport | None = None  # aiohttp drops its own when it closes

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    @property
    def is_idle(self) -> bool:
        """Whether the next request, or the rest of its head, is awaited."""
        waiter = self._waiter
        return waiter is not None and not waiter.done()

    @property
    def awaits_head(self) -> bool:
        """Whether the head of the first request, or the rest of a later one, is due."""
        return self._head_started is not None

    @property
    def has_incomplete_head(self) -> bool:
        return self._head_size > 0

    @property
    def current_work(self) -> object | None:
        """The request that is being handled, with its response."""
        return self._current_request or self._finishing

    def idle_since(self) -> float:
        """Return when the last request ended."""
        return self._next_keepalive_close_time - self.keepalive_timeout

    def adopt_handlers(self, server: Server) -> None:
        """Send later requests of an open connection to the application of a server."""
        if self._request_handler is not None:
            self._request_handler = server.request_handler
            self._request_factory = server.request_factory

    def restrict_to_health_checks(self) -> None:
        self._is_restricted = True

    # The connection begins and ends

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._own_transport = cast(asyncio.Transport, transport)
        self._head_started = self._loop.time()
        self._connections.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._own_transport = None
        self._forget_head()
        self._connections.discard(self)
        super().connection_lost(exc)

    def drop(self) -> None:
        """Close an idle connection without a response."""
        transport = self._own_transport
        self._is_refused = True
        self._forget_head()
        self.force_close()
        if transport is not None and transport.get_write_buffer_size():
            transport.abort()  # it would stay open until the client has read the last response

    # A request arrives

    def data_received(self, data: bytes) -> None:
        if self._is_refused or (self._is_restricted and not self._is_admitted(data)):
            return
        was_in_body, count = not self._payload.is_eof(), len(self._messages)
        receive = self._receive_body if was_in_body else super().data_received
        receive(data)
        if len(self._messages) > count:
            is_much = self._head_size + len(data) > self._limits.max_head
            self._check_heads(count, may_be_large=is_much)
            self._forget_head()
            self._payload = self._messages[-1][1]
        elif not was_in_body and not self._upgraded and data:
            self._add_to_head(len(data))

    def _receive_body(self, data: bytes) -> None:
        """Process bytes of a body. At a stop, aiohttp drops all bytes of open connections, also
        those of requests that it still waits for."""
        is_closing = self._close, self._force_close
        self._close = self._force_close = False
        super().data_received(data)
        self._close, self._force_close = is_closing

    def _is_admitted(self, data: bytes) -> bool:
        """Return whether a connection above the limit may go on. If not, refuse it."""
        if self._connections.has_room_for(self):
            self._is_restricted = False
        elif not data.startswith(HEALTH_REQUESTS):
            self.refuse(TOO_MANY_CONNECTIONS)
            self._connections.count("limit")
        return not self._is_refused

    def _add_to_head(self, size: int) -> None:
        """Count bytes of an incomplete head."""
        if self._head_started is None:
            self._head_started = self._loop.time()
        self._head_size += size
        self._connections.add_incomplete_head(size)
        if self._head_size > self._limits.max_head and not self._is_refused:
            self.refuse(HEAD_TOO_LARGE)
            self._connections.count("head_too_large")

    def _forget_head(self) -> None:
        self._head_started = None
        if self._head_size:
            self._connections.add_incomplete_head(-self._head_size)
            self._head_size = 0

    def _check_heads(self, start: int, *, may_be_large: bool) -> None:
        """Replace requests whose head is too large by an error, which aiohttp responds with. Let
        the connection end with a transfer coding in HTTP/1.0, which has none (RFC 9112 §6.1)."""
        for index in range(start, len(self._messages)):
            message, payload = self._messages[index]
            if not isinstance(message, RawRequestMessage):
                continue
            if may_be_large and head_size(message) > self._limits.max_head:
                self._connections.count("head_too_large")
                self._messages[index] = _ErrInfo(HEAD_TOO_LARGE.status, ValueError(), ""), payload
            elif message.chunked and message.version < HttpVersion11:
                self._messages[index] = message._replace(should_close=True), payload

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        self._finishing = request
        try:
            finished = await super().finish_response(request, resp, start_time)
        finally:
            self._finishing = None
        if self._messages:  # possibly parsed just now, from bytes behind a declined upgrade
            self._payload = self._messages[-1][1]
        elif self._payload.is_eof():
            self._payload = EMPTY_PAYLOAD  # frees the last request of an idle connection
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the response to a malformed request. Anyone can send those: they are not worth a
        traceback in the log."""
        refusal = FIELD_TOO_LARGE if isinstance(exc, LineTooLong) else REFUSALS.get(status)
        if refusal is None:
            return super().handle_error(request, status, exc, message)
        logger.info("A malformed request was refused: %s", type(exc).__name__)
        response = web.Response(
            status=refusal.status,
            reason=refusal.reason,
            body=refusal.body(),
            content_type="application/json",
            headers={"X-Content-Type-Options": "nosniff"},
        )
        response.force_close()
        return response

    # A limit is exceeded

    def refuse(self, refusal: Refusal, linger: float = LINGER) -> None:
        """Respond to a request that has not arrived completely, and close the connection. If
        another request is in progress, close it after the response to that one.

        linger: seconds to receive what the client still sends. If a connection is closed with
            unread bytes, the client may not see the response.
        """
        self._is_refused = True
        self._forget_head()
        transport, is_busy = self._own_transport, self._request_in_progress or bool(self._messages)
        self.close()
        if transport is None or is_busy or transport.is_closing():
            return
        transport.write(refusal.response_bytes())
        if linger:
            transport.write_eof()
            self._loop.call_later(linger, transport.abort)
        else:
            transport.close()

    # Time passes

    def check_time(self, now: float) -> None:
        """Close the connection if a time limit is exceeded."""
        transport = self._own_transport
        if transport is None:
            return
        stalled_since = self._closing_since if transport.is_closing() else self._write_stalled_since
        if transport.is_closing() and stalled_since is None:
            self._closing_since = now
        if stalled_since is not None and now - stalled_since > self._limits.send_timeout:
            transport.abort()
            self._connections.count("send_timeout")
        elif self._head_started is not None and not transport.is_closing():
            self._check_head(now, self._head_started)

    def _check_head(self, now: float, started: float) -> None:
        if not self.is_idle:
            self._head_started = now  # another request is in progress
        elif now - started > self._limits.head_timeout:
            self._connections.count("head_timeout")
            if self._head_size:
                self.refuse(HEAD_TIMEOUT)
            else:
                self.drop()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_stalled_since = self._loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_stalled_since = None


def head_size(message: RawRequestMessage) -> int:
    fields = sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
    return len(message.method) + len(message.path) + fields
