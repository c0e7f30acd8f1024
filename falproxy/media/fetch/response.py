"""Checks responses of hosts that users name, and reads their bodies."""

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from hashlib import sha256
from http import HTTPStatus

from aiohttp import (
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSSLError,
    InvalidURL,
)
from multidict import CIMultiDictProxy

from falproxy.spool import Spool, spool_body

CHUNK_SIZE = 64 * 1024
HEAD_MAX = 256 * 1024
FRESHNESS_MAX = 3600.0
REDIRECTS = (301, 302, 303, 307, 308)
RETRYABLE_STATUSES = (408, 425, 429)  # beside all of 5xx


class FetchTooLarge(Exception):
    """The file has more bytes than the caller accepts."""


class FetchFailed(Exception):
    """The file could not be fetched.

    message: a sentence for users, without the URL and IP addresses.
    status: HTTP status if that was the reason, else None.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RetryableFetchError(FetchFailed):
    """A failure after which another attempt may succeed."""


ERROR_MAP: tuple[tuple[type[Exception], type[FetchFailed], str], ...] = (
    (ClientSSLError, FetchFailed, "The host of the URL has no valid certificate."),
    (ClientConnectorError, RetryableFetchError, "The host of the URL could not be reached."),
    (TimeoutError, RetryableFetchError, "The host of the URL did not respond in time."),
    (InvalidURL, FetchFailed, "The URL could not be used."),
    (ValueError, FetchFailed, "The URL could not be used."),
    (Exception, RetryableFetchError, "The host of the URL broke off its response."),
)


@dataclass(frozen=True, slots=True)
class FetchedDigest:
    """The digest of a file.

    digest: SHA-256 in hexadecimal.
    size: bytes.
    head: the first `HEAD_MAX` bytes.
    fresh_for: seconds during which the URL may be assumed to have the same bytes.
    """

    digest: str
    size: int
    head: bytes = field(repr=False)
    fresh_for: float


@dataclass(frozen=True, slots=True)
class Download:
    """A file that was fetched. digest: SHA-256 in hexadecimal."""

    digest: str
    content: Spool


class RemoteFile:
    """A file of another host, or a range of it, which is read as it arrives. Close it.

    status: 200, 206 or 416.
    """

    def __init__(self, response: ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = response.headers

    def __repr__(self) -> str:
        return f"<RemoteFile {self.status}>"

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises: FetchFailed, the host breaks off."""
        try:
            async for chunk in self._response.content.iter_chunked(CHUNK_SIZE):
                yield chunk
        except (ClientError, OSError) as error:
            raise map_fetch_error(error) from None

    def close(self) -> None:
        self._response.close()


def map_fetch_error(error: Exception) -> FetchFailed:
    is_unknown = isinstance(error, ClientConnectorDNSError)
    if is_unknown and getattr(error, "errno", None) != socket.EAI_AGAIN:
        return FetchFailed("The host of the URL is not known.")
    return next(failure(text) for kind, failure, text in ERROR_MAP if isinstance(error, kind))


def check_response(response: ClientResponse, *, is_partial: bool) -> None:
    """Check the status and the encoding of a response.

    is_partial: whether only the beginning was requested.
    Raises: FetchFailed.
    """
    status = response.status
    is_beginning = is_partial and response.headers.get("Content-Range", "").startswith("bytes 0-")
    if status != HTTPStatus.OK and not (status == HTTPStatus.PARTIAL_CONTENT and is_beginning):
        raise unexpected_status(status)
    check_coding(response)


def check_ranged_response(response: ClientResponse) -> None:
    """Check the response to a request for a file or a range of it; 416 is one as well. Raises:
    FetchFailed."""
    status = response.status
    if status not in (200, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
        raise unexpected_status(status)
    check_coding(response)


def unexpected_status(status: int) -> FetchFailed:
    is_temporary = status >= 500 or status in RETRYABLE_STATUSES
    failure = RetryableFetchError if is_temporary else FetchFailed
    return failure(f"The host of the URL responded with status {status}.", status)


def check_coding(response: ClientResponse) -> None:
    """Raises: FetchFailed."""
    codings = response.headers.getall("Content-Encoding", ())
    if any(coding.strip().lower() not in ("", "identity") for coding in codings):
        # A few compressed bytes can expand to gigabytes, and `identity` was requested.
        raise FetchFailed("The host of the URL sent a compressed response.", response.status)


def freshness(headers: CIMultiDictProxy[str]) -> float:
    """Return for how many seconds a response may be reused; 0 unless its headers allow it (RFC
    9111, RFC 8246)."""
    lines = headers.getall("Cache-Control", ())
    directives = [item.strip().lower().partition("=") for line in lines for item in line.split(",")]
    names = {name for name, _, _ in directives}
    if names & {"no-store", "no-cache"}:
        return 0.0
    lifetime = FRESHNESS_MAX if "immutable" in names else 0.0
    ages = [parse_delta_seconds(value) for name, _, value in directives if name == "max-age"]
    return max(
        0.0,
        min([*ages, FRESHNESS_MAX] if ages else [lifetime])
        - parse_delta_seconds(headers.get("Age", "")),
    )


def parse_delta_seconds(value: str) -> float:
    value = value.strip(' "')
    return float(value) if value.isascii() and value.isdecimal() else 0.0


async def read_digest(max_bytes: int, response: ClientResponse, fresh_for: float) -> FetchedDigest:
    """Read a body and keep its head only. Raises: FetchTooLarge."""
    checksum, size, head = sha256(), 0, bytearray()
    async for chunk in read_limited(response, max_bytes):
        size += len(chunk)
        checksum.update(chunk)
        head += chunk[: HEAD_MAX - len(head)]
    return FetchedDigest(checksum.hexdigest(), size, bytes(head), fresh_for)


async def read_download(max_bytes: int, response: ClientResponse, fresh_for: float) -> Download:
    """Read a body into a spool. Raises: FetchTooLarge; ProxyError 503, no room for it here."""
    checksum = sha256()

    async def checksummed_chunks() -> AsyncIterator[bytes]:
        async for chunk in read_limited(response, max_bytes):
            checksum.update(chunk)
            yield chunk

    content = await spool_body(checksummed_chunks())
    return Download(checksum.hexdigest(), content)


async def read_limited(response: ClientResponse, max_bytes: int) -> AsyncIterator[bytes]:
    """Iterate over a body. Raises: FetchTooLarge, before more than `max_bytes` are yielded."""
    if (response.content_length or 0) > max_bytes:
        raise fetch_too_large(max_bytes)
    size = 0
    async for chunk in response.content.iter_chunked(CHUNK_SIZE):
        size += len(chunk)
        if size > max_bytes:
            raise fetch_too_large(max_bytes)
        yield chunk


async def read_first_bytes(count: int, response: ClientResponse, fresh_for: float) -> bytes:
    """Read the first `count` bytes; the host may ignore the requested range and send more."""
    head = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK_SIZE):
        head += chunk
        if len(head) >= count:
            break
    return bytes(head[:count])


def fetch_too_large(max_bytes: int) -> FetchTooLarge:
    return FetchTooLarge(f"The file of the URL has more than {max_bytes} bytes.")
