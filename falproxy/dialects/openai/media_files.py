"""Responses that are a file of a result: from this proxy's storage, or as another host sends it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from falproxy.errors import ProxyError, TemporaryError
from falproxy.media.content_type import CONTENT_TYPES, OCTET_STREAM, sniff_content_type
from falproxy.media.fetch import Fetcher, FetchFailed, FetchRefused, FetchTooLarge, RemoteFile
from falproxy.media.image_format import SNIFF_BYTES
from falproxy.media.image_rules import decode_data_uri
from falproxy.spool import Spool
from falproxy.storage_backends import FILES_PATH
from falproxy.stores.files import FILE_NAME, LocalFiles
from falproxy.stores.files.serve import (
    MEDIA_HEADERS,
    ByteRange,
    FileRangeResponse,
    requested_range,
)

DATA_SCHEME = "data:"
LOCAL_MAX = 512 * 2**20  # bytes of a file of the sandbox, which is read at once
FORWARDED_REQUEST_HEADERS: tuple[str, ...] = (hdrs.RANGE, hdrs.IF_RANGE)
FORWARDED_RESPONSE_HEADERS: tuple[str, ...] = (
    hdrs.CONTENT_LENGTH, hdrs.CONTENT_RANGE, hdrs.ETAG, hdrs.LAST_MODIFIED, hdrs.ACCEPT_RANGES,
)  # fmt: skip
# The file belongs to the caller, and must not be executed on this origin. A browser that opens a
# video or a sound makes a document of its own with the file in it.
FILE_HEADERS = {
    "Cache-Control": "private, no-cache",
    "X-Content-Type-Options": "nosniff",
    **MEDIA_HEADERS,
}


class SpoolFiles:
    """A spool as the only file of a `LocalFiles`."""

    def __init__(self, content: Spool) -> None:
        self._content = content

    def size(self, name: str) -> int | None:
        return self._content.size

    def read(self, name: str, start: int, length: int) -> bytes:
        return self._content.read(start, length)


class RelayedFileResponse(web.StreamResponse):
    """A file of another host, sent as it arrives. If the host breaks off, the connection is closed,
    so that the client does not mistake the part for the whole."""

    def __init__(self, remote: RemoteFile, headers: Mapping[str, str]) -> None:
        super().__init__(status=remote.status, headers=headers)
        self._remote = remote

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the whole response."""
        if self.prepared:
            return await super().prepare(request)
        try:
            writer = await super().prepare(request)
            async for chunk in self._remote.chunks():
                await self.write(chunk)
        except FetchFailed as error:
            raise ConnectionResetError("a file ended early") from error
        finally:
            self._remote.close()
        await self.write_eof()
        return writer


