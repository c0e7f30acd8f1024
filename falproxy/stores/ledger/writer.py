"""Batched writing to the ledger in the background, so that calls do not wait for it."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import islice
from pathlib import Path

from aiohttp import web

from falproxy.background import time_left
from falproxy.concurrency import cancel_tasks, wait_for_event
from falproxy.errors import SettingsError
from falproxy.stores.ledger import (
    CallRecord,
    InvalidRowError,
    Ledger,
    LedgerError,
    Outcome,
    ProcessStart,
    SchemaError,
)
from falproxy.stores.ledger.database import LedgerDatabase
from falproxy.stores.ledger.rows import truncate
from falproxy.stores.ledger.schema import Schema
from falproxy.stores.ledger.sql_ledger import SqlLedger
from falproxy.stores.ledger.sqlite import sqlite_database
from falproxy.stores.ledger.statements import LEDGER_SCHEMA

logger = logging.getLogger(__name__)

LEDGER_FILE = "ledger.sqlite"  # in the data directory
FLUSH_INTERVAL = 0.5  # seconds between the first row of a batch and its write
BATCH_SIZE = 500  # rows of one write
RETRY_INTERVAL = 1.0  # seconds between attempts while the ledger is unavailable
RETRY_INTERVAL_MIN = 0.1  # the same during shutdown
QUEUE_MAX = 50_000  # rows; when the queue is full, the oldest are dropped
WARNING_INTERVAL = 60.0  # seconds between warnings
RETENTION_INTERVAL = 3600.0  # seconds between deletions of old records
SUM_INTERVAL = 10.0  # seconds until the sums of changed periods are computed
# Periods that are summed in one transaction: so many that it takes about this time in seconds.
SUM_BATCH_MAX, SUM_SECONDS = 200, 0.1


class LedgerWriter:
    """A queue of rows, and the task that writes them to the ledger.

    While the ledger is unavailable the queue grows; it is written when the ledger recovers.

    retention: age in seconds after which records and finished jobs are deleted; None keeps them.
    jobs_retention: the same for finished jobs alone.
    queue_max: maximum number of queued rows.
    start: of this process, which is recorded; None for a process that serves no calls.
    """

    def __init__(
        self,
        ledger: Ledger,
        retention: float | None = None,
        queue_max: int = QUEUE_MAX,
        *,
        jobs_retention: float | None = None,
        start: ProcessStart | None = None,
    ) -> None:
        self.ledger = ledger
        self.dropped = 0
        self.last_error: str | None = None
        self.is_down = False  # True after a failed write, until the next success
        self._retention, self._jobs_retention = retention, jobs_retention
        self._queue_max, self._start = queue_max, start
        self._queue: deque[CallRecord | Outcome] = deque()
        self._batch: list[CallRecord | Outcome] = []  # taken from the queue, not confirmed yet
        self._has_rows, self._batch_full = asyncio.Event(), asyncio.Event()
        self._closing = asyncio.Event()
        self._warned_at, self._has_warned, self._dropped_reported = float("-inf"), False, 0
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        state = "down" if self.is_down else "up"
        return f"<LedgerWriter {state}, {self.pending_rows} rows pending, {self.dropped} dropped>"

    @property
    def pending_rows(self) -> int:
        """Number of rows that are not written yet."""
        return len(self._queue) + len(self._batch)

    def enqueue(self, row: CallRecord | Outcome) -> None:
        """Add a row to the queue. If the queue is full, the oldest row is dropped."""
        queue = self._queue
        if len(queue) >= self._queue_max:
            queue.popleft()
            self.dropped += 1
        queue.append(truncate(row))
        self._has_rows.set()
        if len(queue) >= BATCH_SIZE:
            self._batch_full.set()

    async def open(self) -> None:
        """Start the background tasks. Raises: SchemaError."""
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
            loop.create_task(self._sum_loop()),
            loop.create_task(self._record_start()),
        ]
        for task in self._tasks:
            task.add_done_callback(log_task_error)

    async def close(self, grace_period: float) -> None:
        """Write the remaining rows, for at most `grace_period` seconds."""
        self._closing.set()
        self._has_rows.set()
        self._batch_full.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=grace_period)
        await cancel_tasks(self._tasks)
        if self.pending_rows:
            logger.warning("%d rows of the ledger were not written", self.pending_rows)

    async def _write_loop(self) -> None:
        while not self._closing.is_set() or self.pending_rows:
            await self._wait_for_batch()
            if self._closing.is_set() and not self.pending_rows:
                return
            try:
                await (self._write_batch() if self.pending_rows else self.ledger.probe())
            except LedgerError as error:
                self._on_failure(error)
                await wait_for_event(self._closing, RETRY_INTERVAL)
                await asyncio.sleep(RETRY_INTERVAL_MIN)
            else:
                self._on_success()

    async def _wait_for_batch(self) -> None:
        """Wait for the first row, and then until the batch is full or FLUSH_INTERVAL has passed.
        While the ledger is unavailable, return without a row after RETRY_INTERVAL."""
        if self._batch:
            return
        if self.is_down:
            await wait_for_event(self._has_rows, RETRY_INTERVAL)
        else:
            await self._has_rows.wait()
        if not self.pending_rows:
            return
        await wait_for_event(self._batch_full, FLUSH_INTERVAL)

    async def _write_batch(self) -> None:
        """Write the oldest rows. They remain in the batch until the write is confirmed: the ledger
        ignores rows that it has already."""
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
        """Write the rows of the batch separately, and drop those that are invalid."""
        while self._batch:
            try:
                await self.ledger.write(self._batch[:1])
            except InvalidRowError as error:
                self.dropped += 1
                self._warn(error)
            del self._batch[0]

    async def _retention_loop(self) -> None:
        while self._retention is not None or self._jobs_retention is not None:
            try:
                if self._retention is not None:
                    await self.ledger.delete_before(time.time() - self._retention)
                if self._jobs_retention is not None:
                    await self.ledger.delete_jobs_before(time.time() - self._jobs_retention)
            except LedgerError as error:
                if not self.is_down:
                    logger.info("Old ledger records were not deleted: %s", error)
            await asyncio.sleep(RETENTION_INTERVAL)

    async def _sum_loop(self) -> None:
        limit = 1
        while True:
            started = time.monotonic()
            try:
                count = await self.ledger.sum_periods(time.time(), limit)
            except LedgerError as error:
                logger.info("Sums of the ledger were not computed: %s", error)
                count, limit = 0, 1
            seconds = time.monotonic() - started
            limit = min(limit * 2, SUM_BATCH_MAX) if seconds < SUM_SECONDS else limit // 2 or 1
            # Half of the time is left to others while sums of old records are computed.
            await asyncio.sleep(seconds if count else SUM_INTERVAL)

    async def _record_start(self) -> None:
        while self._start is not None:
            try:
                await self.ledger.add_start(self._start)
            except LedgerError:
                await asyncio.sleep(RETRY_INTERVAL)
            else:
                return

    def _on_failure(self, error: LedgerError) -> None:
        self.is_down, self.last_error = True, str(error)
        self._has_warned |= self._warn(error)

    def _on_success(self) -> None:
        self.is_down = False
        if self._has_warned:
            logger.warning("The ledger is written again; %d rows were dropped", self.dropped)
            self._has_warned, self._dropped_reported = False, self.dropped
        elif self.dropped > self._dropped_reported:
            self._warn("the ledger is too slow")

    def _warn(self, reason: object) -> bool:
        """Log a warning, unless there was one in the last minute. Return whether it was logged."""
        now = time.monotonic()
        if now - self._warned_at < WARNING_INTERVAL:
            return False
        self._warned_at, self._dropped_reported = now, self.dropped
        logger.warning("Ledger records are delayed: %s (%d rows queued, %d dropped)",
                       reason, self.pending_rows, self.dropped)  # fmt: skip
        return True


LEDGER_WRITER = web.AppKey("falproxy.ledger_writer", LedgerWriter)


def log_task_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("A background task of the ledger failed", exc_info=error)


def ledger_context(
    writer: LedgerWriter, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context of the ledger.

    grace_period: seconds for the write of queued rows at shutdown.
    Raises: SettingsError, the ledger was created by a newer falproxy.
    """

    async def open_and_close_ledger(app: web.Application) -> AsyncIterator[None]:
        app[LEDGER_WRITER] = writer
        async with writer.ledger:
            try:
                await writer.open()
            except SchemaError as error:
                raise SettingsError(str(error)) from error
            yield
            await writer.close(time_left(app, grace_period))

    return open_and_close_ledger


def choose_ledger(database_url: str | None, data_dir: Path) -> Ledger:
    """Return a ledger in PostgreSQL, or without `database_url` in an SQLite file, which the
    processes of one machine share.

    Raises: SettingsError, the PostgreSQL client is not installed, or the URL is invalid.
    """
    return SqlLedger(choose_database(database_url, data_dir))


def choose_database(
    database_url: str | None, data_dir: Path, schema: Schema = LEDGER_SCHEMA
) -> LedgerDatabase:
    """Return the database of the ledger, for the tables of one schema.

    Raises: SettingsError, as `choose_ledger`.
    """
    if database_url is None:
        return sqlite_database(data_dir / LEDGER_FILE, schema)
    try:
        from falproxy.stores.ledger.postgres import postgres_database
    except ModuleNotFoundError as error:
        message = f"DATABASE_URL needs {error.name}: pip install 'falproxy[postgres]'."
        raise SettingsError(message) from error
    try:
        return postgres_database(database_url, schema)
    except ValueError as error:
        raise SettingsError(f"DATABASE_URL {error}.") from None
