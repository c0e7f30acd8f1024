"""`/files/`: the files on this machine's disk, served so that no browser runs them."""

import asyncio
import re
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Handler

from falproxy.errors import ProxyError
from falproxy.media.content_type import CONTENT_TYPES
from falproxy.stores.files.disk import CHUNK, NAME, DiskStorage

PATH = "/files/{name:(?s:.*)}"  # whatever is below, that nobody else answers
# With every answer. Whatever a file is, it is of the type that its bytes tell, and never a page
# with rights on this origin; any other page may show it.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Access-Control-Allow-Origin": "*",
}
IMMUTABLE = {"Cache-Control": "public, max-age=31536000, immutable"}
NO_STORE = {"Cache-Control": "no-store"}  # what is missing now may be there in a moment
# One range of bytes (RFC 9110, section 14.1.2). Any other is answered with the whole file, as the
# section before allows.
RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Which bytes of a file are sent. stop: the first that is not."""

    start: int
    stop: int


class FileRangeResponse(web.StreamResponse):
    """Some or all bytes of a file, read as the client takes them."""

    def __init__(
        self,
        storage: DiskStorage,
        name: str,
        byte_range: ByteRange,
        status: int,
        headers: dict[str, str],
    ) -> None:
        super().__init__(status=status, headers=headers)
        self.content_length = byte_range.stop - byte_range.start
        self._storage = storage
        self._name = name
        self._byte_range = byte_range

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Sends everything. Where the file ends early, or is gone, so does the connection, and
        the client does not take a part for the whole."""
        if self.prepared:
            return await super().prepare(request)
        writer = await super().prepare(request)
        if request.method != hdrs.METH_HEAD:
            at = self._byte_range.start
            while at < self._byte_range.stop:
                chunk = await self._read_chunk(at)
                at += len(chunk)
                await self.write(chunk)
        await self.write_eof()
        return writer

    async def _read_chunk(self, offset: int) -> bytes:
        length = min(CHUNK, self._byte_range.stop - offset)
        try:
            chunk = await asyncio.to_thread(self._storage.read, self._name, offset, length)
        except OSError:
            chunk = b""
        if not chunk:
            raise ConnectionResetError("a file ended early")
        return chunk


def file_handler(storage: DiskStorage) -> Handler:
    """Handler for GET and HEAD of PATH. Raises: ProxyError 404, 416."""

    async def handle(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        parts = NAME.fullmatch(name)
        size = await asyncio.to_thread(storage.size, name) if parts else None
        if parts is None or size is None:
            raise ProxyError(
                404, "file_not_found", "There is no such file.", SECURITY_HEADERS | NO_STORE
            )
        tag = parts["digest"]
        headers = SECURITY_HEADERS | IMMUTABLE | {"ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if any(known.value in (tag, "*") for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = CONTENT_TYPES[parts["extension"]]
        span = requested_range(request, headers["ETag"], size)
        if span is None:
            return FileRangeResponse(storage, name, ByteRange(0, size), 200, headers)
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
        return FileRangeResponse(storage, name, span, 206, headers)

    return handle


def requested_range(request: web.Request, tag: str, size: int) -> ByteRange | None:
    """The part of a file that a request asks for. None: all of it, also for who has a part of
    something else.

    Raises: ProxyError 416.
    """
    is_same = request.headers.get(hdrs.IF_RANGE, tag) == tag
    asked = RANGE.fullmatch(request.headers.get(hdrs.RANGE, ""))
    if request.method != hdrs.METH_GET or not is_same or asked is None:
        return None
    first, last, tail = asked.groups()
    if last and int(last) < int(first):
        return None
    if tail:
        span = ByteRange(max(size - int(tail), 0), size)
    else:
        span = ByteRange(int(first), min(int(last or size) + 1, size))
    if span.start >= span.stop:
        headers = SECURITY_HEADERS | NO_STORE | {"Content-Range": f"bytes */{size}"}
        raise ProxyError(416, "range_not_satisfiable", "The file has no such bytes.", headers)
    return span
