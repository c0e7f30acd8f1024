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
from falproxy.proxy.direct_write import SHORT_CUT, may_cut_short
from falproxy.proxy.headers import headers_down
from falproxy.proxy.line_rewriter import Rewrite, rewritten
from falproxy.proxy.reset import abort
from falproxy.proxy.response_head import plain_head
from falproxy.proxy.transport import Answer
from falproxy.proxy.upstream import IN_HAND, UPSTREAM, read_chunk

logger = logging.getLogger(__name__)

DOCUMENT_MAX = 16 * 2**20  # bytes of JSON that are held to be read or rewritten
LINE_MAX = 4 * 2**20
BACKLOG_MAX = 2**16  # bytes that a client may leave unread before its answer waits for it
JSON_TYPE = re.compile(r"application/(?:[\w.-]+\+)?json\b", re.IGNORECASE)
OF_THE_BYTES = (
    hdrs.CONTENT_LENGTH, hdrs.ETAG, hdrs.ACCEPT_RANGES, hdrs.CONTENT_MD5, hdrs.DIGEST,
    "Content-Digest", "Repr-Digest",
)  # fmt: skip
# What aiohttp adds to an answer that does not have it.
AIOHTTP_DEFAULTS = (hdrs.SERVER, hdrs.CONTENT_TYPE)


