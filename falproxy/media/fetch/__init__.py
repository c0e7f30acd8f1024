"""Fetches the URLs that users name. No other module opens such URLs.

Private addresses are refused (SSRF). The public address of this machine is not known here: a URL
of the proxy itself on port 80 or 443 is fetched like any other, by a GET without credentials.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from aiohttp.abc import AbstractResolver
from yarl import URL

from falproxy.media.fetch.connector import (
    CHECKED,
    MAX_CONNECTIONS,
    ThreadedResolver,
    is_private_address_error,
    open_session,
    ssrf_connector,
)
from falproxy.media.fetch.digest_cache import DigestCache
from falproxy.media.fetch.ip_ranges import is_public
from falproxy.media.fetch.response import (
    FRESHNESS_MAX,
    HEAD_MAX,
    REDIRECTS,
    Download,
    FetchedDigest,
    FetchFailed,
    FetchTooLarge,
    RemoteFile,
    check_ranged_response,
    check_response,
    fetch_too_large,
    freshness,
    map_fetch_error,
    read_digest,
    read_download,
    read_first_bytes,
)
from falproxy.media.fetch.timeouts import FetchTimeouts
from falproxy.media.fetch.urls import (
    PORTS,
    FetchRefused,
    UnsupportedUrl,
    check_url,
    is_below,
    next_url,
    parse,
    private_address,
    with_origin,
)
from falproxy.shared_tasks import SharedTasks
from falproxy.spans import client_span
from falproxy.spool import Spool

__all__ = [
    "FETCHER",
    "Download",
    "FetchFailed",
    "FetchRefused",
    "FetchTimeouts",
    "FetchTooLarge",
    "FetchedDigest",
    "Fetcher",
    "RemoteFile",
    "UnsupportedUrl",
    "check_url",
    "fetcher_context",
]

logger = logging.getLogger(__name__)

REDIRECTS_MAX = 3
# Outputs, such as videos, are larger than inputs: factor for the time-outs of a download.
DOWNLOAD_TIMEOUT_FACTOR = 6

T = TypeVar("T")
ReadBody = Callable[[ClientResponse, float], Awaitable[T]]


class LocalFile(NamedTuple):
    """A file on this machine, read completely."""

    fetched: FetchedDigest
    content: bytes


class Fetcher:
    """Fetches URLs while it is open.

    resolver: for host names; None for the system's.
    is_allowed: Returns whether an IP address may be connected to.
    trusted: URL prefixes, see `trust`.
    ports: ports that URLs may have.
    """

    def __init__(
        self,
        *,
        resolver: AbstractResolver | None = None,
        is_allowed: Callable[[str], bool] = is_public,
        trusted: Collection[str] = (),
        ports: Collection[int] = PORTS,
        timeouts: FetchTimeouts | None = None,
    ) -> None:
        self._resolver = resolver
        self._is_allowed = is_allowed
        self._trusted_prefixes = [parse(prefix) for prefix in trusted]
        self._ports = ports
        self._timeouts = timeouts or FetchTimeouts()
        self._digest_cache = DigestCache(self._timeouts.clock)
        self._shared_fetches: SharedTasks[tuple[str, int], FetchedDigest] = SharedTasks(
            cancel_unused=True
        )
        # Returns the path of a file on this machine, whatever the host in its URL. It is read
        # directly: this machine may not reach its own public address.
        self.find_local: Callable[[str], Path | None] = lambda url: None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            resolver = ThreadedResolver()
            stack.push_async_callback(resolver.close)
            public = ssrf_connector(self._resolver or resolver, self._is_allowed)
            self._public_session = await stack.enter_async_context(open_session(public))
            trusted = TCPConnector(limit=MAX_CONNECTIONS, force_close=True)
            self._trusted_session = await stack.enter_async_context(open_session(trusted))
            self._exit_stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._shared_fetches.close()
        await self._exit_stack.aclose()

    def __repr__(self) -> str:
        return f"<Fetcher {len(self._shared_fetches)} shared fetches>"

    def trust(self, prefix: str) -> None:
        """Trust the URLs below a prefix: they are fetched from exactly that host, without the check
        for private addresses and without redirects."""
        self._trusted_prefixes.append(parse(prefix))

    def is_trusted(self, url: str) -> bool:
        try:
            return self._trusted_prefix(parse(url)) is not None or self.find_local(url) is not None
        except FetchRefused:
            return False

    def check_url(self, url: str) -> None:
        """Check a URL by its text alone. Raises: FetchRefused."""
        if not self.is_trusted(url):
            self._check_public(url)

    async def fetch_digest(self, url: str, max_bytes: int) -> FetchedDigest:
        """Return the digest of a file. Concurrent callers share one fetch, and the digest is cached
        as long as the host's Cache-Control allows.

        Raises: FetchRefused, FetchTooLarge, FetchFailed.
        """
        self.check_url(url)
        if (path := self.find_local(url)) is not None:
            return (await asyncio.to_thread(read_local, path, max_bytes)).fetched
        name = sha256(url.encode()).hexdigest()
        fetched = self._digest_cache.get(name)
        if fetched is None:
            return await self._shared_fetches.run(
                (name, max_bytes), partial(self._read_digest, name, url, max_bytes)
            )
        if fetched.size > max_bytes:
            raise fetch_too_large(max_bytes)
        return fetched

    async def fetch_first_bytes(self, url: str, count: int) -> bytes:
        """Return the first `count` bytes of a file, or all if it has fewer.

        Raises: FetchRefused, FetchFailed.
        """
        if (path := self.find_local(url)) is not None:
            return await asyncio.to_thread(read_local_head, path, count)
        return await self._read_with_retries(
            url, partial(read_first_bytes, count), {"Range": f"bytes=0-{count - 1}"}
        )

    async def download(self, url: str, max_bytes: int) -> Download:
        """Download a whole file.

        Raises: FetchRefused, FetchTooLarge, FetchFailed; ProxyError 503, no room for it here.
        """
        if (path := self.find_local(url)) is not None:
            local = await asyncio.to_thread(read_local, path, max_bytes)
            return Download(local.fetched.digest, Spool(local.content))
        read_body = partial(read_download, max_bytes)
        return await self._read_with_retries(
            url, read_body, {"Accept": "*/*"}, DOWNLOAD_TIMEOUT_FACTOR
        )

    async def open_file(self, url: str, headers: Mapping[str, str]) -> RemoteFile:
        """Request a file, or the range of it that the headers name, to be read as it arrives. One
        attempt is made. The file on this machine, if the URL has one, is to be read by `download`.

        Raises: FetchRefused, FetchFailed.
        """
        try:
            async with asyncio.timeout(self._timeouts.per_attempt):
                response, _ = await self._follow_redirects(url, headers)
        except (ClientError, OSError, ValueError) as error:
            raise without_host(error) from None
        try:
            check_ranged_response(response)
        except FetchFailed:
            response.close()
            raise
        return RemoteFile(response)

    async def _read_digest(self, name: str, url: str, max_bytes: int) -> FetchedDigest:
        fetched = await self._read_with_retries(url, partial(read_digest, max_bytes), {})
        self._digest_cache.put(name, fetched)
        return fetched

    async def _read_with_retries(
        self, url: str, read_body: ReadBody[T], headers: dict[str, str], timeout_factor: float = 1
    ) -> T:
        try:
            async with asyncio.timeout(self._timeouts.overall * timeout_factor):
                total = self._timeouts.per_attempt * timeout_factor
                return await self._timeouts.retrying()(
                    self._attempt, url, read_body, headers, total
                )
        except (FetchFailed, TimeoutError) as error:
            failure = error if isinstance(error, FetchFailed) else map_fetch_error(error)
            logger.info("A URL of a user was not fetched: %s", failure)
            raise failure from None

    async def _attempt(
        self, url: str, read_body: ReadBody[T], headers: dict[str, str], seconds: float
    ) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await self._read_response(url, read_body, headers)
        except (ClientError, OSError, ValueError) as error:
            raise without_host(error) from None

    async def _read_response(self, url: str, read_body: ReadBody[T], headers: dict[str, str]) -> T:
        response, fresh_for = await self._follow_redirects(url, headers)
        try:
            check_response(response, is_partial="Range" in headers)
            return await read_body(response, fresh_for)
        finally:
            response.close()

    async def _follow_redirects(
        self, url: str, headers: Mapping[str, str]
    ) -> tuple[ClientResponse, float]:
        """Return the response at the end of the redirects, and the seconds during which it may be
        assumed to stay the same. Each redirect is checked like a user's URL."""
        session, target = self._select_session(url)
        idle = self._timeouts.idle
        timeout = ClientTimeout(total=None, connect=idle, sock_connect=idle, sock_read=idle)
        fresh_for = FRESHNESS_MAX
        for _ in range(REDIRECTS_MAX + 1):
            CHECKED.set([])
            with client_span("image_host", "GET", target.host or "") as span:
                response = await session.get(
                    target, headers=headers, allow_redirects=False, timeout=timeout
                )
                span.set_status(response.status)
            fresh_for = min(fresh_for, freshness(response.headers))
            if response.status not in REDIRECTS or session is self._trusted_session:
                return response, fresh_for
            try:
                target = self._redirect_target(target, response)
            finally:
                response.close()
        raise FetchFailed("The URL has too many redirects.")

    def _redirect_target(self, target: URL, response: ClientResponse) -> URL:
        following = self._check_public(next_url(target, response.headers.get("Location", "")))
        if target.scheme == "https" and following.scheme != "https":
            raise FetchFailed("The URL redirects from https to http.", response.status)
        return following

    def _select_session(self, url: str) -> tuple[ClientSession, URL]:
        """Return the session for a URL, and the URL to request. Raises: FetchRefused."""
        parsed = parse(url)
        if (prefix := self._trusted_prefix(parsed)) is not None:
            return self._trusted_session, with_origin(parsed, prefix)
        return self._public_session, self._check_public(url)

    def _trusted_prefix(self, url: URL) -> URL | None:
        return next((prefix for prefix in self._trusted_prefixes if is_below(url, prefix)), None)

    def _check_public(self, url: str) -> URL:
        return check_url(url, is_allowed=self._is_allowed, ports=self._ports)


