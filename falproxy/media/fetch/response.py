"""What a host answers: whether it will do, and what is taken of it."""

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from hashlib import sha256
from http import HTTPStatus

from aiohttp import (
    ClientConnectorDNSError,
    ClientConnectorError,
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
RETRYABLE_STATUSES = (408, 425, 429)  # of the 4xx, those that another attempt may not get


class FetchTooLarge(Exception):
    """There is more behind the URL than the caller takes."""


class FetchFailed(Exception):
    """What is behind the URL could not be read. status: the answer's, where that was the reason.
    Its text is a sentence for a person and shows neither the URL nor an address."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RetryableFetchError(FetchFailed):
    """A failure that another attempt may not meet."""


ERROR_MAP: tuple[tuple[type[Exception], type[FetchFailed], str], ...] = (
    (ClientSSLError, FetchFailed, "The host of the URL could not prove who it is."),
    (ClientConnectorError, RetryableFetchError, "The host of the URL could not be reached."),
    (TimeoutError, RetryableFetchError, "The host of the URL did not answer in time."),
    (InvalidURL, FetchFailed, "The URL could not be used."),
    (ValueError, FetchFailed, "The URL could not be used."),
    (Exception, RetryableFetchError, "The host of the URL broke off its answer."),
)


@dataclass(frozen=True, slots=True)
class FetchedDigest:
    """What was read. digest: SHA-256 in hexadecimal; size: in bytes; head: the first 256 KiB.
    fresh_for: seconds that the same URL may be taken to have the same bytes."""

    digest: str
    size: int
    head: bytes = field(repr=False)
    fresh_for: float


@dataclass(frozen=True, slots=True)
class Download:
    """What was read, and is held. digest: SHA-256 in hexadecimal."""

    digest: str
    content: Spool


def map_fetch_error(error: Exception) -> FetchFailed:
    """What a failed exchange means."""
    is_unknown = isinstance(error, ClientConnectorDNSError)
    if is_unknown and getattr(error, "errno", None) != socket.EAI_AGAIN:
        return FetchFailed("The host of the URL is not known.")
    return next(failure(why) for kind, failure, why in ERROR_MAP if isinstance(error, kind))


def check_response(response: ClientResponse, *, is_partial: bool) -> None:
    """is_part: whether only the beginning was asked for. Raises: FetchFailed."""
    status = response.status
    is_beginning = is_partial and response.headers.get("Content-Range", "").startswith("bytes 0-")
    if status != HTTPStatus.OK and not (status == HTTPStatus.PARTIAL_CONTENT and is_beginning):
        failure = (
            RetryableFetchError if status >= 500 or status in RETRYABLE_STATUSES else FetchFailed
        )
        raise failure(f"The host of the URL answered {status}.", status)
    codings = response.headers.getall("Content-Encoding", ())
    if any(coding.strip().lower() not in ("", "identity") for coding in codings):
        # Decoding is what makes a bomb of a few bytes, and we asked for none.
        raise FetchFailed("The host of the URL sent it compressed.", status)


def freshness(headers: CIMultiDictProxy[str]) -> float:
    """Seconds that an answer may be used again: only where it says so (RFC 9111, RFC 8246)."""
    lines = headers.getall("Cache-Control", ())
    words = [word.strip().lower().partition("=") for line in lines for word in line.split(",")]
    names = {name for name, _, _ in words}
    if names & {"no-store", "no-cache"}:
        return 0.0
    lifetime = FRESHNESS_MAX if "immutable" in names else 0.0
    ages = [parse_delta_seconds(value) for name, _, value in words if name == "max-age"]
    return max(
        0.0,
        min([*ages, FRESHNESS_MAX] if ages else [lifetime])
        - parse_delta_seconds(headers.get("Age", "")),
    )


def parse_delta_seconds(value: str) -> float:
    value = value.strip(' "')
    return float(value) if value.isascii() and value.isdecimal() else 0.0


async def read_digest(max_bytes: int, response: ClientResponse, fresh_for: float) -> FetchedDigest:
    """All of it, of which only the head is kept. Raises: FetchTooLarge, as early as can be."""
    checksum, size, head = sha256(), 0, bytearray()
    async for chunk in read_limited(response, max_bytes):
        size += len(chunk)
        checksum.update(chunk)
        head += chunk[: HEAD_MAX - len(head)]
    return FetchedDigest(checksum.hexdigest(), size, bytes(head), fresh_for)


async def read_download(max_bytes: int, response: ClientResponse, fresh_for: float) -> Download:
    """All of it, to be read again. Raises: FetchTooLarge, as early as can be; ProxyError 503, there
    is no room for it here."""
    checksum = sha256()

    async def summed() -> AsyncIterator[bytes]:
        async for chunk in read_limited(response, max_bytes):
            checksum.update(chunk)
            yield chunk

    content = await spool_body(summed())
    return Download(checksum.hexdigest(), content)


async def read_limited(response: ClientResponse, max_bytes: int) -> AsyncIterator[bytes]:
    """The body in pieces. Raises: FetchTooLarge, before more than that is given."""
    if (response.content_length or 0) > max_bytes:
        raise fetch_too_large(max_bytes)
    size = 0
    async for chunk in response.content.iter_chunked(CHUNK_SIZE):
        size += len(chunk)
        if size > max_bytes:
            raise fetch_too_large(max_bytes)
        yield chunk


async def read_first_bytes(count: int, response: ClientResponse, fresh_for: float) -> bytes:
    """The first bytes, whether or not the host sends more than was asked for."""
    head = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK_SIZE):
        head += chunk
        if len(head) >= count:
            break
    return bytes(head[:count])


def fetch_too_large(max_bytes: int) -> FetchTooLarge:
    return FetchTooLarge(f"There is more behind the URL than {max_bytes} bytes.")
