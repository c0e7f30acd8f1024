"""Re-hosting of outputs: stores the files that fal's documents name and rewrites their URLs."""

import asyncio
import logging
import re
import time
from collections import Counter
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
from cachetools import TLRUCache

from falproxy.background import time_left
from falproxy.circuit_breaker import CircuitBreaker
from falproxy.concurrency import offload
from falproxy.errors import ProxyError, SettingsError
from falproxy.fal.file_urls import distinct_urls, is_fal_file, replace_links
from falproxy.media.content_type import sniff_content_type
from falproxy.media.fetch import Download, Fetcher, FetchFailed, FetchRefused, FetchTooLarge
from falproxy.media.image_format import SNIFF_BYTES
from falproxy.shared_tasks import SharedTasks
from falproxy.spool import Spool
from falproxy.storage_backends import FILES_PATH
from falproxy.stores.files import (
    FILE_NAME,
    LOCAL_ORIGIN,
    RejectedFileError,
    Storage,
    StorageError,
    StoredFile,
)

logger = logging.getLogger(__name__)

SIZE_MAX = 100 * 2**20  # bytes of a file; larger ones stay with fal
LINKS_MAX = 100  # files of one document
MAX_CONCURRENCY = 8  # transfers at once
QUEUE_MAX = 10_000  # transfers that wait for a slot
# Seconds that a response waits for its files, the second while the storage is down. A transfer that
# takes longer continues in the background, for later requests.
WAIT_TIMEOUT, SHORT_WAIT_TIMEOUT = 30.0, 1.0
RENEWAL_TIMEOUT = 5.0  # seconds to wait for renewed signed URLs
# Entries of the cache from fal's URLs to the outcomes of their transfers, and seconds in it.
URL_CACHE_SIZE, URL_CACHE_TTL = 10_000, 3600.0
CACHED_URLS_LENGTH_MAX = 2048  # characters of both URLs of an entry
RETRY_INTERVAL = 5.0  # seconds between two probes of a storage that is down
FAILURE_TTL = 5.0  # seconds before a file is tried again that was unreadable or rejected
STORED_FILE = re.compile(rf"{re.escape(FILES_PATH)}{FILE_NAME.pattern}\Z")
LOCAL_FILE_URL = re.compile(rf"{re.escape(LOCAL_ORIGIN + FILES_PATH)}{FILE_NAME.pattern}")


class RehostStatus(StrEnum):
    """The outcome of a transfer, in the order in which the header lists them."""

    FAILED = "failed"
    PENDING = "pending"  # the transfer is running
    TOO_LARGE = "too-large"
    STORED = "stored"


TransferOutcome = str | RehostStatus  # the URL of a stored file, or why there is none
Transfer = asyncio.Task[TransferOutcome]


class CachedOutcome(NamedTuple):
    """An entry of the URL cache. ttl: seconds."""

    outcome: TransferOutcome
    ttl: float


class Rewritten(NamedTuple):
    """A document with the URLs of stored files, and the number of files for each status."""

    document: bytes
    statuses: Counter[RehostStatus]


def status_header(statuses: Counter[RehostStatus]) -> str:
    """Return the header value (a list by RFC 9651): `failed`, `too-large, stored; count=2`."""
    items = [
        f"{status}; count={statuses[status]}" if status is RehostStatus.STORED else str(status)
        for status in RehostStatus
        if statuses[status]
    ]
    return ", ".join(items)


def expires_at(url: str, cached: CachedOutcome, now: float) -> float:
    return now + cached.ttl


