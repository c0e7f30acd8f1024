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

from falproxy.proxy.transport import Ask, BrokenError, kind_of
from falproxy.proxy.transport.idle_timeout import WatchedProtocol
from falproxy.proxy.transport.parser import end_body, is_informational, make_parser, size_of
from falproxy.proxy.transport.response import KeptAnswer, Waiting
from falproxy.proxy.transport.sockets import watch
from falproxy.proxy.transport.wire import LAST_CHUNK, chunked

# Bytes of a body that wait to be sent. TLS would hold half a megabyte, and as much encrypted.
BACKLOG_MAX = 64 * 2**10

LARGE = 2**17  # bytes of a body that are still to come when its head is here

Release = Callable[["Connection"], None]


class Connection(WatchedProtocol):
    """silence: seconds that the other side may say nothing while it is its turn. release: is given
    the connection when an exchange left it clean."""

    def __init__(self, loop: asyncio.AbstractEventLoop, silence: float, release: Release) -> None:
        super().__init__(loop, silence)
        self._parser = make_parser(self, loop)
        self._release = release
        self._method: str | None = None  # of the request that is under way
        self._waiting: Waiting | None = None
        self._told: tuple[Waiting, KeptAnswer] | None = None
        self._payload: StreamReader | None = None
        self._sending: asyncio.Task[None] | None = None
        self._is_patient = False
        self._is_clean = True
        self._is_closed = False
        self._has_paused = False
        self.has_served = False
        self.has_more = False  # perhaps: a piece of an answer was as large as can be
        self._received = 0  # bytes of the answer
        self._size: int | None = None  # that it should have, None where only its end tells
        self._last = b""
        self._left = 0  # bytes of a large body that go past the parser
        self._is_parser_behind = False  # since it has not seen all
        self._poll: select.poll | None = None

    # Between exchanges

    @property
    def is_idle(self) -> bool:
        return self._method is None

    def is_fresh(self, *, surely: bool) -> bool:
        """Whether a request may be written into it. surely: the system is asked whether the other
        side has closed it meanwhile, which shows here only a moment later."""
        transport = self.transport
        if transport is None or transport.is_closing() or not self._is_clean:
            return False
        if surely and self._poll is None:
            self._poll = watch(transport)
        return not surely or self._poll is None or not self._poll.poll(0)

    def close(self) -> None:
        """Ends it at once, with all that is going on in it."""
        self._is_clean, self._is_closed = False, True
        self.stop_watching()
        if self._sending is not None:
            self._sending.cancel()
        if self.transport is not None:
            self.transport.abort()

    # An exchange

    def begin(self, ask: Ask, data: bytes, waiting: Waiting, *, is_patient: bool = False) -> None:
        """Writes a request, or the beginning of one. waiting: hears of its answer's head; who is
        patient hears of a small answer when all of it is here.

        Raises: BrokenError."""
        self._is_patient = is_patient
        self._method = ask.method
        self.has_served = True
        self._received, self._size, self._last = 0, None, b""
        self._waiting = waiting
        self.watch_time()
        self._write(data)

    async def exchange(self, ask: Ask, head: bytes, first: bytes) -> KeptAnswer:
        """Writes a request and waits for the head of its answer. first: the beginning of its body,
        which goes out with the head; the rest goes up beside the answer, which need not wait.

        Raises: BrokenError, TimeoutError, and what the body raises."""
        waiting: asyncio.Future[KeptAnswer] = self._loop.create_future()
        try:
            is_chunked = ask.body is not None and ask.length is None
            self.begin(ask, head + (chunked(first) if is_chunked else first), waiting)
            if ask.body is not None:
                await self._send_rest(ask.body, len(first), ask.length)
            answer = await waiting
        except BaseException:
            waiting.cancel()
            self.close()
            raise
        return answer

    async def _send_rest(self, body: AsyncIterator[bytes], sent: int, length: int | None) -> None:
        if sent == length:
            await anext(body, None)  # it is at its end, and is let go of
            return
        self._sending = self._loop.create_task(self._send(body, sent, length))
        self._sending.add_done_callback(self._sent)

    async def _send(self, body: AsyncIterator[bytes], sent: int, length: int | None) -> None:
        self._heard = inf  # it is the client's turn, which has time limits of its own
        if self.transport is not None:
            self.transport.set_write_buffer_limits(BACKLOG_MAX)
        async for chunk in body:
            sent += len(chunk)
            self._write(chunk if length is not None else chunked(chunk))
            if self._paused:
                self._heard = self._loop.time()
                await self._drain_helper()
                self._heard = inf
        if length is None:
            self._write(LAST_CHUNK)
        elif sent != length:
            raise BrokenError  # the other side waits for the rest, or took it for a request
        self._heard = self._loop.time()

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending = None
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.fail(error)

    def _write(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            raise BrokenError
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if self._left:
            self._pass_on(data)
            return
        if parser is None:
            return
        if data:
            self._heard = self._loop.time()
            self._received += len(data)
            self._last = data
        try:
            messages, is_upgraded, _ = parser.feed_data(data)
        except HttpProcessingError as error:
            self.fail(BrokenError(kind_of(error)))
            return
        for message, payload in messages:
            self._take(message, payload)
        if is_upgraded:
            self._is_clean = False
        elif self._waiting is None and self._payload is None and data:
            self.close()  # nobody asked for it: whoever came next would take it for his answer
        self._tell()

    def _tell(self, *, is_over: bool = False) -> None:
        """Hands the answer over when all that came with it is known: whoever gets it may use the
        connection for the next one at once."""
        left = 0 if self._size is None else self._size - self._received
        if self._told is None or (self._is_patient and 0 < left <= LARGE and not is_over):
            return
        (waiting, answer), self._told = self._told, None
        if not waiting.done():
            waiting.set_result(answer)

    def _take(self, message: RawResponseMessage, payload: StreamReader) -> None:
        waiting, method = self._waiting, self._method
        if is_informational(message):
            self._size = -1  # where the answer begins is not known any more
            return
        if waiting is None or method is None or waiting.done():
            self._is_clean = False  # a second answer to one request
            return
        self._waiting = None
        self._payload = payload
        self._is_clean = self._is_clean and not message.should_close
        if self._size is None:
            self._size = size_of(message, self._last)
        self._look_ahead(payload)
        self._told = waiting, KeptAnswer(self, method, message, payload)

    def _look_ahead(self, payload: StreamReader) -> None:
        """The parser would copy every piece of a large body. Where the length is known, nothing
        else is to be found in it."""
        left = 0 if self._size is None else self._size - self._received
        if left > LARGE and not payload.is_eof():
            self._left, self._is_parser_behind = left, True

    def _pass_on(self, data: bytes) -> None:
        self._received += len(data)
        self._heard = self._loop.time()
        piece = data[: self._left]  # what is behind it is more than the answer had to have
        self._left -= len(piece)
        payload = self._payload
        if payload is not None and payload.exception() is None:
            payload.feed_data(piece)
            if not self._left:
                payload.feed_eof()

    def finish(self, *, is_read: bool) -> None:
        """The answer is read to its end, or given up. The connection is for the next one, if it is
        clean."""
        payload, self._payload = self._payload, None
        self._method = None
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(BrokenError("given up"))
        if is_read and self._sending is None and self._is_clean and self._ends_cleanly():
            self._heard = self._loop.time()
            if self._has_paused or self._is_parser_behind:  # a pause may leave a mark in it
                self._parser = make_parser(self, self._loop)
                self._has_paused = self._is_parser_behind = False
            self._release(self)
        else:
            self.close()

    def abandon(self) -> None:
        """Nobody knows the answer any more. Whatever thread finds that out."""
        with suppress(RuntimeError):  # the loop is closed, and all of it gone
            self._loop.call_soon_threadsafe(self.close)

    def _ends_cleanly(self) -> bool:
        """Whether nothing came behind the answer: a piece of another one would stay in the
        parser."""
        is_chunked = self._size is None
        is_whole = self._last.endswith(LAST_CHUNK) if is_chunked else self._received == self._size
        return is_whole and not self.has_more

    # Its end

    def connection_lost(self, exc: BaseException | None) -> None:
        parser, self._parser = self._parser, None
        if parser is not None and exc is None and not self._is_closed:
            end_body(parser)
        self.fail(BrokenError("the connection ended" if exc is None else kind_of(exc)))
        super().connection_lost(exc)

    def fail(self, error: Exception) -> None:
        """The exchange is over, for this reason, unless it is at its end."""
        waiting, payload = self._waiting, self._payload
        self._waiting = None
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
        elif payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(error)
        self.close()
        self._tell(is_over=True)

    # Time

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.watch_time()

    def pause_reading(self) -> None:
        self._has_paused = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        if not self._has_paused:  # as bodies say at their end, paused or not
            return
        self._heard = self._loop.time()
        super().resume_reading(resume_parser)
