"""`/files/`: serves the stored files of a backend such that browsers do not execute them."""

import asyncio
import logging
import os
import re
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Handler

from falproxy.errors import ProxyError, TemporaryError
from falproxy.media.content_type import CONTENT_TYPES
from falproxy.storage_backends import FILES_PATH
from falproxy.stores.files import FILE_CHUNK, FILE_NAME, LocalFiles

logger = logging.getLogger(__name__)

PATH = FILES_PATH + "{name:(?s:.*)}"  # every path below, so that all of them get the same 404
# Sent with every response. The content type is the one that the bytes have, a document has no
# rights on this origin, and any page may embed the file.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "Accept-Ranges, Content-Range, ETag",
}
# A browser that opens a video or a sound makes a document of its own with the file in it.
MEDIA_HEADERS = {"Content-Security-Policy": "default-src 'none'; media-src 'self'; sandbox"}
MEDIA_TYPES = ("video/", "audio/")
IMMUTABLE = {"Cache-Control": "public, max-age=31536000, immutable"}
NO_STORE = {"Cache-Control": "no-store"}  # a missing file may exist a moment later
# A single range of bytes (RFC 9110, section 14.1.2). For all others the whole file is sent, which
# section 14.2 allows.
RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Offsets of the bytes to send; `stop` is exclusive."""

    start: int
    stop: int


class FileRangeResponse(web.StreamResponse):
    """A response with a range of a file, which is read at the speed of the client."""

    def __init__(
        self,
        files: LocalFiles,
        name: str,
        byte_range: ByteRange,
        status: int,
        headers: dict[str, str],
    ) -> None:
        super().__init__(status=status, headers=headers)
        self.content_length = byte_range.stop - byte_range.start
        self._files = files
        self._name = name
        self._byte_range = byte_range

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the whole response. If the file is truncated or deleted meanwhile, the connection
        is closed, so that the client does not mistake the part for the whole."""
        if self.prepared:
            return await super().prepare(request)
        writer = await super().prepare(request)
        if request.method != hdrs.METH_HEAD:
            offset = self._byte_range.start
            while offset < self._byte_range.stop:
                chunk = await self._read_chunk(offset)
                offset += len(chunk)
                await self.write(chunk)
        await self.write_eof()
        return writer

    async def _read_chunk(self, offset: int) -> bytes:
        length = min(FILE_CHUNK, self._byte_range.stop - offset)
        try:
            chunk = await asyncio.to_thread(self._files.read, self._name, offset, length)
        except OSError:
            chunk = b""
        if not chunk:
            raise ConnectionResetError("a file ended early")
        return chunk


def file_handler(files: LocalFiles) -> Handler:
    """Handler for GET and HEAD of PATH. Raises: ProxyError 404, 416, 503."""

    async def serve_file(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        match = FILE_NAME.fullmatch(name)
        size = await file_size(files, name) if match else None
        if match is None or size is None:
            raise ProxyError(
                404, "file_not_found", "There is no such file.", SECURITY_HEADERS | NO_STORE
            )
        digest = match["digest"]
        headers = SECURITY_HEADERS | IMMUTABLE | {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if any(etag.value in (digest, "*") for etag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = CONTENT_TYPES[match["extension"]]
        if headers["Content-Type"].startswith(MEDIA_TYPES):
            headers |= MEDIA_HEADERS
        byte_range = requested_range(request, headers["ETag"], size)
        if byte_range is None:
            return FileRangeResponse(files, name, ByteRange(0, size), 200, headers)
        headers["Content-Range"] = f"bytes {byte_range.start}-{byte_range.stop - 1}/{size}"
        return FileRangeResponse(files, name, byte_range, 206, headers)

    return serve_file


async def file_size(files: LocalFiles, name: str) -> int | None:
    """Return the bytes of a file, None if there is none. Raises: TemporaryError 503."""
    try:
        return await asyncio.to_thread(files.size, name)
    except OSError as error:
        logger.warning("A stored file cannot be read: %s", os.strerror(error.errno or 0))
        headers = SECURITY_HEADERS | NO_STORE | {"Retry-After": "5"}
        message = "The file cannot be read now."
        raise TemporaryError(503, "storage_unavailable", message, headers) from error


def requested_range(request: web.Request, etag: str, size: int) -> ByteRange | None:
    """Return the requested range of a file of `size` bytes, or None for the whole file, also if the
    client holds a part of another file (If-Range).

    Raises: ProxyError 416.
    """
    is_same_file = all(each == etag for each in request.headers.getall(hdrs.IF_RANGE, ()))
    match = RANGE.fullmatch(",".join(request.headers.getall(hdrs.RANGE, ())))
    if request.method != hdrs.METH_GET or not is_same_file or match is None:
        return None
    first, last, suffix_length = match.groups()
    if last and int(last) < int(first):
        return None
    if suffix_length:
        byte_range = ByteRange(max(size - int(suffix_length), 0), size)
    else:
        byte_range = ByteRange(int(first), min(int(last or size) + 1, size))
    if byte_range.start >= byte_range.stop:
        headers = SECURITY_HEADERS | NO_STORE | {"Content-Range": f"bytes */{size}"}
        raise ProxyError(416, "range_not_satisfiable", "The file has no such bytes.", headers)
    return byte_range
