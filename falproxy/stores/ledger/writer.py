"""The process's way to its ledger: calls are written down later, together, and never wait."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import islice
from pathlib import Path

from aiohttp import web

from falproxy.errors import SettingsError
from falproxy.stores.ledger import (
    CallRecord,
    InvalidRowError,
    Ledger,
    LedgerError,
    Outcome,
    SchemaError,
)
from falproxy.stores.ledger.sqlite import sqlite_ledger

logger = logging.getLogger(__name__)

FLUSH_INTERVAL = 0.5  # seconds that something waits for more to be written with
BATCH_SIZE = 500
RETRY_INTERVAL = 1.0  # seconds after which a ledger that is down is tried again
RETRY_INTERVAL_MIN = 0.1  # the same, when the process is about to end
QUEUE_MAX = 50_000  # rows that are kept for it; the oldest go first
WARNING_INTERVAL = 60.0
RETENTION_INTERVAL = 3600.0


class LedgerWriter:
    """What is to be written, and the task that does it. ledger: for those who read and for jobs.

    kept: seconds after which entries are forgotten, None for never. A ledger that is away, slow or
    full costs a call nothing: what it could not take is written when it is back.
    """

    def __init__(
        self, ledger: Ledger, retention: float | None = None, queue_max: int = QUEUE_MAX
    ) -> None:
        self.ledger = ledger
        self.dropped = 0
        self._retention = retention
        self._queue_max = queue_max
        self._queue: deque[CallRecord | Outcome] = deque()
        self._batch: list[CallRecord | Outcome] = []  # what the ledger is being asked to take
        self._has_rows, self._batch_full = asyncio.Event(), asyncio.Event()
        self._closing = asyncio.Event()
        self._is_down = False
        self._warned_at, self._has_warned, self._dropped_reported = float("-inf"), False, 0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_down(self) -> bool:
        """Whether the last attempt to write failed."""
        return self._is_down

    @property
    def pending_rows(self) -> int:
        """How many rows are not written yet."""
        return len(self._queue) + len(self._batch)

    def enqueue(self, row: CallRecord | Outcome) -> None:
        """Has it written soon."""
        waiting = self._queue
        if len(waiting) >= self._queue_max:
            waiting.popleft()
            self.dropped += 1
        waiting.append(row)
        self._has_rows.set()
        if len(waiting) >= BATCH_SIZE:
            self._batch_full.set()

    async def open(self) -> None:
        """Raises: SchemaError, it is not ours to write."""
        try:
            await self.ledger.probe()
        except SchemaError:
            raise
        except LedgerError as error:
            self._on_failure(error)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._write_loop()),
            loop.create_task(self._retention_loop()),
        ]
        for task in self._tasks:
            task.add_done_callback(log_task_error)

    async def close(self, grace_period: float) -> None:
        """Writes what is left within so many seconds."""
        self._closing.set()
        self._has_rows.set()
        self._batch_full.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=grace_period)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.pending_rows:
            logger.warning("%d rows of the ledger were not written", self.pending_rows)

    async def _write_loop(self) -> None:
        while not self._closing.is_set() or self.pending_rows:
            await self._wait_for_batch()
            try:
                await self._write_batch()
            except LedgerError as error:
                self._on_failure(error)
                await wait_for_event(self._closing, RETRY_INTERVAL)
                await asyncio.sleep(RETRY_INTERVAL_MIN)
            else:
                self._on_success()

    async def _wait_for_batch(self) -> None:
        """Waits for something to write, and a little more for others to come with it."""
        if self._batch:
            return
        await self._has_rows.wait()
        await wait_for_event(self._batch_full, FLUSH_INTERVAL)

    async def _write_batch(self) -> None:
        """The oldest, which are kept until the ledger has taken them. Told twice, it takes them
        once."""
        if not self._batch:
            self._batch = list(islice(self._queue, BATCH_SIZE))
            for _ in self._batch:
                self._queue.popleft()
        try:
            if self._batch:
                await self.ledger.write(self._batch)
        except InvalidRowError:
            await self._write_one_by_one()
        self._batch = []
        if not self._queue and not self._closing.is_set():
            self._has_rows.clear()
        if len(self._queue) < BATCH_SIZE and not self._closing.is_set():
            self._batch_full.clear()

    async def _write_one_by_one(self) -> None:
        """One by one, without what it will never take."""
        while self._batch:
            try:
                await self.ledger.write(self._batch[:1])
            except InvalidRowError as error:
                self.dropped += 1
                self._warn(error)
            del self._batch[0]

    async def _retention_loop(self) -> None:
        while self._retention is not None:
            try:
                await self.ledger.delete_before(time.time() - self._retention)
            except LedgerError as error:
                logger.info("What is old in the ledger is still there: %s", error)
            await asyncio.sleep(RETENTION_INTERVAL)

    def _on_failure(self, error: LedgerError) -> None:
        self._is_down = True
        self._has_warned |= self._warn(error)

    def _on_success(self) -> None:
        self._is_down = False
        if self._has_warned:
            logger.warning("The ledger is written again; %d rows were given up", self.dropped)
            self._has_warned, self._dropped_reported = False, self.dropped
        elif self.dropped > self._dropped_reported:
            self._warn("it is too slow")

    def _warn(self, reason: object) -> bool:
        """Warns of it, once a minute. Whether it did."""
        now = time.monotonic()
        if now - self._warned_at < WARNING_INTERVAL:
            return False
        self._warned_at, self._dropped_reported = now, self.dropped
        logger.warning("Not everything is written to the ledger: %s (%d rows wait, %d given up)",
                       reason, self.pending_rows, self.dropped)  # fmt: skip
        return True


LEDGER_WRITER = web.AppKey("falproxy.ledger", LedgerWriter)


def log_task_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("The ledger is not looked after any more", exc_info=error)


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Until it is set, and not longer."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass  # not set, then


def ledger_context(
    writer: LedgerWriter, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the ledger is open exactly as long as the application. At the end, what is
    left has so many seconds to be written. Raises: SettingsError, a newer falproxy's ledger."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        app[LEDGER_WRITER] = writer
        async with writer.ledger:
            try:
                await writer.open()
            except SchemaError as error:
                raise SettingsError(str(error)) from error
            yield
            await writer.close(grace_period)

    return context


def choose_ledger(database_url: str | None, data_dir: Path) -> Ledger:
    """Where calls are written down: in PostgreSQL for several machines, else in a file that the
    processes of one share. Raises: SettingsError, its client is not installed, or the URL is none.
    """
    if database_url is None:
        return sqlite_ledger(data_dir / "ledger.sqlite")
    try:
        from falproxy.stores.ledger.postgres import postgres_ledger
    except ModuleNotFoundError as error:
        needed = f"DATABASE_URL needs {error.name}: pip install 'falproxy[postgres]'."
        raise SettingsError(needed) from error
    try:
        return postgres_ledger(database_url)
    except ValueError as error:
        raise SettingsError(f"DATABASE_URL {error}.") from None
