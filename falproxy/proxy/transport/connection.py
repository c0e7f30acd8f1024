"""One pooled connection, used for one exchange after another.

From the socket inwards: `SharedBufferProtocol` reads bytes, `Connection` parses them into a
`PooledResponse`, and `TimeoutProtocol`, its base, holds the timer for all exchanges.
"""

import asyncio
import logging
import select
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from math import inf
from typing import cast

from falproxy.proxy.transport import (
    IDLE_SECONDS,
    ConnectionLostError,
    UpstreamRequest,
    describe_error,
)
from falproxy.proxy.transport.http1 import (
    LAST_CHUNK,
    ResponseParser,
    encode_chunk,
    is_informational,
    response_size,
)
from falproxy.proxy.transport.response import (
    BodyBuffer,
    PooledResponse,
    ResponseHead,
    ResponseWaiter,
)

logger = logging.getLogger(__name__)

# Unsent bytes of a body at which sending pauses. TLS would buffer half a megabyte, and the same
# again encrypted.
WRITE_BUFFER_MAX = 64 * 2**10
LARGE_BODY_MIN = 2**17  # bytes of a body still missing when its head has arrived
BUFFER_SIZE = 2**16

ReleaseCallback = Callable[["Connection"], None]


class TimeoutProtocol(ABC):
    """A connection with one timer for all its exchanges, which is not reset for each of them.

    read_timeout: seconds without a byte from the peer while a response is expected.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, read_timeout: float) -> None:
        self._loop = loop
        self._read_timeout = read_timeout
        self._reading_paused = False
        # When the last byte came or the wait began; `inf` while the client sends its body.
        self._last_activity = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether no exchange is running."""

    @abstractmethod
    def close(self) -> None:
        """Abort the connection."""

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """End the running exchange with an error."""

    def start_timeout(self) -> None:
        """Begin to wait for the peer."""
        self._last_activity = self._loop.time()
        deadline = self._last_activity + min(self._read_timeout, IDLE_SECONDS)
        if self._timer is None or self._timer_at > deadline:
            self._set_timer(deadline)

    def stop_timeout(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._check_timeout)

    def _check_timeout(self) -> None:
        self._timer = None
        now = self._loop.time()
        is_idle = self.is_idle
        if self._reading_paused and not is_idle:
            self._last_activity = now  # the delay is the client's, which does not read
        deadline = self._last_activity + (IDLE_SECONDS if is_idle else self._read_timeout)
        if now < deadline:
            self._set_timer(min(deadline, now + IDLE_SECONDS))
        elif is_idle:
            self.close()
        else:
            self.fail(TimeoutError())


