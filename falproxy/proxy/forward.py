"""THE FORMULA: send the call to fal, hand the answer back unchanged."""

import logging
import re
import time
from collections.abc import Callable

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.errors import ProxyError
from falproxy.proxy.call import CALL, REQUEST_ID, UPSTREAM_SECONDS
from falproxy.proxy.direct_write import DIRECT_WRITE, can_write_directly
from falproxy.proxy.headers import response_headers
from falproxy.proxy.line_rewriter import Rewrite, apply_rewrites
from falproxy.proxy.reset import reset_connection
from falproxy.proxy.response_head import serialize_head
from falproxy.proxy.transport import TransportResponse
from falproxy.proxy.upstream import PREFETCHED, UPSTREAM, read_chunk

logger = logging.getLogger(__name__)

DOCUMENT_MAX = 16 * 2**20  # bytes of JSON that are held to be read or rewritten
LINE_MAX = 4 * 2**20
WRITE_BUFFER_MAX = 2**16  # bytes that a client may leave unread before its answer waits for it
JSON_TYPE = re.compile(r"application/(?:[\w.-]+\+)?json\b", re.IGNORECASE)
REPRESENTATION_HEADERS = (
    hdrs.CONTENT_LENGTH, hdrs.ETAG, hdrs.ACCEPT_RANGES, hdrs.CONTENT_MD5, hdrs.DIGEST,
    "Content-Digest", "Repr-Digest",
)  # fmt: skip
# What aiohttp adds to an answer that does not have it.
AIOHTTP_DEFAULTS = (hdrs.SERVER, hdrs.CONTENT_TYPE)


