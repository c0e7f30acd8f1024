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
    ASKED,
    CONNECTIONS,
    Lookups,
    guard,
    is_inside,
    open_session,
)
from falproxy.media.fetch.digest_cache import Memo
from falproxy.media.fetch.ip_ranges import is_public
from falproxy.media.fetch.response import (
    FRESH_MAX,
    HEAD_MAX,
    REDIRECTS,
    Download,
    Fetched,
    FetchFailed,
    FetchTooLarge,
    check_answer,
    freshness,
    take_all,
    take_digest,
    take_head,
    too_large,
    translate,
)
from falproxy.media.fetch.timeouts import Pace
from falproxy.media.fetch.urls import (
    PORTS,
    FetchRefused,
    UnreadUrl,
    at_origin,
    check_url,
    is_below,
    next_url,
    parse,
    points_inside,
)

__all__ = [
    "FETCHER",
    "Download",
    "FetchFailed",
    "FetchRefused",
    "FetchTooLarge",
    "Fetched",
    "Fetcher",
    "Pace",
    "UnreadUrl",
    "check_url",
    "open_fetcher",
]

logger = logging.getLogger(__name__)

REDIRECTS_MAX = 3
# A download is of what a model made, videos too: it gets so many times as long as an input.
PATIENCE = 6

T = TypeVar("T")
Take = Callable[[ClientResponse, float], Awaitable[T]]


