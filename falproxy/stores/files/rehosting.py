"""Outputs that are kept: the files that fal's documents name are stored, each once, and the
documents name them where they are then."""

import asyncio
import logging
import re
import time
from collections import Counter, OrderedDict
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from aiohttp import web

from falproxy.concurrency import offload
from falproxy.errors import ProxyError, SettingsError
from falproxy.fal.file_urls import distinct_urls, is_fal_file, replace_links
from falproxy.media.content_type import sniff_content_type
from falproxy.media.fetch import Download, Fetcher, FetchFailed, FetchRefused, FetchTooLarge
from falproxy.media.image_format import SNIFF_BYTES
from falproxy.spool import Spool
from falproxy.stores.files import RejectedFileError, Storage, StorageError, StoredFile
from falproxy.stores.files.disk import NAME

logger = logging.getLogger(__name__)

SIZE_MAX = 100 * 2**20  # bytes of a file; a larger one is left with fal
LINKS_MAX = 100  # files of one document
MAX_CONCURRENCY = 8  # files on their way
QUEUE_MAX = 10_000  # and files that wait for their turn
# Seconds that an answer waits for its files. What takes longer goes on, for the next who asks;
# while nothing can be stored nobody waits for long.
WAIT_TIMEOUT, SHORT_WAIT_TIMEOUT = 30.0, 1.0
RENEWAL_TIMEOUT = 5.0  # seconds that addresses have to be signed anew
# How many addresses of fal's are remembered, with where their files are, and for how many seconds.
URL_CACHE_SIZE, URL_CACHE_TTL = 10_000, 3600.0
RETRY_INTERVAL = 5.0  # seconds between two tries with a storage that is away
FAILURE_TTL = (
    5.0  # seconds that nobody waits for a file which just could not be read, or not be taken
)
# What a document says while it is kept where only the request can tell the proxy's own address.
LOCAL_ORIGIN = "https://falproxy.invalid"
LOCAL_FILE_URL = re.compile(rf"{re.escape(LOCAL_ORIGIN)}/files/{NAME.pattern}")


class RehostStatus(StrEnum):
    """What became of a file, the worst first."""

    FAILED = "failed"
    PENDING = "pending"  # it is still on its way
    TOO_LARGE = "too-large"
    STORED = "stored"


class Rewritten(NamedTuple):
    """A document with the addresses of stored files, and how many files had which fate."""

    document: bytes
    statuses: Counter[RehostStatus]


def status_header(statuses: Counter[RehostStatus]) -> str:
    """As a header says it (a list by RFC 9651): `failed`, `too-large, stored; count=2`."""
    words = [fate for fate in RehostStatus if statuses[fate] and fate is not RehostStatus.STORED]
    kept = (
        [f"{RehostStatus.STORED}; count={statuses[RehostStatus.STORED]}"]
        if statuses[RehostStatus.STORED]
        else []
    )
    return ", ".join([*words, *kept])