class UpstreamResponse(web.StreamResponse):
    """fal's answer, not sent yet: `prepare` writes status and headers, then relays the body.

    Until then middleware sees the status and the headers, may add to them, and may ask for the
    body if it is a document.

    on_sent: called once when the relay ends, however it ends, with whether all of it was sent.
    """

    # aiohttp then holds the head back for the body's first bytes; without it, it does so only for
    # its own responses, and a small answer takes two writes.
    _send_headers_immediately = False

    def __init__(self, upstream: Answer) -> None:
        super().__init__(status=upstream.status, reason=upstream.reason)
        self.on_sent: Callable[[bool], None] | None = None
        self._added: list[tuple[str, str]] = []
        self._is_read_into = False  # whether the headers are in `headers`, where they may change
        self._is_sent = False
        self._defaults: list[str] = []
        self._rewrites: list[Rewrite] = []
        self._upstream = upstream
        self._read: list[bytes] = []  # of the body, and not sent yet

    @property
    def said(self) -> CIMultiDictProxy[str]:
        """fal's own headers, all of them, to be looked at."""
        return self._upstream.headers

    @property
    def headers(self) -> CIMultiDict[str]:
        """fal's, without those that are not for the client. Who only adds one uses `add`, which
        costs less: then they are never read."""
        self.read_headers()
        return super().headers

    def read_headers(self) -> None:
        """From now on they are where aiohttp looks for them."""
        if self._is_read_into:
            return
        self._is_read_into = True
        headers = super().headers
        headers.extend(headers_down(self._upstream.raw_headers))
        headers.extend(self._added)
        self._defaults = [name for name in AIOHTTP_DEFAULTS if name not in headers]

    # aiohttp reads both from where it keeps its own headers.

    @property  # type: ignore[misc] # nobody sets fal's
    def content_type(self) -> str:
        self.read_headers()
        return super().content_type

    @property  # type: ignore[misc] # nor its length
    def content_length(self) -> int | None:
        self.read_headers()
        return super().content_length

    def add(self, name: str, value: str) -> None:
        """Another header, beside whatever fal says."""
        if self._is_read_into:
            self.headers.add(name, value)
        else:
            self._added.append((name, value))

    @property
    def is_coded(self) -> bool:
        """Whether the body is compressed, so that nobody here can read it."""
        return self.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity"

    async def document(self, limit: int = DOCUMENT_MAX) -> bytes | None:
        """The body, when it is JSON of at most `limit` bytes that stands there uncoded; None
        leaves a body to be relayed as it is. Raises: ProxyError 502, 504."""
        is_json = JSON_TYPE.match(self.headers.get(hdrs.CONTENT_TYPE, ""))
        return await self.read(limit) if is_json else None

    async def read(self, limit: int) -> bytes | None:
        """As `document`, whatever the body is."""
        if self.is_coded:
            return None
        size = sum(map(len, self._read))
        try:
            while size <= limit and (chunk := await read_chunk(self._upstream)):
                self._read.append(chunk)
                size += len(chunk)
        except BaseException:
            self._upstream.close()  # nobody is going to send this answer any more
            raise
        if size > limit:
            return None
        self._read = [b"".join(self._read)]
        return self._read[0]

    def replace_document(self, body: bytes) -> None:
        """Sends this instead of the document that was read."""
        self._read = [body]
        self._vouch_for_nothing()
        self.headers[hdrs.CONTENT_LENGTH] = str(len(body))

    async def chunk(self) -> bytes:
        """The next bytes of a body that is not relayed. Raises: ProxyError 502, 504."""
        return await read_chunk(self._upstream)

    async def changed(self, lines: bytes) -> bytes:
        """Whole lines of a body that is not relayed, as they would be."""
        return b"".join([piece async for piece in rewritten(lines, self._rewrites)])

    def rewrite_lines(self, rewrite: Rewrite) -> None:
        """Applies it to the lines of a relayed body, such as an event stream's, as they come."""
        self._rewrites.append(rewrite)
        self._vouch_for_nothing()

    def _vouch_for_nothing(self) -> None:
        """Drops what is true of fal's own bytes only."""
        for name in OF_THE_BYTES:
            self.headers.pop(name, None)

    def drop(self) -> None:
        """Gives an answer up that nobody is going to be sent."""
        if not self.prepared:
            self._upstream.close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Sends everything. A body that breaks off on fal's side breaks off on the client's: its
        connection is aborted, so that it never takes a part for the whole."""
        if self.prepared:
            return await super().prepare(request)
        if self._is_plain(request) and (head := self._plain_head(request)):
            await self._send_at_once(request, head)
            return None
        complete = False
        try:
            writer = await self._send_head(request)
            await self._relay()
            complete = True
        except ProxyError as error:
            logger.warning("%s in the body of %s", error.code, request.get(REQUEST_ID))
            abort(request)
            raise ConnectionResetError(error.code) from error
        finally:
            if not complete:
                self._upstream.close()
            if self.on_sent is not None:
                self.on_sent(complete)
        return writer

    async def _send_head(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self.read_headers()
        if request.version < HttpVersion11 and self.content_length is None:
            self.force_close()  # such a client knows the end of the body by this alone
        writer = await super().prepare(request)
        if writer is not None and not self._upstream.is_here:
            writer.send_headers()  # nobody knows when there is more
        super().headers.clear()  # they are out, and the body may be under way for hours
        self._is_read_into = False  # whoever asks for them after all, such as a log, gets fal's
        self._upstream.forget_headers()
        return writer

    @property
    def was_plain(self) -> bool:
        """Whether it went out as it came, all at once."""
        return self._is_sent

    @property
    def added(self) -> tuple[tuple[str, str], ...]:
        """What it has beside fal's headers, as long as nobody has read them."""
        return tuple(self._added)

    @property
    def prepared(self) -> bool:
        return self._is_sent or super().prepared

    @property
    def keep_alive(self) -> bool | None:
        return True if self._is_sent else super().keep_alive

    async def write_eof(self, data: bytes = b"") -> None:
        if not self._is_sent:
            await super().write_eof(data)

    def _is_plain(self, request: web.BaseRequest) -> bool:
        """Whether all of the answer is here, and goes out as it came."""
        untouched = not self._is_read_into and not self._rewrites and not self._read
        if not (untouched and self._upstream.is_here and may_cut_short(request)):
            return False
        return request.keep_alive and request.version == HttpVersion11

    def _plain_head(self, request: web.BaseRequest) -> bytes | None:
        sign = request[SHORT_CUT].sign
        upstream = self._upstream
        added = [*self._added, *sign(request)]
        return plain_head(upstream.status, upstream.reason, upstream.raw_headers, added)

    async def _send_at_once(self, request: web.BaseRequest, head: bytes) -> None:
        """Head and body in one write, past what aiohttp does for answers of which it knows less."""
        transport = request.transport
        complete = False
        try:
            body = await read_chunk(self._upstream)
            if transport is None or transport.is_closing():
                raise ConnectionResetError("The client left")
            transport.write(head + body)
            self._is_sent = complete = True
            if transport.get_write_buffer_size() > BACKLOG_MAX:
                await request.writer.drain()
        finally:
            if self.on_sent is not None:
                self.on_sent(complete)

    async def _relay(self) -> None:
        for chunk in self._read:
            await self.write(chunk)
        if self._rewrites:
            await self._relay_lines()
            await self.write_eof()
            return
        while not self._upstream.is_here:
            await self.write(await read_chunk(self._upstream))
        await self.write_eof(await read_chunk(self._upstream))

    async def _relay_lines(self) -> None:
        """As the relay, by whole lines; one that grows past all measure is let through as it is."""
        rest = bytearray()
        while chunk := await read_chunk(self._upstream):
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
        async for piece in rewritten(lines, self._rewrites):
            await self.write(piece)

    def drop_defaults(self) -> None:
        """Takes out what aiohttp puts in for a handler that forgot it. fal did not."""
        for name in self._defaults:
            self.headers.pop(name, None)


async def forward(request: web.Request) -> UpstreamResponse:
    """Handler: fal's answer to the request's call. Raises: ProxyError 502, 504."""
    in_hand = request.pop(IN_HAND, None)
    if in_hand is None:
        response = UpstreamResponse(await send(request))
    else:
        request[UPSTREAM_SECONDS] = in_hand.seconds
        response = UpstreamResponse(in_hand.answer())
    if not may_cut_short(request):
        response.read_headers()  # whoever looks at it may be somebody who does not know of this
    return response


async def send(request: web.Request) -> Answer:
    started = time.perf_counter()
    try:
        return await request.app[UPSTREAM].send(request[CALL])
    finally:
        request[UPSTREAM_SECONDS] = time.perf_counter() - started
