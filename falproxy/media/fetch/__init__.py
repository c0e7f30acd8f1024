"""The only door to URLs that a user named.

What it cannot know is the address that this machine has on the internet. A URL that leads back
to the proxy on port 80 or 443 arrives there like anybody's GET, with no rights of its own.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Self, TypeVar

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

__all__ = [
    "FETCHER",
    "Download",
    "FetchFailed",
    "FetchRefused",
    "FetchTimeouts",
    "FetchTooLarge",
    "FetchedDigest",
    "Fetcher",
    "UnsupportedUrl",
    "check_url",
    "fetcher_context",
]

logger = logging.getLogger(__name__)

REDIRECTS_MAX = 3
# A download is of what a model made, videos too: it gets so many times as long as an input.
DOWNLOAD_TIMEOUT_FACTOR = 6

T = TypeVar("T")
ReadBody = Callable[[ClientResponse, float], Awaitable[T]]


@dataclass(slots=True)
class SharedFetch:
    """One fetch, and how many wait for it."""

    task: asyncio.Task[FetchedDigest]
    waiter_count: int = 0


class Fetcher:
    """Reads what users name, while it is open. is_allowed: whether an address may be connected
    to. trusted: prefixes of URLs, see `trust`."""

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
        self._shared_fetches: dict[tuple[str, int], SharedFetch] = {}
        self._tasks: set[asyncio.Task[FetchedDigest]] = set()
        # Where a file is that is kept on this machine, whatever its URL calls the machine.
        self.find_local: Callable[[str], Path | None] = lambda url: None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            lookups = ThreadedResolver()
            stack.push_async_callback(lookups.close)
            outside = ssrf_connector(self._resolver or lookups, self._is_allowed)
            self._public_session = await stack.enter_async_context(open_session(outside))
            ours = TCPConnector(limit=MAX_CONNECTIONS, force_close=True)
            self._trusted_session = await stack.enter_async_context(open_session(ours))
            self._exit_stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._exit_stack.aclose()

    def trust(self, prefix: str) -> None:
        """What is below this URL is ours: it is read without the guard, at exactly that host, and
        leads nowhere else."""
        self._trusted_prefixes.append(parse(prefix))

    def is_trusted(self, url: str) -> bool:
        """Whether a URL is ours, as `trust` says."""
        try:
            return self._trusted_prefix(parse(url)) is not None or self.find_local(url) is not None
        except FetchRefused:
            return False

    def check_url(self, url: str) -> None:
        """Raises: FetchRefused."""
        if not self.is_trusted(url):
            self._check_public(url)

    async def fetch_digest(self, url: str, max_bytes: int) -> FetchedDigest:
        """All that is behind a URL, read once for all who ask at the same time, and for as long
        as its host says that it stays. Raises: FetchRefused, FetchTooLarge, FetchFailed."""
        self.check_url(url)
        if (path := self.find_local(url)) is not None:
            return await asyncio.to_thread(read_local, path)
        name = sha256(url.encode()).hexdigest()
        fetched = self._digest_cache.get(name)
        if fetched is None:
            return await self._join_or_start(name, url, max_bytes)
        if fetched.size > max_bytes:
            raise fetch_too_large(max_bytes)
        return fetched

    async def fetch_first_bytes(self, url: str, count: int) -> bytes:
        """The first `count` bytes behind a URL, at least one, or all where there are fewer.
        Raises: FetchRefused, FetchFailed."""
        if (path := self.find_local(url)) is not None:
            return (await asyncio.to_thread(read_local, path)).head[:count]
        return await self._read_with_retries(
            url, partial(read_first_bytes, count), {"Range": f"bytes=0-{count - 1}"}
        )

    async def download(self, url: str, max_bytes: int) -> Download:
        """All that is behind a URL. Raises: FetchRefused, FetchTooLarge, FetchFailed; ProxyError
        503, there is no room for it here."""
        take = partial(read_download, max_bytes)
        return await self._read_with_retries(url, take, {"Accept": "*/*"}, DOWNLOAD_TIMEOUT_FACTOR)

    async def _join_or_start(self, name: str, url: str, max_bytes: int) -> FetchedDigest:
        key = name, max_bytes
        shared = self._shared_fetches.get(key)
        if shared is None:
            task = asyncio.create_task(self._read_digest(name, url, max_bytes))
            self._tasks.add(task)
            task.add_done_callback(self._on_task_done)
            shared = self._shared_fetches[key] = SharedFetch(task)
        shared.waiter_count += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiter_count -= 1
            if not shared.waiter_count:
                shared.task.cancel()
                del self._shared_fetches[key]

    def _on_task_done(self, task: asyncio.Task[FetchedDigest]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # is seen: those who waited may all have just left

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
            logger.info("What a user's URL names was not read: %s", failure)
            raise failure from None

    async def _attempt(
        self, url: str, read_body: ReadBody[T], headers: dict[str, str], seconds: float
    ) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await self._follow_redirects(url, read_body, headers)
        except (ClientError, OSError, ValueError) as error:
            # Not "from error", whose text names the host: a traceback would show it.
            raise (
                private_address() if is_private_address_error(error) else map_fetch_error(error)
            ) from None

    async def _follow_redirects(
        self, url: str, read_body: ReadBody[T], headers: dict[str, str]
    ) -> T:
        """What is at the end of the redirects. Each of them is judged like a user's URL."""
        session, target = self._select_session(url)
        idle = self._timeouts.idle
        timeout = ClientTimeout(total=None, connect=idle, sock_connect=idle, sock_read=idle)
        fresh_for = FRESHNESS_MAX
        for _ in range(REDIRECTS_MAX + 1):
            CHECKED.set([])
            response = await session.get(
                target, headers=headers, allow_redirects=False, timeout=timeout
            )
            try:
                fresh_for = min(fresh_for, freshness(response.headers))
                if response.status not in REDIRECTS or session is self._trusted_session:
                    check_response(response, is_partial="Range" in headers)
                    return await read_body(response, fresh_for)
                target = self._redirect_target(target, response)
            finally:
                response.close()
        raise FetchFailed("The URL leads from one to the next too often.")

    def _redirect_target(self, target: URL, response: ClientResponse) -> URL:
        following = self._check_public(next_url(target, response.headers.get("Location", "")))
        if target.scheme == "https" and following.scheme != "https":
            raise FetchFailed("The URL leads from https to http.", response.status)
        return following

    def _select_session(self, url: str) -> tuple[ClientSession, URL]:
        """The session that reads a URL, and its form on the wire. Raises: FetchRefused."""
        parsed = parse(url)
        if (prefix := self._trusted_prefix(parsed)) is not None:
            return self._trusted_session, with_origin(parsed, prefix)
        return self._public_session, self._check_public(url)

    def _trusted_prefix(self, url: URL) -> URL | None:
        return next((prefix for prefix in self._trusted_prefixes if is_below(url, prefix)), None)

    def _check_public(self, url: str) -> URL:
        return check_url(url, is_allowed=self._is_allowed, ports=self._ports)


def read_local(path: Path) -> FetchedDigest:
    """A file of this machine's. Blocks. Raises: FetchFailed."""
    try:
        content = path.read_bytes()
    except OSError:
        raise FetchFailed("The file is not there any more.") from None
    return FetchedDigest(sha256(content).hexdigest(), len(content), content[:HEAD_MAX], 0.0)


FETCHER = web.AppKey("falproxy.fetcher", Fetcher)


def fetcher_context(fetcher: Fetcher) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the fetcher is open exactly as long as the application lives."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        async with fetcher:
            app[FETCHER] = fetcher
            yield

    return context
