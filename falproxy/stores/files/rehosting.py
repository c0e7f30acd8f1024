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

from falproxy.concurrency import apart
from falproxy.errors import ProxyError, SettingsError
from falproxy.fal.file_urls import addresses_in, is_fal_file, replace_links
from falproxy.media.content_type import media_of
from falproxy.media.fetch import Download, Fetcher, FetchFailed, FetchRefused, FetchTooLarge
from falproxy.media.image_format import HEAD
from falproxy.spool import Spool
from falproxy.stores.files import File, Storage, StorageError, UnfitFileError
from falproxy.stores.files.disk import NAME

logger = logging.getLogger(__name__)

SIZE_MAX = 100 * 2**20  # bytes of a file; a larger one is left with fal
LINKS_MAX = 100  # files of one document
AT_ONCE = 8  # files on their way
WAITING_MAX = 10_000  # and files that wait for their turn
# Seconds that an answer waits for its files. What takes longer goes on, for the next who asks;
# while nothing can be stored nobody waits for long.
PATIENCE, SHORT_PATIENCE = 30.0, 1.0
RENEWAL = 5.0  # seconds that addresses have to be signed anew
# How many addresses of fal's are remembered, with where their files are, and for how many seconds.
MEMO_MAX, MEMO_SECONDS = 10_000, 3600.0
RETRY = 5.0  # seconds between two tries with a storage that is away
HOPELESS = 5.0  # seconds that nobody waits for a file which just could not be read, or not be taken
# What a document says while it is kept where only the request can tell the proxy's own address.
OWN = "https://falproxy.invalid"
OWN_FILE = re.compile(rf"{re.escape(OWN)}/files/{NAME.pattern}")


class Fate(StrEnum):
    """What became of a file, the worst first."""

    FAILED = "failed"
    PENDING = "pending"  # it is still on its way
    TOO_LARGE = "too-large"
    STORED = "stored"


class Rewritten(NamedTuple):
    """A document with the addresses of stored files, and how many files had which fate."""

    document: bytes
    fates: Counter[Fate]


def told(fates: Counter[Fate]) -> str:
    """As a header says it (a list by RFC 9651): `failed`, `too-large, stored; count=2`."""
    words = [fate for fate in Fate if fates[fate] and fate is not Fate.STORED]
    kept = [f"{Fate.STORED}; count={fates[Fate.STORED]}"] if fates[Fate.STORED] else []
    return ", ".join([*words, *kept])


