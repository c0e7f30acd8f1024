"""Sends a request's call to fal and relays the response unchanged.

In the order of events: `forward` sends the call and returns a `RelayedResponse`. Middleware may
read or change it while it is unsent. aiohttp then calls its `prepare`, which sends head and body:
in one write (`_write_directly`) if the response is complete and unchanged, else in pieces
(`_relay`).
"""

import logging
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.errors import ProxyError
from falproxy.proxy.call import CALL, REQUEST_ID, UPSTREAM_SECONDS
from falproxy.proxy.headers import (
    encode_lines,
    has_surrogates,
    is_identity,
    response_headers,
    serialize_head,
    sole_value,
)
from falproxy.proxy.transport import TransportResponse
from falproxy.proxy.upstream import PREFETCHED, UPSTREAM, is_repeatable, read_chunk

logger = logging.getLogger(__name__)

DOCUMENT_MAX = 16 * 2**20  # bytes of JSON that are held in memory to be read or rewritten
LINE_MAX = 4 * 2**20
WRITE_BUFFER_MAX = 2**16  # unread bytes at which sending waits for the client
JSON_TYPE = re.compile(r"application/(?:[\w.-]+\+)?json\b", re.IGNORECASE)
# Headers that are true of fal's bytes only.
REPRESENTATION_HEADERS = (
    hdrs.CONTENT_LENGTH, hdrs.ETAG, hdrs.ACCEPT_RANGES, hdrs.CONTENT_MD5, hdrs.DIGEST,
    "Content-Digest", "Repr-Digest",
)  # fmt: skip
# Headers that aiohttp adds to a response without them.
AIOHTTP_DEFAULTS = (hdrs.SERVER, hdrs.CONTENT_TYPE)
# `struct linger`, on with 0 seconds: closing the socket then sends a TCP reset.
NO_LINGER = struct.pack("ii", 1, 0)

# Changes whole lines of a body, and yields each piece as soon as it is ready.
Rewrite = Callable[[bytes], AsyncIterator[bytes]]


@dataclass(slots=True)
class DirectWrite:
    """Whether complete, unchanged responses may be written to the socket without aiohttp's writer.

    extra_headers: returns the headers that every response gets: request id and timings.
    enabled: True from the start of the application (`app.create_direct_write`) until its shutdown
        begins (`web.health.Drain`).
    """

    extra_headers: Callable[[web.BaseRequest], Sequence[tuple[str, str]]]
    enabled: bool = True


# Set for requests to the proxy's own application, not for one that embeds the proxy.
DIRECT_WRITE = web.RequestKey("falproxy.direct_write", DirectWrite)


def can_write_directly(request: web.BaseRequest) -> bool:
    direct_write = request.get(DIRECT_WRITE)
    return direct_write is not None and direct_write.enabled


async def forward(request: web.Request) -> "RelayedResponse":
    """Handler: send the request's call and return fal's response, unsent. Raises: ProxyError 502,
    504."""
    prefetched = request.pop(PREFETCHED, None)  # set if the fast path gave the request back
    if prefetched is None:
        sent = await send(request)
        response = RelayedResponse(sent, is_repeatable=is_repeatable(request[CALL]))
    else:
        request[UPSTREAM_SECONDS] = prefetched.upstream_seconds
        response = RelayedResponse(prefetched.response())
    if not can_write_directly(request):
        response.load_headers()  # code of an embedding application may look for them
    return response


async def send(request: web.Request) -> TransportResponse:
    started = time.perf_counter()
    try:
        return await request.app[UPSTREAM].send(request[CALL])
    finally:
        request[UPSTREAM_SECONDS] = time.perf_counter() - started


