"""Storing of inputs: the images of calls whose results are accepted."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager

from aiohttp import web
from cachetools import TTLCache

from falproxy.background import time_left
from falproxy.concurrency import cancel_tasks
from falproxy.errors import ProxyError
from falproxy.fal.file_urls import is_fal_file
from falproxy.fal.input_json import LongString
from falproxy.media.fetch import Download, Fetcher, FetchFailed, FetchRefused, FetchTooLarge
from falproxy.media.image_format import SNIFF_BYTES, sniff
from falproxy.media.image_rules import InputKind, decode_data_uri, input_kind
from falproxy.spool import Spool, SpoolQuota, spool_body
from falproxy.stores.files import RejectedFileError, StorageError
from falproxy.stores.files.rehosting import SIZE_MAX, URL_CACHE_TTL, Rehoster

logger = logging.getLogger(__name__)

# Defaults for the bytes of all waiting inputs.
DISK_MAX, MEMORY_MAX = 2**30, 64 * 2**20
CALLS_MAX = 1000  # calls whose inputs wait
CONCURRENCY = 4  # inputs that are downloaded, decoded and stored at once, each
# Seconds between two attempts to store a file, doubling, and the number of attempts: half an hour.
BACKOFF_MIN, BACKOFF_MAX = 5.0, 120.0
ATTEMPTS = 20
KNOWN_FILES = 10_000  # files that were stored within URL_CACHE_TTL

ImageText = str | LongString  # a URL or a data URI


class InputNotStored(Exception):
    """An input is not stored. message: a sentence, without the input's URL."""


NOT_STORED = (
    InputNotStored, FetchFailed, FetchRefused, FetchTooLarge, ProxyError, StorageError, OSError,
    ValueError,
)  # fmt: skip