class Outputs:
    """The files of one process on their way from fal into a storage.

    own: prefixes of addresses where stored files are. A file that is asked for by many is fetched
    and stored once, and goes on when all of them have left.
    """

    def __init__(
        self,
        storage: Storage,
        fetcher: Fetcher,
        *,
        own: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.storage = storage
        self._fetcher = fetcher
        self._own = tuple(own)
        self._clock = clock
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._flights: dict[str, asyncio.Task[str | Fate]] = {}
        self._known: OrderedDict[str, tuple[str | Fate, float]] = OrderedDict()
        self._renewals: dict[str, asyncio.Task[str]] = {}
        self._putting = 0  # files that the storage has now
        self._stored = 0  # how many, ever
        self._is_down = False  # whether the last file could not be stored
        self._try_at = 0.0
        self._hurry = asyncio.Event()  # the process is about to end

    async def rewrite(self, document: bytes) -> Rewritten:
        """The document with its files stored, as far as that can be done while somebody waits."""
        sources = await apart(document, partial(self._sources_in, document))
        ends = await self._ends_of(sources)
        urls = {url: end for url, end in ends.items() if not isinstance(end, Fate)}
        renewed = await self.renewed(urls.values())
        urls = {url: renewed.get(end, end) for url, end in urls.items()}
        fates = Counter(end if isinstance(end, Fate) else Fate.STORED for end in ends.values())
        return Rewritten(await replaced(document, urls), fates)

    async def present(self, document: bytes, here: str) -> bytes:
        """The document as it is given out, with the proxy's own address as the client sees it.
        here: what its path `/files/` is put behind."""
        links = await apart(document, partial(addresses_in, document))
        urls = {url: here + url.removeprefix(OWN) for url in links if OWN_FILE.fullmatch(url)}
        return await replaced(document, urls)

    def hurry_up(self, patience: float) -> None:
        """In so many seconds answers wait for their files no longer: the process is to end."""
        asyncio.get_running_loop().call_later(patience, self._hurry.set)

    def try_now(self) -> bool:
        """Return whether to try the storage. False while it is down; every `RETRY` seconds one
        caller gets True and acts as the probe."""
        if self._is_down and self._clock() < self._try_at:
            return False
        self._try_at = self._clock() + RETRY
        return True

    async def keep(self, content: Spool) -> str:
        """The address of something that did not come from fal, such as an input, once it is
        stored. Raises: StorageError."""
        return await self._put(Download(await asyncio.to_thread(content.digest), content))

    async def close(self, patience: float) -> None:
        """Lets what is on its way arrive within so many seconds."""
        flights = tuple(self._flights.values())
        if flights:
            await asyncio.wait(flights, timeout=patience)
        left = (*flights, *self._renewals.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _ends_of(self, urls: Sequence[str]) -> dict[str, str | Fate]:
        """Each of these addresses with where its file is now, or why it is not."""
        ends: dict[str, str | Fate] = dict.fromkeys(urls, Fate.FAILED)
        flights: dict[str, asyncio.Task[str | Fate]] = {}
        for url in urls:
            if (known := self._recall(url)) is not None:
                ends[url] = known
            elif len(flights) < LINKS_MAX and (flight := self._begin(url)) is not None:
                flights[url] = flight
        if flights:
            await self._wait(flights.values())
        return ends | {url: end_of(flight) for url, flight in flights.items()}

    def _sources_in(self, document: bytes) -> list[str]:
        return [url for url in addresses_in(document) if self._is_source(url)]

    def _is_source(self, url: str) -> bool:
        """Whether a file is with fal, or with the sandbox that plays it."""
        return is_fal_file(url) or (not url.startswith(self._own) and self._fetcher.is_trusted(url))

    async def _wait(self, flights: Collection[asyncio.Task[str | Fate]]) -> None:
        """Returns when all have arrived, or it has been long enough."""
        stored = self._stored
        patience = SHORT_PATIENCE if self._is_down else PATIENCE
        hurry = asyncio.get_running_loop().create_task(self._hurry.wait())
        arrived = asyncio.gather(*flights, return_exceptions=True)
        try:
            await asyncio.wait(
                (hurry, arrived), timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            hurry.cancel()
        is_late = not arrived.done() and not self._hurry.is_set()
        if is_late and patience >= PATIENCE and self._putting and self._stored == stored:
            self._is_down = True

    def _begin(self, url: str) -> asyncio.Task[str | Fate] | None:
        """The file's flight, which begins now if there is none. None: there are too many."""
        if (flight := self._flights.get(url)) is not None:
            return flight
        if len(self._flights) >= AT_ONCE + WAITING_MAX:
            return None
        flight = self._flights[url] = asyncio.get_running_loop().create_task(self._keep(url))
        flight.add_done_callback(partial(self._land, url))
        return flight

    def _land(self, url: str, flight: asyncio.Task[str | Fate]) -> None:
        del self._flights[url]
        if not flight.cancelled() and (error := flight.exception()) is not None:
            logger.error("An output was not stored, by our fault", exc_info=error)

    async def _keep(self, url: str) -> str | Fate:
        """Where the file is now, or why it is not."""
        kept = MEMO_SECONDS
        async with self._turns:
            try:
                end: str | Fate = await self._put(await self._fetcher.download(url, SIZE_MAX))
            except FetchTooLarge:
                logger.warning("An output stays with fal: it has more than %d bytes", SIZE_MAX)
                end = Fate.TOO_LARGE
            except (FetchRefused, FetchFailed, StorageError, ProxyError) as error:
                logger.warning("An output was not stored: %s", error)
                end = Fate.FAILED
                kept = seconds_of(error)
                self._is_down |= isinstance(error, StorageError) and not kept
        if kept:
            self._known[url] = end, self._clock() + kept
        if len(self._known) > MEMO_MAX:
            self._known.popitem(last=False)
        return end

    async def _put(self, file: Download) -> str:
        """Raises: StorageError."""
        extension, content_type = media_of(await asyncio.to_thread(file.content.read, 0, HEAD))
        name = f"{file.digest}.{extension}"
        self._putting += 1
        try:
            url = await self.storage.put(File(name, content_type, file.content))
        finally:
            self._putting -= 1
        self._stored += 1
        self._is_down = False
        return url

    def _recall(self, url: str) -> str | Fate | None:
        end, until = self._known.get(url, (None, 0.0))
        return end if self._clock() < until else None

    async def renewed(self, urls: Iterable[str]) -> dict[str, str]:
        """Good addresses for those that pass, as far as they can be had soon. Each is signed once
        for all who ask at the same time."""
        passing = [url for url in urls if self.storage.is_passing(url)]
        tasks = {url: self._renew(url) for url in passing[:LINKS_MAX]}
        if not tasks:
            return {}
        await asyncio.wait(tasks.values(), timeout=RENEWAL)
        return {
            url: task.result()
            for url, task in tasks.items()
            if task.done() and not task.cancelled() and task.exception() is None
        }

    def _renew(self, url: str) -> asyncio.Task[str]:
        if (task := self._renewals.get(url)) is None:
            task = asyncio.get_running_loop().create_task(self.storage.renew(url))
            self._renewals[url] = task
            task.add_done_callback(partial(self._end_renewal, url))
        return task

    def _end_renewal(self, url: str, task: asyncio.Task[str]) -> None:
        del self._renewals[url]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("A stored file's address was not renewed: %s", error)


def seconds_of(error: Exception) -> float:
    """How long it is of no use to try again. 0 where it may be mended at any moment."""
    is_of_the_file = isinstance(error, UnfitFileError | FetchRefused | FetchFailed)
    return HOPELESS if is_of_the_file else 0.0


async def replaced(document: bytes, urls: Mapping[str, str]) -> bytes:
    return await apart(document, partial(replace_links, document, urls)) if urls else document


def end_of(flight: asyncio.Task[str | Fate]) -> str | Fate:
    if not flight.done():
        return Fate.PENDING
    failed = flight.cancelled() or flight.exception() is not None
    return Fate.FAILED if failed else flight.result()


def keep_outputs(
    outputs: Outputs, patience: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the storage is open exactly as long as the application. At the end, files
    on their way have so many seconds to arrive."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        try:
            await outputs.storage.__aenter__()
        except StorageError as error:
            raise SettingsError(f"Outputs cannot be kept: {error}") from error
        try:
            yield
            await outputs.close(patience)
        finally:
            await outputs.storage.__aexit__(None, None, None)

    return context