class Rehoster:
    """The files of one process on their way from fal into a storage.

    own: prefixes of addresses where stored files are. A file that is asked for by many is fetched
    and stored once, and goes on when all of them have left.
    """

    def __init__(
        self,
        storage: Storage,
        fetcher: Fetcher,
        *,
        rehosted_prefixes: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.storage = storage
        self._fetcher = fetcher
        self._rehosted_prefixes = tuple(rehosted_prefixes)
        self._clock = clock
        self._slots = asyncio.Semaphore(MAX_CONCURRENCY)
        self._transfers: dict[str, asyncio.Task[str | RehostStatus]] = {}
        self._url_cache: OrderedDict[str, tuple[str | RehostStatus, float]] = OrderedDict()
        self._renewals: dict[str, asyncio.Task[str]] = {}
        self._active_puts = 0  # files that the storage has now
        self._stored_count = 0  # how many, ever
        self._is_storage_down = False  # whether the last file could not be stored
        self._next_try_at = 0.0
        self._draining = asyncio.Event()  # the process is about to end

    async def rewrite(self, document: bytes) -> Rewritten:
        """The document with its files stored, as far as that can be done while somebody waits."""
        sources = await offload(document, partial(self._find_sources, document))
        ends = await self._rehost_urls(sources)
        urls = {url: end for url, end in ends.items() if not isinstance(end, RehostStatus)}
        renewed = await self.fresh_urls(urls.values())
        urls = {url: renewed.get(end, end) for url, end in urls.items()}
        fates = Counter(
            end if isinstance(end, RehostStatus) else RehostStatus.STORED for end in ends.values()
        )
        return Rewritten(await replace_urls(document, urls), fates)

    async def localize(self, document: bytes, base_url: str) -> bytes:
        """The document as it is given out, with the proxy's own address as the client sees it.
        here: what its path `/files/` is put behind."""
        links = await offload(document, partial(distinct_urls, document))
        urls = {
            url: base_url + url.removeprefix(LOCAL_ORIGIN)
            for url in links
            if LOCAL_FILE_URL.fullmatch(url)
        }
        return await replace_urls(document, urls)

    def start_draining(self, delay: float) -> None:
        """In so many seconds answers wait for their files no longer: the process is to end."""
        asyncio.get_running_loop().call_later(delay, self._draining.set)

    def try_now(self) -> bool:
        """Return whether to try the storage. False while it is down; every `RETRY_INTERVAL` seconds
        one caller gets True and acts as the probe."""
        if self._is_storage_down and self._clock() < self._next_try_at:
            return False
        self._next_try_at = self._clock() + RETRY_INTERVAL
        return True

    async def store(self, content: Spool) -> str:
        """The address of something that did not come from fal, such as an input, once it is
        stored. Raises: StorageError."""
        return await self._put(Download(await asyncio.to_thread(content.digest), content))

    async def close(self, grace_period: float) -> None:
        """Lets what is on its way arrive within so many seconds."""
        flights = tuple(self._transfers.values())
        if flights:
            await asyncio.wait(flights, timeout=grace_period)
        left = (*flights, *self._renewals.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _rehost_urls(self, urls: Sequence[str]) -> dict[str, str | RehostStatus]:
        """Each of these addresses with where its file is now, or why it is not."""
        ends: dict[str, str | RehostStatus] = dict.fromkeys(urls, RehostStatus.FAILED)
        flights: dict[str, asyncio.Task[str | RehostStatus]] = {}
        for url in urls:
            if (known := self._cached_outcome(url)) is not None:
                ends[url] = known
            elif len(flights) < LINKS_MAX and (flight := self._start_transfer(url)) is not None:
                flights[url] = flight
        if flights:
            await self._wait_for_transfers(flights.values())
        return ends | {url: transfer_outcome(flight) for url, flight in flights.items()}

    def _find_sources(self, document: bytes) -> list[str]:
        return [url for url in distinct_urls(document) if self._is_source(url)]

    def _is_source(self, url: str) -> bool:
        """Whether a file is with fal, or with the sandbox that plays it."""
        return is_fal_file(url) or (
            not url.startswith(self._rehosted_prefixes) and self._fetcher.is_trusted(url)
        )

    async def _wait_for_transfers(
        self, transfers: Collection[asyncio.Task[str | RehostStatus]]
    ) -> None:
        """Returns when all have arrived, or it has been long enough."""
        stored = self._stored_count
        patience = SHORT_WAIT_TIMEOUT if self._is_storage_down else WAIT_TIMEOUT
        hurry = asyncio.get_running_loop().create_task(self._draining.wait())
        arrived = asyncio.gather(*transfers, return_exceptions=True)
        try:
            await asyncio.wait(
                (hurry, arrived), timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            hurry.cancel()
        is_late = not arrived.done() and not self._draining.is_set()
        if (
            is_late
            and patience >= WAIT_TIMEOUT
            and self._active_puts
            and self._stored_count == stored
        ):
            self._is_storage_down = True

    def _start_transfer(self, url: str) -> asyncio.Task[str | RehostStatus] | None:
        """The file's flight, which begins now if there is none. None: there are too many."""
        if (flight := self._transfers.get(url)) is not None:
            return flight
        if len(self._transfers) >= MAX_CONCURRENCY + QUEUE_MAX:
            return None
        flight = self._transfers[url] = asyncio.get_running_loop().create_task(self._transfer(url))
        flight.add_done_callback(partial(self._on_transfer_done, url))
        return flight

    def _on_transfer_done(self, url: str, transfer: asyncio.Task[str | RehostStatus]) -> None:
        del self._transfers[url]
        if not transfer.cancelled() and (error := transfer.exception()) is not None:
            logger.error("An output was not stored, by our fault", exc_info=error)

    async def _transfer(self, url: str) -> str | RehostStatus:
        """Where the file is now, or why it is not."""
        kept = URL_CACHE_TTL
        async with self._slots:
            try:
                end: str | RehostStatus = await self._put(
                    await self._fetcher.download(url, SIZE_MAX)
                )
            except FetchTooLarge:
                logger.warning("An output stays with fal: it has more than %d bytes", SIZE_MAX)
                end = RehostStatus.TOO_LARGE
            except (FetchRefused, FetchFailed, StorageError, ProxyError) as error:
                logger.warning("An output was not stored: %s", error)
                end = RehostStatus.FAILED
                kept = failure_ttl(error)
                self._is_storage_down |= isinstance(error, StorageError) and not kept
        if kept:
            self._url_cache[url] = end, self._clock() + kept
        if len(self._url_cache) > URL_CACHE_SIZE:
            self._url_cache.popitem(last=False)
        return end

    async def _put(self, file: Download) -> str:
        """Raises: StorageError."""
        extension, content_type = sniff_content_type(
            await asyncio.to_thread(file.content.read, 0, SNIFF_BYTES)
        )
        name = f"{file.digest}.{extension}"
        self._active_puts += 1
        try:
            url = await self.storage.put(StoredFile(name, content_type, file.content))
        finally:
            self._active_puts -= 1
        self._stored_count += 1
        self._is_storage_down = False
        return url

    def _cached_outcome(self, url: str) -> str | RehostStatus | None:
        end, until = self._url_cache.get(url, (None, 0.0))
        return end if self._clock() < until else None

    async def fresh_urls(self, urls: Iterable[str]) -> dict[str, str]:
        """Good addresses for those that pass, as far as they can be had soon. Each is signed once
        for all who ask at the same time."""
        passing = [url for url in urls if self.storage.is_expiring(url)]
        tasks = {url: self._start_renewal(url) for url in passing[:LINKS_MAX]}
        if not tasks:
            return {}
        await asyncio.wait(tasks.values(), timeout=RENEWAL_TIMEOUT)
        return {
            url: task.result()
            for url, task in tasks.items()
            if task.done() and not task.cancelled() and task.exception() is None
        }

    def _start_renewal(self, url: str) -> asyncio.Task[str]:
        if (task := self._renewals.get(url)) is None:
            task = asyncio.get_running_loop().create_task(self.storage.renew_url(url))
            self._renewals[url] = task
            task.add_done_callback(partial(self._on_renewal_done, url))
        return task

    def _on_renewal_done(self, url: str, task: asyncio.Task[str]) -> None:
        del self._renewals[url]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("A stored file's address was not renewed: %s", error)


def failure_ttl(error: Exception) -> float:
    """How long it is of no use to try again. 0 where it may be mended at any moment."""
    is_of_the_file = isinstance(error, RejectedFileError | FetchRefused | FetchFailed)
    return FAILURE_TTL if is_of_the_file else 0.0


async def replace_urls(document: bytes, urls: Mapping[str, str]) -> bytes:
    return await offload(document, partial(replace_links, document, urls)) if urls else document


def transfer_outcome(transfer: asyncio.Task[str | RehostStatus]) -> str | RehostStatus:
    if not transfer.done():
        return RehostStatus.PENDING
    failed = transfer.cancelled() or transfer.exception() is not None
    return RehostStatus.FAILED if failed else transfer.result()


def rehoster_context(
    rehoster: Rehoster, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the storage is open exactly as long as the application. At the end, files
    on their way have so many seconds to arrive."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        try:
            await rehoster.storage.__aenter__()
        except StorageError as error:
            raise SettingsError(f"Outputs cannot be kept: {error}") from error
        try:
            yield
            await rehoster.close(grace_period)
        finally:
            await rehoster.storage.__aexit__(None, None, None)

    return context