class PendingInputs:
    """The inputs of one call, whose result is not known yet."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<PendingInputs {self.count}, {'decided' if self.is_decided else 'undecided'}>"

    @property
    def is_decided(self) -> bool:
        return self._accepted.done()

    def decide(self, is_accepted: bool) -> None:
        """Store the inputs, or give them up. Only the first decision counts."""
        if not self._accepted.done():
            self._accepted.set_result(is_accepted)

    async def wait_accepted(self) -> bool:
        return await asyncio.shield(self._accepted)


class InputStore:
    """Reads the inputs of calls when these are sent, and stores them when a result is accepted.

    disk_max, memory_max: bytes of the inputs that wait for a result or for the storage.
    backoff: seconds before the second attempt to store a file.
    clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        rehoster: Rehoster,
        fetcher: Fetcher,
        *,
        disk_max: int = DISK_MAX,
        memory_max: int = MEMORY_MAX,
        backoff: float = BACKOFF_MIN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rehoster = rehoster
        self._fetcher = fetcher
        self._download_slots = asyncio.Semaphore(CONCURRENCY)
        self._decode_slots = asyncio.Semaphore(CONCURRENCY)
        self._store_slots = asyncio.Semaphore(CONCURRENCY)
        self._disk, self._memory = SpoolQuota(disk_max), SpoolQuota(memory_max)
        self._backoff = backoff
        self._tasks: dict[asyncio.Task[None], PendingInputs] = {}
        # Digests, and URLs of fal's own files, whose bytes never change.
        self._known: TTLCache[str, bool] = TTLCache(KNOWN_FILES, URL_CACHE_TTL, timer=clock)

    def __repr__(self) -> str:
        return f"<InputStore {len(self._tasks)} calls, {self._disk!r}, {self._memory!r}>"

    def start(self, inputs: Sequence[ImageText]) -> PendingInputs:
        """Start to read the inputs of a call. The caller must decide about them."""
        pending = PendingInputs(len(inputs))
        if len(self._tasks) >= CALLS_MAX:
            logger.warning("%d inputs are not stored: too many calls are running", len(inputs))
            pending.decide(False)
            return pending
        task = asyncio.get_running_loop().create_task(self._store_all(inputs, pending))
        self._tasks[task] = pending
        task.add_done_callback(self._on_done)
        return pending

    def decide_by(self, pending: PendingInputs, decision: Coroutine[object, object, bool]) -> None:
        """Decide about inputs by the result of a coroutine."""
        task = asyncio.get_running_loop().create_task(await_decision(pending, decision))
        self._tasks[task] = pending
        task.add_done_callback(self._on_done)

    async def close(self, grace_period: float) -> None:
        """Wait up to `grace_period` seconds until all inputs are stored, then give up the others.
        The results of their calls may not be known for hours."""
        if self._tasks:
            await asyncio.wait([*self._tasks], timeout=grace_period)
        if left := {id(pending): pending.count for pending in self._tasks.values()}:
            logger.warning("%d inputs were not stored: the proxy stops", sum(left.values()))
        await cancel_tasks([*self._tasks])

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Inputs were not stored because of a bug in falproxy", exc_info=error)

    async def _store_all(self, inputs: Sequence[ImageText], pending: PendingInputs) -> None:
        tasks = [
            asyncio.ensure_future(self._store_or_log(value, pending))
            for value in dict.fromkeys(inputs)
        ]
        del inputs  # a long string refers to the body of its call
        try:
            if await pending.wait_accepted():
                await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _store_or_log(self, value: ImageText, pending: PendingInputs) -> None:
        try:
            with reserve(self._memory, memory_size(value)):
                file = await self._read(value)
            key = value if isinstance(value, str) and is_fal_file(value) else ""
            del value
            if file is None or file.digest in self._known:
                return
            with reserve(self._memory if file.content.is_small else self._disk, file.content.size):
                if await pending.wait_accepted():
                    await self._put(file)
                    self._known.update(dict.fromkeys(filter(None, (file.digest, key)), True))
        except NOT_STORED as error:
            if await pending.wait_accepted():
                logger.warning("An input was not stored: %s", error)

    async def _read(self, value: ImageText) -> Download | None:
        """Return an image, None if it is known to be stored. Raises: NOT_STORED."""
        if isinstance(value, str) and input_kind(value) is InputKind.REMOTE:
            if self._rehoster.is_stored(value) or value in self._known:
                return None
            async with self._download_slots:
                file = await self._fetcher.download(value, SIZE_MAX)
        else:
            async with self._decode_slots:
                content = await spool_body(decoded_chunks(value))
            file = Download(await asyncio.to_thread(content.digest), content)
        if sniff(await asyncio.to_thread(file.content.read, 0, SNIFF_BYTES)) is None:
            raise InputNotStored("It is not an image.")
        return file

    async def _put(self, file: Download) -> None:
        """Store a file, when the storage is available again if it is down. Raises: StorageError."""
        for attempt in range(ATTEMPTS):
            try:
                async with self._store_slots:
                    await self._rehoster.store(file.content, file.digest)
            except StorageError as error:
                if isinstance(error, RejectedFileError) or attempt == ATTEMPTS - 1:
                    raise
                if not attempt:
                    logger.warning("An input is going to be stored later: %s", error)
            else:
                return
            await asyncio.sleep(min(self._backoff * 2**attempt, BACKOFF_MAX))


async def await_decision(pending: PendingInputs, decision: Coroutine[object, object, bool]) -> None:
    is_accepted = False
    try:
        is_accepted = await decision
    except (ProxyError, TimeoutError):
        logger.warning("%d inputs were not stored: the result is not known", pending.count)
    finally:
        pending.decide(is_accepted)


async def decoded_chunks(value: ImageText) -> AsyncIterator[bytes]:
    """Decode a data URI in threads. Raises: ValueError, it is malformed."""
    chunks = decode_data_uri(value)
    try:
        while chunk := await asyncio.to_thread(next, chunks, b""):
            yield chunk
    finally:
        chunks.close()


def memory_size(value: ImageText) -> int:
    """Return the bytes of an input in memory before it is read."""
    if isinstance(value, LongString):
        is_on_disk = isinstance(value.source, Spool) and not value.source.is_small
        return 0 if is_on_disk else value.end - value.start
    return len(value)


@contextmanager
def reserve(quota: SpoolQuota, size: int) -> Iterator[None]:
    """Context: a part of a quota is taken. Raises: ProxyError 503."""
    quota.reserve(size)
    try:
        yield
    finally:
        quota.release([size])


def inputs_context(
    inputs: InputStore, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: at the end, inputs whose results are known are stored, for at most
    `grace_period` seconds."""

    async def close_inputs(app: web.Application) -> AsyncIterator[None]:
        yield
        await inputs.close(time_left(app, grace_period))

    return close_inputs