@dataclass(frozen=True, slots=True)
class MediaFiles:
    """Sends files. local_files: those that the proxy serves itself; None if there are none."""

    fetcher: Fetcher
    local_files: LocalFiles | None = None

    async def respond(
        self, request: web.Request, url: str, headers: Mapping[str, str] | None = None
    ) -> web.StreamResponse:
        """Return the file at a URL of a result, or the range of it that the request asks for.

        headers: further headers of the response.
        Raises: ProxyError 416, 502, 503.
        """
        all_headers = {**FILE_HEADERS, **(headers or {})}
        try:
            if (name := await asyncio.to_thread(self._local_name, url)) is not None:
                assert self.local_files is not None
                files = self.local_files
                return await asyncio.to_thread(file_response, request, files, name, all_headers)
            if url[: len(DATA_SCHEME)].lower() == DATA_SCHEME:
                content = await asyncio.to_thread(spool_data_uri, url)
                return await spool_response(request, content, all_headers)
            if self.fetcher.find_local(url) is not None:
                download = await self.fetcher.download(url, LOCAL_MAX)
                return await spool_response(request, download.content, all_headers)
            return await self._relay(request, url, all_headers)
        except (FetchRefused, FetchTooLarge) as error:
            raise file_unreadable() from error
        except (FetchFailed, TimeoutError) as error:
            raise file_unavailable() from error

    async def read(self, url: str, max_bytes: int) -> bytes:
        """Return the content of a file. Raises: ProxyError 502."""
        try:
            if (name := await asyncio.to_thread(self._local_name, url)) is not None:
                assert self.local_files is not None
                return await asyncio.to_thread(read_local_file, self.local_files, name, max_bytes)
            if url[: len(DATA_SCHEME)].lower() == DATA_SCHEME:
                content = await asyncio.to_thread(spool_data_uri, url)
            else:
                content = (await self.fetcher.download(url, max_bytes)).content
        except (FetchRefused, FetchTooLarge, OSError) as error:
            raise file_unreadable() from error
        except FetchFailed as error:
            raise file_unavailable() from error
        return b"".join([chunk async for chunk in content.chunks()])

    def _local_name(self, url: str) -> str | None:
        """Return the name of a file that this proxy stores, whatever the host in its URL: equal
        names mean equal bytes. Blocks."""
        _, path, name = url.rpartition(FILES_PATH)
        if self.local_files is None or not path or not FILE_NAME.fullmatch(name):
            return None
        try:
            return None if self.local_files.size(name) is None else name
        except OSError:
            return None

    async def _relay(
        self, request: web.Request, url: str, headers: dict[str, str]
    ) -> web.StreamResponse:
        names = FORWARDED_REQUEST_HEADERS
        sent = {name: request.headers[name] for name in names if name in request.headers}
        remote = await self.fetcher.open_file(url, {"Accept": "*/*", **sent})
        headers |= {
            name: remote.headers[name]
            for name in FORWARDED_RESPONSE_HEADERS
            if name in remote.headers
        }
        if remote.status == web.HTTPRequestRangeNotSatisfiable.status_code:
            remote.close()
            headers.pop(hdrs.CONTENT_LENGTH, None)
            message = "The file has no such bytes."
            raise ProxyError(remote.status, "range_not_satisfiable", message, headers)
        headers[hdrs.CONTENT_TYPE] = safe_type(remote.headers.get(hdrs.CONTENT_TYPE, ""))
        return RelayedFileResponse(remote, headers)


def safe_type(content_type: str) -> str:
    """Return a content type that browsers do not execute."""
    name = content_type.partition(";")[0].strip().lower()
    is_medium = name.startswith(("video/", "audio/")) or name in CONTENT_TYPES.values()
    return name if is_medium else OCTET_STREAM.content_type


def read_local_file(files: LocalFiles, name: str, max_bytes: int) -> bytes:
    """Blocks. Raises: OSError."""
    if (files.size(name) or 0) > max_bytes:
        raise file_unreadable()
    return files.read(name, 0, max_bytes)


def spool_data_uri(url: str) -> Spool:
    return Spool(b"".join(decode_data_uri(url)))


async def spool_response(
    request: web.Request, content: Spool, headers: dict[str, str]
) -> web.StreamResponse:
    head = await asyncio.to_thread(content.read, 0, SNIFF_BYTES)
    digest = await asyncio.to_thread(content.digest)
    name = f"{digest}.{sniff_content_type(head).extension}"
    return file_response(request, SpoolFiles(content), name, headers, content.size)


def file_response(
    request: web.Request,
    files: LocalFiles,
    name: str,
    headers: Mapping[str, str],
    size: int | None = None,
) -> web.StreamResponse:
    """Return a file, or a range of it. name: its digest and an extension. Raises: ProxyError 416,
    503."""
    digest, _, extension = name.partition(".")
    etag = f'"{digest}"'
    size = files.size(name) if size is None else size
    if size is None:
        raise file_unavailable()
    sent = {**headers, hdrs.ETAG: etag, hdrs.ACCEPT_RANGES: "bytes"}
    sent[hdrs.CONTENT_TYPE] = CONTENT_TYPES[extension]
    byte_range = requested_range(request, etag, size)
    if byte_range is None:
        return FileRangeResponse(files, name, ByteRange(0, size), 200, sent)
    sent[hdrs.CONTENT_RANGE] = f"bytes {byte_range.start}-{byte_range.stop - 1}/{size}"
    return FileRangeResponse(files, name, byte_range, 206, sent)


def file_unreadable() -> ProxyError:
    message = "The file was made, but cannot be read from its URL."
    return ProxyError(502, "file_unreadable", message)


def file_unavailable() -> TemporaryError:
    message = "The file was made, but its host does not send it now. Try again."
    return TemporaryError(502, "file_unavailable", message, {hdrs.RETRY_AFTER: "5"})