def without_host(error: Exception) -> FetchFailed | FetchRefused:
    """Return the failure for an error. It is raised without its cause, whose text has the host: a
    traceback would show it."""
    return private_address() if is_private_address_error(error) else map_fetch_error(error)


def read_local(path: Path, max_bytes: int) -> LocalFile:
    """Read a file on this machine. Blocks. Raises: FetchFailed, FetchTooLarge."""
    try:
        content = path.read_bytes()
    except OSError:
        raise FetchFailed("The file does not exist any more.") from None
    if len(content) > max_bytes:
        raise fetch_too_large(max_bytes)
    head = content[:HEAD_MAX]
    return LocalFile(FetchedDigest(sha256(content).hexdigest(), len(content), head, 0.0), content)


def read_local_head(path: Path, count: int) -> bytes:
    """Read the beginning of a file on this machine. Blocks. Raises: FetchFailed."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        raise FetchFailed("The file does not exist any more.") from None


FETCHER = web.AppKey("falproxy.fetcher", Fetcher)


def fetcher_context(fetcher: Fetcher) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the fetcher is open as long as the application runs."""

    async def open_fetcher(app: web.Application) -> AsyncIterator[None]:
        async with fetcher:
            app[FETCHER] = fetcher
            yield

    return open_fetcher
