"""Outputs that are kept: the files that fal's documents name are stored, each once, and the
documents name them where they are then."""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from aiohttp import web

from falproxy.config import SettingsError
from falproxy.errors import ProxyError
from falproxy.fetch import Download, Fetcher, FetchFailed, FetchRefused, FetchTooLarge
from falproxy.links import find_links, is_fal_file, replace_links
from falproxy.media import media_of
from falproxy.signatures import HEAD
from falproxy.storage import File, Storage, StorageError

logger = logging.getLogger(__name__)

SIZE_MAX = 100 * 2**20  # bytes of a file; a larger one is left with fal
LINKS_MAX = 100  # files of one document
AT_ONCE = 8  # files on their way
WAITING_MAX = 1000  # and files that wait for their turn
# Seconds that an answer waits for its files. What takes longer goes on, for the next who asks;
# while nothing can be stored nobody waits for long.
PATIENCE, SHORT_PATIENCE = 60.0, 1.0
# How many addresses of fal's are remembered, with where their files are, and for how many seconds.
MEMO_MAX, MEMO_SECONDS = 10_000, 3600.0
# What a document says while it is kept where only the request can tell the proxy's own address.
OWN = "https://falproxy.invalid"


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
        self._stored = 0  # how many, ever
        self._is_down = False  # whether the last file could not be stored

    async def rewrite(self, document: bytes) -> Rewritten:
        """The document with its files stored, as far as that can be done while somebody waits."""
        ends = await self._ends_of(document)
        urls = {url: end for url, end in ends.items() if not isinstance(end, Fate)}
        fates = Counter(end if isinstance(end, Fate) else Fate.STORED for end in ends.values())
        return Rewritten(replace_links(document, urls), fates)

    async def present(self, document: bytes, here: str) -> bytes:
        """The document as it is given out: with signed addresses that are good for a while, and
        the proxy's own as the client sees it. here: what its path `/files/` is put behind."""
        urls = {}
        for link in find_links(document):
            if link.url.startswith(f"{OWN}/"):
                urls[link.url] = here + link.url.removeprefix(OWN)
            elif (renewed := await self._renewed(link.url)) is not None:
                urls[link.url] = renewed
        return replace_links(document, urls)

    async def close(self, patience: float) -> None:
        """Lets what is on its way arrive within so many seconds."""
        flights = tuple(self._flights.values())
        if flights:
            await asyncio.wait(flights, timeout=patience)
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _ends_of(self, document: bytes) -> dict[str, str | Fate]:
        """Each address of fal's in the document with where its file is now, or why it is not."""
        urls = {link.url for link in find_links(document) if self._is_source(link.url)}
        ends: dict[str, str | Fate] = dict.fromkeys(urls, Fate.FAILED)
        flights: dict[str, asyncio.Task[str | Fate]] = {}
        for url in sorted(urls)[:LINKS_MAX]:
            if (known := self._recall(url)) is not None:
                ends[url] = known
            elif (flight := self._begin(url)) is not None:
                flights[url] = flight
        if flights:
            await self._wait(flights.values())
        return ends | {url: end_of(flight) for url, flight in flights.items()}

    def _is_source(self, url: str) -> bool:
        """Whether a file is with fal, or with the sandbox that plays it."""
        return is_fal_file(url) or (not url.startswith(self._own) and self._fetcher.is_trusted(url))

    async def _wait(self, flights: Collection[asyncio.Task[str | Fate]]) -> None:
        stored = self._stored
        patience = SHORT_PATIENCE if self._is_down else PATIENCE
        _, late = await asyncio.wait(flights, timeout=patience)
        if late and self._stored == stored:
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
        async with self._turns:
            try:
                end: str | Fate = await self._put(await self._fetcher.download(url, SIZE_MAX))
            except FetchTooLarge:
                logger.warning("An output stays with fal: it has more than %d bytes", SIZE_MAX)
                end = Fate.TOO_LARGE
            except (FetchRefused, FetchFailed, StorageError, ProxyError) as error:
                logger.warning("An output was not stored: %s", error)
                self._is_down |= isinstance(error, StorageError)
                return Fate.FAILED
        self._known[url] = end, self._clock() + MEMO_SECONDS
        if len(self._known) > MEMO_MAX:
            self._known.popitem(last=False)
        return end

    async def _put(self, file: Download) -> str:
        """Raises: StorageError."""
        extension, content_type = media_of(await asyncio.to_thread(file.content.read, 0, HEAD))
        name = f"{file.digest}.{extension}"
        url = await self.storage.put(File(name, content_type, file.content))
        self._stored += 1
        self._is_down = False
        return url

    def _recall(self, url: str) -> str | Fate | None:
        end, until = self._known.get(url, (None, 0.0))
        return end if self._clock() < until else None

    async def _renewed(self, url: str) -> str | None:
        try:
            return await self.storage.renew(url)
        except StorageError as error:
            logger.warning("A stored file's address was not renewed: %s", error)
            return None


def end_of(flight: asyncio.Task[str | Fate]) -> str | Fate:
    if not flight.done():
        return Fate.PENDING
    failed = flight.cancelled() or flight.exception() is not None
    return Fate.FAILED if failed else flight.result()


OUTPUTS = web.AppKey("falproxy.outputs", Outputs)


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
            app[OUTPUTS] = outputs
            yield
            await outputs.close(patience)
        finally:
            await outputs.storage.__aexit__(None, None, None)

    return context