@dataclass(slots=True)
class SharedFetch:
    """One fetch, and how many wait for it."""

    task: asyncio.Task[Fetched]
    callers: int = 0


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
        pace: Pace | None = None,
    ) -> None:
        self._resolver = resolver
        self._is_allowed = is_allowed
        self._prefixes = [parse(prefix) for prefix in trusted]
        self._ports = ports
        self._pace = pace or Pace()
        self._memo = Memo(self._pace.clock)
        self._shared: dict[tuple[str, int], SharedFetch] = {}
        self._tasks: set[asyncio.Task[Fetched]] = set()
        # Where a file is that is kept on this machine, whatever its URL calls the machine.
        self.find_here: Callable[[str], Path | None] = lambda url: None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            lookups = Lookups()
            stack.push_async_callback(lookups.close)
            outside = guard(self._resolver or lookups, self._is_allowed)
            self._guarded = await stack.enter_async_context(open_session(outside))
            ours = TCPConnector(limit=CONNECTIONS, force_close=True)
            self._unguarded = await stack.enter_async_context(open_session(ours))
            self._opened = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._opened.aclose()

    def trust(self, prefix: str) -> None:
        """What is below this URL is ours: it is read without the guard, at exactly that host, and
        leads nowhere else."""
        self._prefixes.append(parse(prefix))

    def is_trusted(self, url: str) -> bool:
        """Whether a URL is ours, as `trust` says."""
        try:
            return self._prefix_of(parse(url)) is not None or self.find_here(url) is not None
        except FetchRefused:
            return False

    def check_url(self, url: str) -> None:
        """Raises: FetchRefused."""
        if not self.is_trusted(url):
            self._check(url)

    async def digest(self, url: str, max_bytes: int) -> Fetched:
        """All that is behind a URL, read once for all who ask at the same time, and for as long
        as its host says that it stays. Raises: FetchRefused, FetchTooLarge, FetchFailed."""
        self.check_url(url)
        if (path := self.find_here(url)) is not None:
            return await asyncio.to_thread(read_here, path)
        name = sha256(url.encode()).hexdigest()
        fetched = self._memo.find(name)
        if fetched is None:
            return await self._share(name, url, max_bytes)
        if fetched.size > max_bytes:
            raise too_large(max_bytes)
        return fetched

    async def head(self, url: str, count: int) -> bytes:
        """The first `count` bytes behind a URL, at least one, or all where there are fewer.
        Raises: FetchRefused, FetchFailed."""
        if (path := self.find_here(url)) is not None:
            return (await asyncio.to_thread(read_here, path)).head[:count]
        return await self._read(url, partial(take_head, count), {"Range": f"bytes=0-{count - 1}"})

    async def download(self, url: str, max_bytes: int) -> Download:
        """All that is behind a URL. Raises: FetchRefused, FetchTooLarge, FetchFailed; ProxyError
        503, there is no room for it here."""
        take = partial(take_all, max_bytes)
        return await self._read(url, take, {"Accept": "*/*"}, PATIENCE)

    async def _share(self, name: str, url: str, max_bytes: int) -> Fetched:
        key = name, max_bytes
        shared = self._shared.get(key)
        if shared is None:
            task = asyncio.create_task(self._digest(name, url, max_bytes))
            self._tasks.add(task)
            task.add_done_callback(self._land)
            shared = self._shared[key] = SharedFetch(task)
        shared.callers += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.callers -= 1
            if not shared.callers:
                shared.task.cancel()
                del self._shared[key]

    def _land(self, task: asyncio.Task[Fetched]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # is seen: those who waited may all have just left

    async def _digest(self, name: str, url: str, max_bytes: int) -> Fetched:
        fetched = await self._read(url, partial(take_digest, max_bytes), {})
        self._memo.keep(name, fetched)
        return fetched

    async def _read(
        self, url: str, take: Take[T], headers: dict[str, str], patience: float = 1
    ) -> T:
        try:
            async with asyncio.timeout(self._pace.overall * patience):
                total = self._pace.total * patience
                return await self._pace.attempts()(self._attempt, url, take, headers, total)
        except (FetchFailed, TimeoutError) as error:
            failure = error if isinstance(error, FetchFailed) else translate(error)
            logger.info("What a user's URL names was not read: %s", failure)
            raise failure from None

    async def _attempt(self, url: str, take: Take[T], headers: dict[str, str], seconds: float) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await self._follow(url, take, headers)
        except (ClientError, OSError, ValueError) as error:
            # Not "from error", whose text names the host: a traceback would show it.
            raise (points_inside() if is_inside(error) else translate(error)) from None

    async def _follow(self, url: str, take: Take[T], headers: dict[str, str]) -> T:
        """What is at the end of the redirects. Each of them is judged like a user's URL."""
        session, target = self._find(url)
        idle = self._pace.idle
        timeout = ClientTimeout(total=None, connect=idle, sock_connect=idle, sock_read=idle)
        fresh_for = FRESH_MAX
        for _ in range(REDIRECTS_MAX + 1):
            ASKED.set([])
            response = await session.get(
                target, headers=headers, allow_redirects=False, timeout=timeout
            )
            try:
                fresh_for = min(fresh_for, freshness(response.headers))
                if response.status not in REDIRECTS or session is self._unguarded:
                    check_answer(response, is_part="Range" in headers)
                    return await take(response, fresh_for)
                target = self._follow_to(target, response)
            finally:
                response.close()
        raise FetchFailed("The URL leads from one to the next too often.")

    def _follow_to(self, target: URL, response: ClientResponse) -> URL:
        following = self._check(next_url(target, response.headers.get("Location", "")))
        if target.scheme == "https" and following.scheme != "https":
            raise FetchFailed("The URL leads from https to http.", response.status)
        return following

    def _find(self, url: str) -> tuple[ClientSession, URL]:
        """The session that reads a URL, and its form on the wire. Raises: FetchRefused."""
        parsed = parse(url)
        if (prefix := self._prefix_of(parsed)) is not None:
            return self._unguarded, at_origin(parsed, prefix)
        return self._guarded, self._check(url)

    def _prefix_of(self, url: URL) -> URL | None:
        return next((prefix for prefix in self._prefixes if is_below(url, prefix)), None)

    def _check(self, url: str) -> URL:
        return check_url(url, is_allowed=self._is_allowed, ports=self._ports)


def read_here(path: Path) -> Fetched:
    """A file of this machine's. Blocks. Raises: FetchFailed."""
    try:
        content = path.read_bytes()
    except OSError:
        raise FetchFailed("The file is not there any more.") from None
    return Fetched(sha256(content).hexdigest(), len(content), content[:HEAD_MAX], 0.0)


FETCHER = web.AppKey("falproxy.fetcher", Fetcher)


def open_fetcher(fetcher: Fetcher) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the fetcher is open exactly as long as the application lives."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        async with fetcher:
            app[FETCHER] = fetcher
            yield

    return context
