"""One connection, kept for one exchange after another.

It stands on aiohttp's own parser of answers, which is not documented: `parsing.is_usable` says
whether this release of aiohttp has it in the shape that is needed here.
"""

import asyncio
import select
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from math import inf

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from falproxy.proxy.transport import ConnectionLostError, UpstreamRequest, describe_error
from falproxy.proxy.transport.idle_timeout import TimeoutProtocol
from falproxy.proxy.transport.parser import (
    feed_connection_eof,
    is_informational,
    make_parser,
    response_size,
)
from falproxy.proxy.transport.response import PooledResponse, ResponseWaiter
from falproxy.proxy.transport.sockets import poll_readable
from falproxy.proxy.transport.wire import LAST_CHUNK, encode_chunk

# Bytes of a body that wait to be sent. TLS would hold half a megabyte, and as much encrypted.
WRITE_BUFFER_MAX = 64 * 2**10

LARGE_BODY_MIN = 2**17  # bytes of a body that are still to come when its head is here

ReleaseCallback = Callable[["Connection"], None]


class Connection(TimeoutProtocol):
    """silence: seconds that the other side may say nothing while it is its turn. release: is given
    the connection when an exchange left it clean."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, read_timeout: float, release: ReleaseCallback
    ) -> None:
        super().__init__(loop, read_timeout)
        self._parser = make_parser(self, loop)
        self._release = release
        self._method: str | None = None  # of the request that is under way
        self._waiter: ResponseWaiter | None = None
        self._pending: tuple[ResponseWaiter, PooledResponse] | None = None
        self._payload: StreamReader | None = None
        self._body_task: asyncio.Task[None] | None = None
        self._wait_for_body = False
        self._is_clean = True
        self._is_closed = False
        self._was_paused = False
        self.was_used = False
        self.has_pending_data = False  # perhaps: a piece of an answer was as large as can be
        self._bytes_received = 0  # bytes of the answer
        self._expected_size: int | None = None  # that it should have, None where only its end tells
        self._last_data = b""
        self._bypass_remaining = 0  # bytes of a large body that go past the parser
        self._parser_bypassed = False  # since it has not seen all
        self._poll: select.poll | None = None

    # Between exchanges

    @property
    def is_idle(self) -> bool:
        return self._method is None

    def is_reusable(self, *, check_socket: bool) -> bool:
        """Whether a request may be written into it. surely: the system is asked whether the other
        side has closed it meanwhile, which shows here only a moment later."""
        transport = self.transport
        if transport is None or transport.is_closing() or not self._is_clean:
            return False
        if check_socket and self._poll is None:
            self._poll = poll_readable(transport)
        return not check_socket or self._poll is None or not self._poll.poll(0)

    def close(self) -> None:
        """Ends it at once, with all that is going on in it."""
        self._is_clean, self._is_closed = False, True
        self.stop_timeout()
        if self._body_task is not None:
            self._body_task.cancel()
        if self.transport is not None:
            self.transport.abort()

    # An exchange

    def start_request(
        self,
        request: UpstreamRequest,
        data: bytes,
        waiter: ResponseWaiter,
        *,
        wait_for_body: bool = False,
    ) -> None:
        """Writes a request, or the beginning of one. waiting: hears of its answer's head; who is
        patient hears of a small answer when all of it is here.

        Raises: ConnectionLostError."""
        self._wait_for_body = wait_for_body
        self._method = request.method
        self.was_used = True
        self._bytes_received, self._expected_size, self._last_data = 0, None, b""
        self._waiter = waiter
        self.start_timeout()
        self._write(data)

    async def exchange(
        self, request: UpstreamRequest, head: bytes, first_chunk: bytes
    ) -> PooledResponse:
        """Writes a request and waits for the head of its answer. first: the beginning of its body,
        which goes out with the head; the rest goes up beside the answer, which need not wait.

        Raises: ConnectionLostError, TimeoutError, and what the body raises."""
        waiting: asyncio.Future[PooledResponse] = self._loop.create_future()
        try:
            is_chunked = request.body is not None and request.length is None
            self.start_request(
                request, head + (encode_chunk(first_chunk) if is_chunked else first_chunk), waiting
            )
            if request.body is not None:
                await self._send_remaining_body(request.body, len(first_chunk), request.length)
            answer = await waiting
        except BaseException:
            waiting.cancel()
            self.close()
            raise
        return answer

    async def _send_remaining_body(
        self, body: AsyncIterator[bytes], sent: int, length: int | None
    ) -> None:
        if sent == length:
            await anext(body, None)  # it is at its end, and is let go of
            return
        self._body_task = self._loop.create_task(self._send_body(body, sent, length))
        self._body_task.add_done_callback(self._on_body_sent)

    async def _send_body(self, body: AsyncIterator[bytes], sent: int, length: int | None) -> None:
        self._last_activity = inf  # it is the client's turn, which has time limits of its own
        if self.transport is not None:
            self.transport.set_write_buffer_limits(WRITE_BUFFER_MAX)
        async for chunk in body:
            sent += len(chunk)
            self._write(chunk if length is not None else encode_chunk(chunk))
            if self._paused:
                self._last_activity = self._loop.time()
                await self._drain_helper()
                self._last_activity = inf
        if length is None:
            self._write(LAST_CHUNK)
        elif sent != length:
            raise ConnectionLostError  # the other side waits for the rest, or took it for a request
        self._last_activity = self._loop.time()

    def _on_body_sent(self, task: asyncio.Task[None]) -> None:
        self._body_task = None
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.fail(error)

    def _write(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            raise ConnectionLostError
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if self._bypass_remaining:
            self._feed_body(data)
            return
        if parser is None:
            return
        if data:
            self._last_activity = self._loop.time()
            self._bytes_received += len(data)
            self._last_data = data
        try:
            messages, is_upgraded, _ = parser.feed_data(data)
        except HttpProcessingError as error:
            self.fail(ConnectionLostError(describe_error(error)))
            return
        for message, payload in messages:
            self._on_message(message, payload)
        if is_upgraded:
            self._is_clean = False
        elif self._waiter is None and self._payload is None and data:
            self.close()  # nobody asked for it: whoever came next would take it for his answer
        self._deliver()

    def _deliver(self, *, is_final: bool = False) -> None:
        """Hands the answer over when all that came with it is known: whoever gets it may use the
        connection for the next one at once."""
        left = 0 if self._expected_size is None else self._expected_size - self._bytes_received
        if self._pending is None or (
            self._wait_for_body and 0 < left <= LARGE_BODY_MIN and not is_final
        ):
            return
        (waiting, answer), self._pending = self._pending, None
        if not waiting.done():
            waiting.set_result(answer)

    def _on_message(self, message: RawResponseMessage, payload: StreamReader) -> None:
        waiting, method = self._waiter, self._method
        if is_informational(message):
            self._expected_size = -1  # where the answer begins is not known any more
            return
        if waiting is None or method is None or waiting.done():
            self._is_clean = False  # a second answer to one request
            return
        self._waiter = None
        self._payload = payload
        self._is_clean = self._is_clean and not message.should_close
        if self._expected_size is None:
            self._expected_size = response_size(message, self._last_data)
        self._bypass_parser(payload)
        self._pending = waiting, PooledResponse(self, method, message, payload)

    def _bypass_parser(self, payload: StreamReader) -> None:
        """The parser would copy every piece of a large body. Where the length is known, nothing
        else is to be found in it."""
        left = 0 if self._expected_size is None else self._expected_size - self._bytes_received
        if left > LARGE_BODY_MIN and not payload.is_eof():
            self._bypass_remaining, self._parser_bypassed = left, True

    def _feed_body(self, data: bytes) -> None:
        self._bytes_received += len(data)
        self._last_activity = self._loop.time()
        piece = data[
            : self._bypass_remaining
        ]  # what is behind it is more than the answer had to have
        self._bypass_remaining -= len(piece)
        payload = self._payload
        if payload is not None and payload.exception() is None:
            payload.feed_data(piece)
            if not self._bypass_remaining:
                payload.feed_eof()

    def finish(self, *, is_consumed: bool) -> None:
        """The answer is read to its end, or given up. The connection is for the next one, if it is
        clean."""
        payload, self._payload = self._payload, None
        self._method = None
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(ConnectionLostError("given up"))
        if (
            is_consumed
            and self._body_task is None
            and self._is_clean
            and self._is_cleanly_finished()
        ):
            self._last_activity = self._loop.time()
            if self._was_paused or self._parser_bypassed:  # a pause may leave a mark in it
                self._parser = make_parser(self, self._loop)
                self._was_paused = self._parser_bypassed = False
            self._release(self)
        else:
            self.close()

    def abandon(self) -> None:
        """Nobody knows the answer any more. Whatever thread finds that out."""
        with suppress(RuntimeError):  # the loop is closed, and all of it gone
            self._loop.call_soon_threadsafe(self.close)

    def _is_cleanly_finished(self) -> bool:
        """Whether nothing came behind the answer: a piece of another one would stay in the
        parser."""
        is_chunked = self._expected_size is None
        is_whole = (
            self._last_data.endswith(LAST_CHUNK)
            if is_chunked
            else self._bytes_received == self._expected_size
        )
        return is_whole and not self.has_pending_data

    # Its end

    def connection_lost(self, exc: BaseException | None) -> None:
        parser, self._parser = self._parser, None
        if parser is not None and exc is None and not self._is_closed:
            feed_connection_eof(parser)
        self.fail(
            ConnectionLostError("the connection ended" if exc is None else describe_error(exc))
        )
        super().connection_lost(exc)

    def fail(self, error: Exception) -> None:
        """The exchange is over, for this reason, unless it is at its end."""
        waiting, payload = self._waiter, self._payload
        self._waiter = None
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
        elif payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(error)
        self.close()
        self._deliver(is_final=True)

    # Time

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.start_timeout()

    def pause_reading(self) -> None:
        self._was_paused = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        if not self._was_paused:  # as bodies say at their end, paused or not
            return
        self._last_activity = self._loop.time()
        super().resume_reading(resume_parser)