class RelayedResponse(web.StreamResponse):
    """fal's answer, not sent yet: `prepare` writes status and headers, then relays the body.

    Until then middleware sees the status and the headers, may add to them, and may ask for the
    body if it is a document.

    on_sent: called once when the relay ends, however it ends, with whether all of it was sent.
    """

    # aiohttp then holds the head back for the body's first bytes; without it, it does so only for
    # its own responses, and a small answer takes two writes.
    _send_headers_immediately = False

    def __init__(self, upstream_response: TransportResponse) -> None:
        super().__init__(status=upstream_response.status, reason=upstream_response.reason)
        self.on_sent: Callable[[bool], None] | None = None
        self._extra_headers: list[tuple[str, str]] = []
        self._headers_loaded = False  # whether the headers are in `headers`, where they may change
        self._sent_directly = False
        self._default_headers: list[str] = []
        self._rewrites: list[Rewrite] = []
        self._upstream_response = upstream_response
        self._buffered: list[bytes] = []  # of the body, and not sent yet

    @property
    def upstream_headers(self) -> CIMultiDictProxy[str]:
        """fal's own headers, all of them, to be looked at."""
        return self._upstream_response.headers

    @property
    def headers(self) -> CIMultiDict[str]:
        """fal's, without those that are not for the client. Who only adds one uses `add`, which
        costs less: then they are never read."""
        self.load_headers()
        return super().headers

    def load_headers(self) -> None:
        """From now on they are where aiohttp looks for them."""
        if self._headers_loaded:
            return
        self._headers_loaded = True
        headers = super().headers
        headers.extend(response_headers(self._upstream_response.raw_headers))
        headers.extend(self._extra_headers)
        self._default_headers = [name for name in AIOHTTP_DEFAULTS if name not in headers]

    # aiohttp reads both from where it keeps its own headers.

    @property  # type: ignore[misc] # nobody sets fal's
    def content_type(self) -> str:
        self.load_headers()
        return super().content_type

    @property  # type: ignore[misc] # nor its length
    def content_length(self) -> int | None:
        self.load_headers()
        return super().content_length

    def add_header(self, name: str, value: str) -> None:
        """Another header, beside whatever fal says."""
        if self._headers_loaded:
            self.headers.add(name, value)
        else:
            self._extra_headers.append((name, value))

    @property
    def is_encoded(self) -> bool:
        """Whether the body is compressed, so that nobody here can read it."""
        return self.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity"

    async def document(self, limit: int = DOCUMENT_MAX) -> bytes | None:
        """The body, when it is JSON of at most `limit` bytes that stands there uncoded; None
        leaves a body to be relayed as it is. Raises: ProxyError 502, 504."""
        is_json = JSON_TYPE.match(self.headers.get(hdrs.CONTENT_TYPE, ""))
        return await self.read(limit) if is_json else None

    async def read(self, limit: int) -> bytes | None:
        """As `document`, whatever the body is."""
        if self.is_encoded:
            return None
        size = sum(map(len, self._buffered))
        try:
            while size <= limit and (chunk := await read_chunk(self._upstream_response)):
                self._buffered.append(chunk)
                size += len(chunk)
        except BaseException:
            self._upstream_response.close()  # nobody is going to send this answer any more
            raise
        if size > limit:
            return None
        self._buffered = [b"".join(self._buffered)]
        return self._buffered[0]

    def replace_document(self, body: bytes) -> None:
        """Sends this instead of the document that was read."""
        self._buffered = [body]
        self._drop_validators()
        self.headers[hdrs.CONTENT_LENGTH] = str(len(body))

    async def read_chunk(self) -> bytes:
        """The next bytes of a body that is not relayed. Raises: ProxyError 502, 504."""
        return await read_chunk(self._upstream_response)

    async def rewrite(self, lines: bytes) -> bytes:
        """Whole lines of a body that is not relayed, as they would be."""
        return b"".join([piece async for piece in apply_rewrites(lines, self._rewrites)])

    def rewrite_lines(self, rewrite: Rewrite) -> None:
        """Applies it to the lines of a relayed body, such as an event stream's, as they come."""
        self._rewrites.append(rewrite)
        self._drop_validators()

    def _drop_validators(self) -> None:
        """Drops what is true of fal's own bytes only."""
        for name in REPRESENTATION_HEADERS:
            self.headers.pop(name, None)

    def discard(self) -> None:
        """Gives an answer up that nobody is going to be sent."""
        if not self.prepared:
            self._upstream_response.close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Sends everything. A body that breaks off on fal's side breaks off on the client's: its
        connection is aborted, so that it never takes a part for the whole."""
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

    async def _send_head(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self.load_headers()
        if request.version < HttpVersion11 and self.content_length is None:
            self.force_close()  # such a client knows the end of the body by this alone
        writer = await super().prepare(request)
        if writer is not None and not self._upstream_response.is_complete:
            writer.send_headers()  # nobody knows when there is more
        super().headers.clear()  # they are out, and the body may be under way for hours
        self._headers_loaded = False  # whoever asks for them after all, such as a log, gets fal's
        self._upstream_response.drop_headers()
        return writer

    @property
    def was_sent_directly(self) -> bool:
        """Whether it went out as it came, all at once."""
        return self._sent_directly

    @property
    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        """What it has beside fal's headers, as long as nobody has read them."""
        return tuple(self._extra_headers)

    @property
    def prepared(self) -> bool:
        return self._sent_directly or super().prepared

    @property
    def keep_alive(self) -> bool | None:
        return True if self._sent_directly else super().keep_alive

    async def write_eof(self, data: bytes = b"") -> None:
        if not self._sent_directly:
            await super().write_eof(data)

    def _is_direct(self, request: web.BaseRequest) -> bool:
        """Whether all of the answer is here, and goes out as it came."""
        untouched = not self._headers_loaded and not self._rewrites and not self._buffered
        if not (untouched and self._upstream_response.is_complete and can_write_directly(request)):
            return False
        return request.keep_alive and request.version == HttpVersion11

    def _serialize_head(self, request: web.BaseRequest) -> bytes | None:
        sign = request[DIRECT_WRITE].extra_headers
        upstream = self._upstream_response
        added = [*self._extra_headers, *sign(request)]
        return serialize_head(upstream.status, upstream.reason, upstream.raw_headers, added)

    async def _write_directly(self, request: web.BaseRequest, head: bytes) -> None:
        """Head and body in one write, past what aiohttp does for answers of which it knows less."""
        transport = request.transport
        complete = False
        try:
            body = await read_chunk(self._upstream_response)
            if transport is None or transport.is_closing():
                raise ConnectionResetError("The client left")
            transport.write(head + body)
            self._sent_directly = complete = True
            if transport.get_write_buffer_size() > WRITE_BUFFER_MAX:
                await request.writer.drain()
        finally:
            if self.on_sent is not None:
                self.on_sent(complete)

    async def _relay(self) -> None:
        for chunk in self._buffered:
            await self.write(chunk)
        if self._rewrites:
            await self._relay_lines()
            await self.write_eof()
            return
        while not self._upstream_response.is_complete:
            await self.write(await read_chunk(self._upstream_response))
        await self.write_eof(await read_chunk(self._upstream_response))

    async def _relay_lines(self) -> None:
        """As the relay, by whole lines; one that grows past all measure is let through as it is."""
        rest = bytearray()
        while chunk := await read_chunk(self._upstream_response):
            lines, end, begun = chunk.rpartition(b"\n")
            if end:
                await self._write_lines(bytes(rest + lines + end))
                rest.clear()
            rest += begun
            if len(rest) > LINE_MAX:
                await self.write(bytes(rest))
                rest.clear()
        await self._write_lines(bytes(rest))

    async def _write_lines(self, lines: bytes) -> None:
        async for piece in apply_rewrites(lines, self._rewrites):
            await self.write(piece)

    def drop_default_headers(self) -> None:
        """Takes out what aiohttp puts in for a handler that forgot it. fal did not."""
        for name in self._default_headers:
            self.headers.pop(name, None)


async def forward(request: web.Request) -> RelayedResponse:
    """Handler: fal's answer to the request's call. Raises: ProxyError 502, 504."""
    in_hand = request.pop(PREFETCHED, None)
    if in_hand is None:
        response = RelayedResponse(await send(request))
    else:
        request[UPSTREAM_SECONDS] = in_hand.upstream_seconds
        response = RelayedResponse(in_hand.response())
    if not can_write_directly(request):
        response.load_headers()  # whoever looks at it may be somebody who does not know of this
    return response


async def send(request: web.Request) -> TransportResponse:
    started = time.perf_counter()
    try:
        return await request.app[UPSTREAM].send(request[CALL])
    finally:
        request[UPSTREAM_SECONDS] = time.perf_counter() - started
