"""THE FORMULA: send the call to fal, hand the answer back unchanged."""

import logging
import re
import socket
import struct
import time
from collections.abc import Callable

from aiohttp import ClientResponse, HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter

from falproxy.call import CALL, REQUEST_ID, UPSTREAM_SECONDS
from falproxy.errors import ProxyError
from falproxy.headers import headers_down
from falproxy.rewrites import Rewrite, rewritten
from falproxy.upstream import UPSTREAM, read_chunk

logger = logging.getLogger(__name__)

DOCUMENT_MAX = 16 * 2**20  # bytes of JSON that are held to be read or rewritten
LINE_MAX = 4 * 2**20
JSON_TYPE = re.compile(r"application/(?:[\w.-]+\+)?json\b", re.IGNORECASE)
OF_THE_BYTES = (
    hdrs.CONTENT_LENGTH, hdrs.ETAG, hdrs.ACCEPT_RANGES, hdrs.CONTENT_MD5, hdrs.DIGEST,
    "Content-Digest", "Repr-Digest",
)  # fmt: skip
# What aiohttp adds to an answer that does not have it.
AIOHTTP_DEFAULTS = (hdrs.SERVER, hdrs.CONTENT_TYPE)
# `struct linger` switched on with no seconds: closing the socket resets the connection.
LINGER_NOT = struct.pack("ii", 1, 0)


class UpstreamResponse(web.StreamResponse):
    """fal's answer, not sent yet: `prepare` writes status and headers, then relays the body.

    Until then middleware sees the status and the headers, may add to them, and may ask for the
    body if it is a document.

    on_sent: called once when the relay ends, however it ends, with whether all of it was sent.
    """

    def __init__(self, upstream: ClientResponse) -> None:
        super().__init__(
            status=upstream.status,
            reason=upstream.reason,
            headers=headers_down(upstream.raw_headers),
        )
        self.on_sent: Callable[[bool], None] | None = None
        self._rewrites: list[Rewrite] = []
        self._upstream = upstream
        self._read: list[bytes] = []  # of the body, and not sent yet
        self._defaults = [name for name in AIOHTTP_DEFAULTS if name not in self.headers]

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
        self.content_length = len(body)

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
        if request.version < HttpVersion11 and self.content_length is None:
            self.force_close()  # such a client knows the end of the body by this alone
        complete = False
        try:
            writer = await super().prepare(request)
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

    async def _relay(self) -> None:
        for chunk in self._read:
            await self.write(chunk)
        if self._rewrites:
            await self._relay_lines()
        else:
            while chunk := await read_chunk(self._upstream):
                await self.write(chunk)
        await self.write_eof()

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


def abort(request: web.BaseRequest) -> None:
    """Resets the client's connection. Closing it, which is all that asyncio's `abort` does, is an
    orderly end to whoever reads until the end."""
    transport = request.transport
    if transport is None:
        return
    if (connection := transport.get_extra_info("socket")) is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
    transport.abort()


async def forward(request: web.Request) -> UpstreamResponse:
    """Handler: fal's answer to the request's call. Raises: ProxyError 502, 504."""
    started = time.perf_counter()
    try:
        return UpstreamResponse(await request.app[UPSTREAM].send(request[CALL]))
    finally:
        request[UPSTREAM_SECONDS] = time.perf_counter() - started