class RelayedResponse(web.StreamResponse):
    """fal's response, unsent: `prepare` sends the head, then relays the body.

    Before that, middleware may read the status and headers, add headers, and read or replace the
    body if it is a document.

    on_sent: called once when the relay has ended, with True if the whole response was sent.
    """

    # aiohttp then sends the head together with the first bytes of the body. By default it does so
    # only for its own response classes, and a small response takes two writes.
    _send_headers_immediately = False

    def __init__(
        self, upstream_response: TransportResponse, *, is_repeatable: bool | None = None
    ) -> None:
        super().__init__(status=upstream_response.status, reason=upstream_response.reason)
        self._is_repeatable = is_repeatable  # as for `read_chunk`
        self.on_sent: Callable[[bool], None] | None = None
        self._extra_headers: list[tuple[str, str]] = []
        self._headers_loaded = False  # `headers` is filled, and may be changed
        self._sent_directly = False
        self._default_headers: list[str] = []
        self._rewrites: list[Rewrite] = []
        self._upstream_response = upstream_response
        self._buffered: list[bytes] = []  # bytes of the body that were read and are not sent yet

    def __repr__(self) -> str:
        state = "sent directly" if self._sent_directly else "sent" if self.prepared else "unsent"
        return f"<RelayedResponse {self.status}, {state}, of {self._upstream_response!r}>"

    # What middleware reads and changes: the headers

    @property
    def upstream_headers(self) -> CIMultiDictProxy[str]:
        """fal's headers, unfiltered, read-only."""
        return self._upstream_response.headers

    @property
    def headers(self) -> CIMultiDict[str]:
        """fal's headers for the client, which may be changed. To add one, `add_header` is cheaper:
        it does not parse the others."""
        self.load_headers()
        return super().headers

    def load_headers(self) -> None:
        """Fill `headers`, unless they are filled."""
        if self._headers_loaded:
            return
        self._headers_loaded = True
        headers = super().headers
        headers.extend(response_headers(self._upstream_response.raw_headers))
        headers.extend(self._extra_headers)
        self._default_headers = [name for name in AIOHTTP_DEFAULTS if name not in headers]

    # aiohttp reads these two without the property `headers`.

    @property  # type: ignore[misc] # without aiohttp's setter
    def content_type(self) -> str:
        self.load_headers()
        return super().content_type

    @property  # type: ignore[misc] # without aiohttp's setter
    def content_length(self) -> int | None:
        self.load_headers()
        return super().content_length

    def add_header(self, name: str, value: str) -> None:
        """Add a header beside fal's, even one of the same name."""
        if self._headers_loaded:
            self.headers.add(name, value)
        else:
            self._extra_headers.append((name, value))

    @property
    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        """The headers added before `headers` was filled."""
        return tuple(self._extra_headers)

    def drop_default_headers(self) -> None:
        """Remove the headers that aiohttp adds by default and fal did not send."""
        for name in self._default_headers:
            self.headers.pop(name, None)

    # What middleware reads and changes: the body

    @property
    def is_encoded(self) -> bool:
        """Whether the body is compressed, and so cannot be read here."""
        return not is_identity(self.current_headers)

    @property
    def current_headers(self) -> CIMultiDictProxy[str] | CIMultiDict[str]:
        """`headers` if they are filled, else fal's: the response may still be sent in one write."""
        return self.headers if self._headers_loaded else self.upstream_headers

    async def document(self, limit: int = DOCUMENT_MAX) -> bytes | None:
        """Return the body if it is unencoded JSON of at most `limit` bytes, else None. The body is
        relayed in either case. Raises: ProxyError 502, 504."""
        is_json = JSON_TYPE.match(sole_value(self.current_headers, hdrs.CONTENT_TYPE) or "")
        return await self.read(limit) if is_json else None

    async def read(self, limit: int) -> bytes | None:
        """Like `document`, for a body of any type."""
        if self.is_encoded:
            return None
        size = sum(map(len, self._buffered))
        try:
            while size <= limit and (chunk := await self.read_chunk()):
                self._buffered.append(chunk)
                size += len(chunk)
        except BaseException:
            self._upstream_response.close()  # this response is not going to be sent
            raise
        if size > limit:
            return None
        self._buffered = [b"".join(self._buffered)]
        return self._buffered[0]

    def replace_document(self, body: bytes) -> None:
        """Send `body` instead of the document that was read."""
        self._buffered = [body]
        self._drop_validators()
        self.headers[hdrs.CONTENT_LENGTH] = str(len(body))

    def rewrite_lines(self, rewrite: Rewrite) -> None:
        """Apply a rewrite to each line of the body as it is relayed, such as an event stream's."""
        self._rewrites.append(rewrite)
        self._drop_validators()

    def _drop_validators(self) -> None:
        for name in REPRESENTATION_HEADERS:
            self.headers.pop(name, None)

    # For a caller that reads the body instead of sending the response

    async def read_chunk(self) -> bytes:
        """Return the next bytes of the body, empty at its end. Raises: ProxyError 502, 504."""
        return await read_chunk(self._upstream_response, is_repeatable=self._is_repeatable)

    async def rewrite(self, lines: bytes) -> bytes:
        """Return whole lines of the body after all rewrites."""
        return b"".join([piece async for piece in apply_rewrites(lines, self._rewrites)])

    @property
    def is_body_complete(self) -> bool:
        """Whether the body has been read to its end."""
        return self._upstream_response.is_consumed

    def on_body_end(
        self, callback: Callable[[], None], on_chunk: Callable[[bytes], None] | None = None
    ) -> None:
        """Have a function called when the body has been read to its end, or was given up.

        on_chunk: called with each piece of the body before.
        """
        self._upstream_response = BodyEndObserver(self._upstream_response, callback, on_chunk)

    def discard(self) -> None:
        """Close the upstream response, unless this response was sent."""
        if not self.prepared:
            self._upstream_response.close()

    # Sending

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the whole response. If fal's body breaks off, the client's connection is reset, so
        that the client cannot take a part for the whole."""
        if self.prepared:
            return await super().prepare(request)
        if self._is_direct(request) and (head := self._serialize_head(request)):
            await self._write_directly(request, head)
            return None
        complete = False
        try:
            writer = await self._send_head(request)
            await self._relay()
            complete = True
        except ProxyError as error:
            logger.warning("%s in the body of %s", error.code, request.get(REQUEST_ID))
            reset_connection(request)
            raise ConnectionResetError(error.code) from error
        finally:
            if not complete:
                self._upstream_response.close()
            if self.on_sent is not None:
                self.on_sent(complete)
        return writer

    def _is_direct(self, request: web.BaseRequest) -> bool:
        """Return whether the response is complete and unchanged, and the connection persistent."""
        untouched = not self._headers_loaded and not self._rewrites
        if not (untouched and self._upstream_response.is_complete and can_write_directly(request)):
            return False
        return request.keep_alive and request.version == HttpVersion11

    def _serialize_head(self, request: web.BaseRequest) -> bytes | None:
        """Return the head of the response; None if fal's head lacks what a single write needs
        (length, date), so that aiohttp's writer has to send it."""
        upstream = self._upstream_response
        extra_headers = [*self._extra_headers, *request[DIRECT_WRITE].extra_headers(request)]
        return serialize_head(upstream.status, upstream.reason, upstream.raw_headers, extra_headers)

    async def _write_directly(self, request: web.BaseRequest, head: bytes) -> None:
        """Send head and body in one write, without aiohttp's writer."""
        transport = request.transport
        complete = False
        try:
            body = b"".join((*self._buffered, await self.read_chunk()))
            if transport is None or transport.is_closing():
                raise ConnectionResetError("The client left")
            transport.write(head + body)
            self._sent_directly = complete = True
            if transport.get_write_buffer_size() > WRITE_BUFFER_MAX:
                await request.writer.drain()
        finally:
            if self.on_sent is not None:
                self.on_sent(complete)

    async def _send_head(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self.load_headers()
        if request.version < HttpVersion11 and self.content_length is None:
            self.force_close()  # the end of the connection marks the end of the body
        writer = await super().prepare(request)
        if writer is not None and not self._upstream_response.is_complete:
            writer.send_headers()  # the rest of the body may take long
        super().headers.clear()  # they are sent; the body may take hours
        self._headers_loaded = False  # a later reader, such as the log, gets fal's headers
        self._upstream_response.drop_headers()
        return writer

    async def _write_headers(self) -> None:
        """Write the head. aiohttp's own drops the bytes of header values that are not UTF-8; it
        does not document this method, nor the buffer. A test of such bytes (test_forward.py) fails
        when they are gone."""
        await super()._write_headers()
        request, writer = self._req, self._payload_writer
        values = (self.reason, *self.headers.values())
        if request is None or writer is None or not any(map(has_surrogates, values)):
            return
        version = request.version
        line = f"HTTP/{version.major}.{version.minor} {self.status} {self.reason}"
        lines = [f"{name}: {value}" for name, value in self.headers.items()]
        writer._headers_buf = encode_lines([line, *lines])  # type: ignore[attr-defined]

    async def _relay(self) -> None:
        for chunk in self._buffered:
            await self.write(chunk)
        if self._rewrites:
            await self._relay_lines()
            await self.write_eof()
            return
        while not self._upstream_response.is_complete:
            await self.write(await self.read_chunk())
        await self.write_eof(await self.read_chunk())

    async def _relay_lines(self) -> None:
        """Relay by whole lines. A line longer than `LINE_MAX` passes unchanged."""
        rest = bytearray()
        while chunk := await self.read_chunk():
            lines, line_end, incomplete = chunk.rpartition(b"\n")
            if line_end:
                await self._write_lines(bytes(rest + lines + line_end))
                rest.clear()
            rest += incomplete
            if len(rest) > LINE_MAX:
                await self.write(bytes(rest))
                rest.clear()
        await self._write_lines(bytes(rest))

    async def _write_lines(self, lines: bytes) -> None:
        async for piece in apply_rewrites(lines, self._rewrites):
            await self.write(piece)

    # aiohttp's state of a response, for one that its writer has not seen

    @property
    def was_sent_directly(self) -> bool:
        return self._sent_directly

    @property
    def prepared(self) -> bool:
        return self._sent_directly or super().prepared

    @property
    def keep_alive(self) -> bool | None:
        return True if self._sent_directly else super().keep_alive

    async def write_eof(self, data: bytes = b"") -> None:
        if not self._sent_directly:
            await super().write_eof(data)


def add_headers(response: web.StreamResponse, fields: Iterable[tuple[str, str]]) -> None:
    """Add headers beside those of the response, even of the same names."""
    add = response.add_header if isinstance(response, RelayedResponse) else response.headers.add
    for name, value in fields:
        add(name, value)


class BodyEndObserver:
    """A `TransportResponse` that reports the end of its body."""

    def __init__(
        self,
        inner: TransportResponse,
        callback: Callable[[], None],
        on_chunk: Callable[[bytes], None] | None = None,
    ) -> None:
        self._inner = inner
        self._callback = callback
        self._on_chunk = on_chunk

    def __repr__(self) -> str:
        return f"<BodyEndObserver of {self._inner!r}>"

    @property
    def method(self) -> str:
        return self._inner.method

    @property
    def status(self) -> int:
        return self._inner.status

    @property
    def reason(self) -> str:
        return self._inner.reason

    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        return self._inner.raw_headers

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        return self._inner.headers

    @property
    def is_complete(self) -> bool:
        return self._inner.is_complete

    @property
    def is_consumed(self) -> bool:
        return self._inner.is_consumed

    async def read(self) -> bytes:
        try:
            chunk = await self._inner.read()
        except BaseException:
            self._callback()
            raise
        if self._on_chunk is not None:
            self._on_chunk(chunk)
        if not chunk or self._inner.is_consumed:
            self._callback()
        return chunk

    def drop_headers(self) -> None:
        self._inner.drop_headers()

    def close(self) -> None:
        self._inner.close()
        self._callback()


def sync_rewrite(transform: Callable[[bytes], bytes]) -> Rewrite:
    """Return a rewrite that calls a function."""

    async def rewrite(lines: bytes) -> AsyncIterator[bytes]:
        yield transform(lines)

    return rewrite


async def apply_rewrites(lines: bytes, rewrites: Sequence[Rewrite]) -> AsyncIterator[bytes]:
    """Yield lines after all rewrites, applied in order."""
    if not rewrites:
        yield lines
        return
    first, *others = rewrites
    async for piece in first(lines):
        async for ready in apply_rewrites(piece, others):
            yield ready


def reset_connection(request: web.BaseRequest) -> None:
    """Send a TCP reset to the client. asyncio's `abort` alone closes in order, which marks the end
    of a body to a client that reads until the connection ends."""
    transport = request.transport
    if transport is None:
        return
    if (connection := transport.get_extra_info("socket")) is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    transport.abort()