class Rehoster:
    """Transfers files from fal to a storage.

    Concurrent requests for the same file share one transfer, which continues when they are gone.

    rehosted_prefixes: prefixes of the URLs of files that are stored already.
    clock: a monotonic clock in seconds.
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
        self._slots = asyncio.Semaphore(MAX_CONCURRENCY)
        self._transfers: SharedTasks[str, TransferOutcome] = SharedTasks()
        self._renewals: SharedTasks[str, str] = SharedTasks()
        self._url_cache: TLRUCache[str, CachedOutcome] = TLRUCache(
            URL_CACHE_SIZE, ttu=expires_at, timer=clock
        )
        self._breaker = CircuitBreaker(RETRY_INTERVAL, clock)
        self._active_puts = 0
        self._stored_count = 0  # files stored since the start
        self._draining = asyncio.Event()  # the process is about to end

    def __repr__(self) -> str:
        return (
            f"<Rehoster {self.storage!r}, {len(self._transfers)} transfers, "
            f"{self._stored_count} stored, {self._breaker!r}>"
        )

    async def rewrite(self, document: bytes) -> Rewritten:
        """Store the files that a document names, as far as possible within the time-out, and
        return the document with their new URLs."""
        sources = await offload(document, partial(self._find_sources, document))
        outcomes = await self._rehost_urls(sources)
        urls = {
            source: outcome
            for source, outcome in outcomes.items()
            if not isinstance(outcome, RehostStatus)
        }
        renewed = await self.fresh_urls(urls.values())
        urls = {source: renewed.get(url, url) for source, url in urls.items()}
        statuses = Counter(
            outcome if isinstance(outcome, RehostStatus) else RehostStatus.STORED
            for outcome in outcomes.values()
        )
        return Rewritten(await replace_urls(document, urls), statuses)

    async def localize(self, document: bytes, base_url: str) -> bytes:
        """Return the document with `base_url` in place of `LOCAL_ORIGIN`: the URL of the proxy as
        the client sees it, without the path `/files/`."""
        links = await offload(document, partial(distinct_urls, document))
        urls = {
            url: base_url + url.removeprefix(LOCAL_ORIGIN)
            for url in links
            if LOCAL_FILE_URL.fullmatch(url)
        }
        return await replace_urls(document, urls)

    def start_draining(self, delay: float) -> None:
        """After `delay` seconds, stop waiting for transfers, because the process is about to
        end."""
        asyncio.get_running_loop().call_later(delay, self._draining.set)

    @property
    def is_storage_up(self) -> bool:
        return self._breaker.is_closed

    def try_now(self) -> bool:
        """Return whether to try the storage. False while it is down; every `RETRY_INTERVAL` seconds
        one caller gets True and acts as the probe."""
        return self._breaker.allow_request()

    async def store(self, content: Spool, digest: str | None = None) -> str:
        """Store a file that does not come from fal, such as an input, and return its URL.

        digest: its SHA-256 in hexadecimal, if it is known.
        Raises: StorageError.
        """
        if digest is None:
            digest = await asyncio.to_thread(content.digest)
        return await self._put(Download(digest, content))

    async def close(self, grace_period: float) -> None:
        """Wait up to `grace_period` seconds for running transfers, then cancel them."""
        if transfers := self._transfers.running():
            await asyncio.wait(transfers, timeout=grace_period)
        await self._transfers.close()
        await self._renewals.close()

    async def _rehost_urls(self, urls: Sequence[str]) -> dict[str, TransferOutcome]:
        outcomes: dict[str, TransferOutcome] = dict.fromkeys(urls, RehostStatus.FAILED)
        transfers: dict[str, Transfer] = {}
        for url in urls:
            if (cached := self._url_cache.get(url)) is not None:
                outcomes[url] = cached.outcome
            elif len(transfers) < LINKS_MAX and (transfer := self._start_transfer(url)) is not None:
                transfers[url] = transfer
        if transfers:
            await self._wait_for_transfers(transfers.values())
        return outcomes | {url: transfer_outcome(task) for url, task in transfers.items()}

    def _find_sources(self, document: bytes) -> list[str]:
        return [url for url in distinct_urls(document) if self._is_source(url)]

    def _is_source(self, url: str) -> bool:
        """Return whether a file is stored by fal or by the sandbox."""
        return is_fal_file(url) or (not self.is_stored(url) and self._fetcher.is_trusted(url))

    def is_stored(self, url: str) -> bool:
        """Return whether a file is in the storage already, whatever the host in its URL."""
        has_own_path = self.storage.local_files is not None and STORED_FILE.search(url) is not None
        return has_own_path or url.startswith(self._rehosted_prefixes)

    async def _wait_for_transfers(self, transfers: Collection[Transfer]) -> None:
        """Wait until all transfers are done, the time-out is over, or the process is about to end.
        A storage that completes no file within the full time-out counts as down."""
        stored_before = self._stored_count
        timeout = WAIT_TIMEOUT if self._breaker.is_closed else SHORT_WAIT_TIMEOUT
        draining = asyncio.get_running_loop().create_task(self._draining.wait())
        all_done = asyncio.gather(*transfers, return_exceptions=True)
        try:
            await asyncio.wait(
                (draining, all_done), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            draining.cancel()
        is_late = not all_done.done() and not self._draining.is_set()
        is_storage_busy = self._active_puts and self._stored_count == stored_before
        if is_late and timeout >= WAIT_TIMEOUT and is_storage_busy:
            self._mark_down()

    def _start_transfer(self, url: str) -> Transfer | None:
        """Return the transfer of a file, started now unless it is running, or None if there are too
        many transfers."""
        if (transfer := self._transfers.get(url)) is not None:
            return transfer
        if len(self._transfers) >= MAX_CONCURRENCY + QUEUE_MAX:
            return None
        transfer = self._transfers.start(url, partial(self._transfer, url))
        transfer.add_done_callback(log_transfer_bug)
        return transfer

    async def _transfer(self, url: str) -> TransferOutcome:
        outcome: TransferOutcome
        ttl = URL_CACHE_TTL
        async with self._slots:
            try:
                outcome = await self._put(await self._fetcher.download(url, SIZE_MAX))
            except FetchTooLarge:
                logger.warning("An output stays with fal: it has more than %d bytes", SIZE_MAX)
                outcome = RehostStatus.TOO_LARGE
            except (FetchRefused, FetchFailed, StorageError, ProxyError) as error:
                logger.warning("An output was not stored: %s", error)
                outcome = RehostStatus.FAILED
                ttl = failure_ttl(error)
                if isinstance(error, StorageError) and not ttl:
                    self._mark_down()
        if ttl and len(url) + len(outcome) <= CACHED_URLS_LENGTH_MAX:
            self._url_cache[url] = CachedOutcome(outcome, ttl)
        return outcome

    def _mark_down(self) -> None:
        if self._breaker.is_closed:  # later failures must not postpone the next probe
            self._breaker.trip()

    async def _put(self, file: Download) -> str:
        """Store a file and return its URL. Raises: StorageError."""
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
        self._breaker.reset()
        return url

    async def fresh_urls(self, urls: Iterable[str]) -> dict[str, str]:
        """Return renewed URLs for those that expire soon, as far as the storage renews them within
        the time-out. Concurrent callers share one renewal for each URL."""
        expiring = [url for url in urls if self.storage.is_expiring(url)]
        tasks = {url: self._start_renewal(url) for url in expiring[:LINKS_MAX]}
        if not tasks:
            return {}
        await asyncio.wait(tasks.values(), timeout=RENEWAL_TIMEOUT)
        return {
            url: task.result()
            for url, task in tasks.items()
            if task.done() and not task.cancelled() and task.exception() is None
        }

    def _start_renewal(self, url: str) -> asyncio.Task[str]:
        if (renewal := self._renewals.get(url)) is None:
            renewal = self._renewals.start(url, partial(self._renew_url, url))
            renewal.add_done_callback(log_renewal_failure)
        return renewal

    async def _renew_url(self, url: str) -> str:
        return await self.storage.renew_url(url)


def log_transfer_bug(transfer: Transfer) -> None:
    if not transfer.cancelled() and (error := transfer.exception()) is not None:
        logger.error("An output was not stored because of a bug in falproxy", exc_info=error)


def log_renewal_failure(renewal: asyncio.Task[str]) -> None:
    if not renewal.cancelled() and (error := renewal.exception()) is not None:
        logger.warning("The URL of a stored file was not renewed: %s", error)


def failure_ttl(error: Exception) -> float:
    """Return for how many seconds another attempt is of no use; 0 if it may succeed at any time."""
    is_permanent = isinstance(error, RejectedFileError | FetchRefused | FetchFailed)
    return FAILURE_TTL if is_permanent else 0.0


async def replace_urls(document: bytes, urls: Mapping[str, str]) -> bytes:
    return await offload(document, partial(replace_links, document, urls)) if urls else document


def transfer_outcome(transfer: Transfer) -> TransferOutcome:
    if not transfer.done():
        return RehostStatus.PENDING
    has_failed = transfer.cancelled() or transfer.exception() is not None
    return RehostStatus.FAILED if has_failed else transfer.result()


def rehoster_context(
    rehoster: Rehoster, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the storage is open as long as the application runs. At the end, running
    transfers have `grace_period` seconds to complete."""

    async def rehosting_context(app: web.Application) -> AsyncIterator[None]:
        try:
            await rehoster.storage.__aenter__()
        except StorageError as error:
            raise SettingsError(f"Outputs cannot be stored: {error}") from error
        try:
            yield
            await rehoster.close(time_left(app, grace_period))
        finally:
            await rehoster.storage.__aexit__(None, None, None)

    return rehosting_context