class Connection(TimeoutProtocol):
    """A connection to one origin.

    read_timeout: seconds without a byte from the peer while a response is expected.
    release: called with the connection when it can serve the next request.
    on_lost: called with the connection when it has ended.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        read_timeout: float,
        release: ReleaseCallback,
        on_lost: ReleaseCallback | None = None,
    ) -> None:
        super().__init__(loop, read_timeout)
        self.transport: asyncio.Transport | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._parser = ResponseParser(self)
        self._release, self._on_lost = release, on_lost
        self._method: str | None = None  # of the running exchange
        self._waiter: ResponseWaiter | None = None
        self._pending: tuple[ResponseWaiter, PooledResponse] | None = None
        self._body: BodyBuffer | None = None
        self._body_task: asyncio.Task[None] | None = None
        self._wait_for_body = False
        self._is_clean = True
        self._is_closed = False
        self.was_used = False
        self.has_pending_data = False  # possibly: the last read filled the whole buffer
        self._bytes_received = 0  # of the response
        # Bytes of head and body; -1: unknown; None: chunked, or there is no head yet.
        self._expected_size: int | None = None
        self._last_data = b""
        self._bypass_remaining = 0  # bytes of a large body that skip the parser
        self._parser_bypassed = False  # the parser has not seen the whole response
        self._poll: select.poll | None = None

    def __repr__(self) -> str:
        if self._method is None:
            state = "idle" if self._is_clean else "not reusable"
        else:
            state = f"{self._method}, {self._bytes_received} bytes received"
        return f"<Connection {'closed' if self._is_closed else state}>"

    # Between exchanges

    @property
    def is_idle(self) -> bool:
        return self._method is None

    def is_reusable(self, *, check_socket: bool) -> bool:
        """Return whether a request may be sent on this connection.

        check_socket: poll the socket as well. If the peer has closed the connection, the event
            loop reports it only a moment later.
        """
        transport = self.transport
        if transport is None or transport.is_closing() or not self._is_clean:
            return False
        if check_socket and self._poll is None:
            self._poll = poll_readable(transport)
        return not check_socket or self._poll is None or not self._poll.poll(0)

    @property
    def pending_response(self) -> PooledResponse | None:
        """The response whose head has arrived, and whose body is waited for."""
        return None if self._pending is None else self._pending[1]

    def close(self) -> None:
        """Abort the connection and the running exchange."""
        self._is_clean, self._is_closed = False, True
        self.stop_timeout()
        if self._body_task is not None:
            self._body_task.cancel()
        if self.transport is not None:
            self.transport.abort()

    # The request

    async def exchange(
        self, request: UpstreamRequest, head: bytes, first_chunk: bytes
    ) -> PooledResponse:
        """Send a request and return its response as soon as the head has arrived.

        first_chunk: the beginning of the body, sent in one write with the head. The rest is sent
            by a task, since the response may come before the body is complete.

        Raises: ConnectionLostError, TimeoutError, and the exceptions of the body.
        """
        future: asyncio.Future[PooledResponse] = self._loop.create_future()
        try:
            is_chunked = request.body is not None and request.length is None
            self.start_request(
                request, head + (encode_chunk(first_chunk) if is_chunked else first_chunk), future
            )
            if request.body is not None:
                await self._send_remaining_body(request.body, len(first_chunk), request.length)
            response = await future
        except BaseException:
            future.cancel()
            self.close()
            raise
        return response

    def start_request(
        self,
        request: UpstreamRequest,
        data: bytes,
        waiter: ResponseWaiter,
        *,
        wait_for_body: bool = False,
    ) -> None:
        """Write the first bytes of a request.

        waiter: gets the response when its head has arrived.
        wait_for_body: deliver a small response only when its body is complete.

        Raises: ConnectionLostError.
        """
        self._wait_for_body = wait_for_body
        self._method = request.method
        self.was_used = True
        self._bytes_received, self._expected_size, self._last_data = 0, None, b""
        self._waiter = waiter
        self.start_timeout()
        self._write(data)

    async def _send_remaining_body(
        self, body: AsyncIterator[bytes], sent: int, length: int | None
    ) -> None:
        if sent == length:
            await anext(body, None)  # runs the generator to its end, so that it is freed
            return
        self._body_task = self._loop.create_task(self._send_body(body, sent, length))
        self._body_task.add_done_callback(self._on_body_sent)

    async def _send_body(self, body: AsyncIterator[bytes], sent: int, length: int | None) -> None:
        self._last_activity = inf  # the client sends now, under time limits of its own
        if self.transport is not None:
            self.transport.set_write_buffer_limits(WRITE_BUFFER_MAX)
        async for chunk in body:
            sent += len(chunk)
            self._write(chunk if length is not None else encode_chunk(chunk))
            if not self._can_write.is_set():
                self._last_activity = self._loop.time()
                await self._can_write.wait()
                self._last_activity = inf
        if length is None:
            self._write(LAST_CHUNK)
        elif sent != length:
            # Too few bytes: the peer waits for more. Too many: it read them as the next request.
            raise ConnectionLostError
        self._last_activity = self._loop.time()

    def _on_body_sent(self, task: asyncio.Task[None]) -> None:
        self._body_task = None
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.fail(error)

    def _write(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            raise ConnectionLostError
        self.transport.write(data)

    # The response

    def data_received(self, data: bytes) -> None:
        waiter = self._waiter
        try:
            if self._bypass_remaining:
                self._feed_body(data)
            else:
                self._receive(data)
        except Exception as error:
            self._on_internal_error(error, waiter)

    def _on_internal_error(self, error: Exception, waiter: ResponseWaiter | None) -> None:
        """End the exchange, whatever went wrong: nothing else would ever reach its waiter.

        waiter: of the exchange, which may be neither in `_waiter` nor in `_pending` any more.
        """
        logger.error("A response of fal was not processed: %s", describe_error(error))
        lost = ConnectionLostError(describe_error(error))
        self._pending = None
        try:
            self.fail(lost)
        finally:
            if waiter is not None and not waiter.done():
                waiter.set_exception(lost)

    def _receive(self, data: bytes) -> None:
        self._last_activity = self._loop.time()
        self._bytes_received += len(data)
        self._last_data = data
        try:
            responses, is_upgraded = self._parser.feed_data(data)
        except ConnectionLostError as error:
            self.fail(error)
            return
        for head, body in responses:
            self._on_response(head, body)
        if is_upgraded:
            self._is_clean = False
        elif self._waiter is None and self._body is None:
            self.close()  # unsolicited bytes: the next request would get them as its response
        self._deliver()

    def _on_response(self, head: ResponseHead, body: BodyBuffer) -> None:
        waiter, method = self._waiter, self._method
        if is_informational(head):
            self._expected_size = -1  # the offset of the final response is unknown
            return
        if waiter is None or method is None or waiter.done():
            self._is_clean = False  # a second response to one request
            return
        self._waiter = None
        self._body = body
        self._is_clean = self._is_clean and not head.should_close
        if self._expected_size is None:
            is_whole = self._bytes_received == len(self._last_data)  # began with this read
            self._expected_size = response_size(head, self._last_data if is_whole else b"")
        self._bypass_parser(body)
        self._pending = waiter, PooledResponse(self, method, head, body)

    def _bypass_parser(self, body: BodyBuffer) -> None:
        """Let a large body of known length skip the parser, which would copy every piece."""
        remaining = 0 if self._expected_size is None else self._expected_size - self._bytes_received
        if remaining > LARGE_BODY_MIN and not body.is_complete:
            self._bypass_remaining, self._parser_bypassed = remaining, True

    def _feed_body(self, data: bytes) -> None:
        self._bytes_received += len(data)
        self._last_activity = self._loop.time()
        piece = data[: self._bypass_remaining]  # bytes beyond the announced length are dropped
        self._bypass_remaining -= len(piece)
        body = self._body
        if body is not None and body.error is None:
            body.feed_data(piece)
            if not self._bypass_remaining:
                body.feed_eof()

    def _deliver(self, *, is_final: bool = False) -> None:
        """Pass the response to its waiter, after all data read together with it was parsed: the
        waiter may use the connection for the next request at once."""
        remaining = 0 if self._expected_size is None else self._expected_size - self._bytes_received
        if self._pending is None or (
            self._wait_for_body and 0 < remaining <= LARGE_BODY_MIN and not is_final
        ):
            return
        (waiter, response), self._pending = self._pending, None
        if not waiter.done():
            waiter.set_result(response)

    def finish(self, *, is_consumed: bool) -> None:
        """End the exchange. Release the connection if it is clean, else close it."""
        body, self._body = self._body, None
        self._method = None
        if body is not None:
            body.fail(ConnectionLostError("given up"))
        if (
            is_consumed
            and self._body_task is None
            and self._is_clean
            and self._is_cleanly_finished()
        ):
            self._last_activity = self._loop.time()
            if self._parser_bypassed:
                self._parser.reset()
                self._parser_bypassed = False
            self._release(self)
        else:
            self.close()

    def abandon(self) -> None:
        """Close the connection of a response that was garbage collected, from any thread."""
        with suppress(RuntimeError):  # the loop is closed, and its connections with it
            self._loop.call_soon_threadsafe(self.close)

    def _is_cleanly_finished(self) -> bool:
        """Return whether no byte came after the response: it would stay in the parser."""
        is_chunked = self._expected_size is None
        is_at_end = (
            self._last_data.endswith(LAST_CHUNK)
            if is_chunked
            else self._bytes_received == self._expected_size
        )
        return is_at_end and not self.has_pending_data

    # The end of the connection

    def connection_lost(self, exc: BaseException | None) -> None:
        waiter = self._waiter
        try:
            if exc is None and not self._is_closed:
                self._parser.feed_eof()
            self.fail(
                ConnectionLostError("the connection ended" if exc is None else describe_error(exc))
            )
        except Exception as error:
            self._on_internal_error(error, waiter)
        finally:
            self.transport = None
            self._parser.close()
            if self._on_lost is not None:
                self._on_lost(self)

    def fail(self, error: Exception) -> None:
        """End the exchange with an error, unless it is complete, and close the connection."""
        waiter, body = self._waiter, self._body
        self._waiter = None
        self.close()
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
        elif body is not None:
            body.fail(error)
        self._deliver(is_final=True)

    # Callbacks of the socket's protocol and of the body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.start_timeout()

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def pause_reading(self) -> None:
        if self._reading_paused or self.transport is None or self.transport.is_closing():
            return
        self._reading_paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._reading_paused:
            return
        self._reading_paused = False
        self._last_activity = self._loop.time()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()


class SharedBufferProtocol(asyncio.BufferedProtocol):
    """The protocol of the socket: reads into one buffer and passes copies to a connection.

    A plain `asyncio.Protocol` gets a new bytes object for every read, allocated for the largest
    read possible: with TLS, that is 256 KB for the 700 bytes of a poll.

    buffer: may be shared by all connections of an event loop, since data is copied out at once.
    """

    __slots__ = ("_buffer", "connection")

    def __init__(self, connection: Connection, buffer: memoryview) -> None:
        self.connection = connection
        self._buffer = buffer

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        # A full buffer: decrypted data may follow, and the next request must not start before it.
        self.connection.has_pending_data = nbytes == BUFFER_SIZE
        self.connection.data_received(self._buffer[:nbytes].tobytes())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connection.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self.connection.pause_writing()

    def resume_writing(self) -> None:
        self.connection.resume_writing()


def poll_readable(transport: asyncio.BaseTransport) -> "select.poll | None":
    """Return a poll object that reports data or a hang-up on the socket. None if the transport has
    no socket or the system no `poll`."""
    connection = transport.get_extra_info("socket")
    if connection is None or not hasattr(select, "poll"):
        return None
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | getattr(select, "POLLRDHUP", 0))
    return poll
