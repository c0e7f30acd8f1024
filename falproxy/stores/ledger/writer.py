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
from falproxy.stores.ledger import Entry, Ledger, LedgerError, Outcome, SchemaError, UnfitError
from falproxy.stores.ledger.sqlite import sqlite_ledger

logger = logging.getLogger(__name__)

EVERY = 0.5  # seconds that something waits for more to be written with
AT_ONCE = 500
RETRY = 1.0  # seconds after which a ledger that is down is tried again
RETRY_LEAST = 0.1  # the same, when the process is about to end
WAITING_MAX = 50_000  # rows that are kept for it; the oldest go first
WARNED_EVERY = 60.0
FORGOTTEN_EVERY = 3600.0


class Book:
    """What is to be written, and the task that does it. ledger: for those who read and for jobs.

    kept: seconds after which entries are forgotten, None for never. A ledger that is away, slow or
    full costs a call nothing: what it could not take is written when it is back.
    """

    def __init__(
        self, ledger: Ledger, kept: float | None = None, waiting_max: int = WAITING_MAX
    ) -> None:
        self.ledger = ledger
        self.dropped = 0
        self._kept = kept
        self._waiting_max = waiting_max
        self._waiting: deque[Entry | Outcome] = deque()
        self._batch: list[Entry | Outcome] = []  # what the ledger is being asked to take
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._ending = asyncio.Event()
        self._is_down = False
        self._told_at, self._is_told, self._dropped_told = float("-inf"), False, 0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_down(self) -> bool:
        """Whether the last attempt to write failed."""
        return self._is_down

    @property
    def waiting(self) -> int:
        """How many rows are not written yet."""
        return len(self._waiting) + len(self._batch)

    def record(self, row: Entry | Outcome) -> None:
        """Has it written soon."""
        waiting = self._waiting
        if len(waiting) >= self._waiting_max:
            waiting.popleft()
            self.dropped += 1
        waiting.append(row)
        self._some.set()
        if len(waiting) >= AT_ONCE:
            self._enough.set()

    async def open(self) -> None:
        """Raises: SchemaError, it is not ours to write."""
        try:
            await self.ledger.probe()
        except SchemaError:
            raise
        except LedgerError as error:
            self._fail(error)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._write_all()), loop.create_task(self._forget())]
        for task in self._tasks:
            task.add_done_callback(tell_of_bug)

    async def close(self, patience: float) -> None:
        """Writes what is left within so many seconds."""
        self._ending.set()
        self._some.set()
        self._enough.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=patience)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.waiting:
            logger.warning("%d rows of the ledger were not written", self.waiting)

    async def _write_all(self) -> None:
        while not self._ending.is_set() or self.waiting:
            await self._gather()
            try:
                await self._write_some()
            except LedgerError as error:
                self._fail(error)
                await wait_for(self._ending, RETRY)
                await asyncio.sleep(RETRY_LEAST)
            else:
                self._succeed()

    async def _gather(self) -> None:
        """Waits for something to write, and a little more for others to come with it."""
        if self._batch:
            return
        await self._some.wait()
        await wait_for(self._enough, EVERY)

    async def _write_some(self) -> None:
        """The oldest, which are kept until the ledger has taken them. Told twice, it takes them
        once."""
        if not self._batch:
            self._batch = list(islice(self._waiting, AT_ONCE))
            for _ in self._batch:
                self._waiting.popleft()
        try:
            if self._batch:
                await self.ledger.write(self._batch)
        except UnfitError:
            await self._write_each()
        self._batch = []
        if not self._waiting and not self._ending.is_set():
            self._some.clear()
        if len(self._waiting) < AT_ONCE and not self._ending.is_set():
            self._enough.clear()

    async def _write_each(self) -> None:
        """One by one, without what it will never take."""
        while self._batch:
            try:
                await self.ledger.write(self._batch[:1])
            except UnfitError as error:
                self.dropped += 1
                self._tell(error)
            del self._batch[0]

    async def _forget(self) -> None:
        while self._kept is not None:
            try:
                await self.ledger.forget(time.time() - self._kept)
            except LedgerError as error:
                logger.info("What is old in the ledger is still there: %s", error)
            await asyncio.sleep(FORGOTTEN_EVERY)

    def _fail(self, error: LedgerError) -> None:
        self._is_down = True
        self._is_told |= self._tell(error)

    def _succeed(self) -> None:
        self._is_down = False
        if self._is_told:
            logger.warning("The ledger is written again; %d rows were given up", self.dropped)
            self._is_told, self._dropped_told = False, self.dropped
        elif self.dropped > self._dropped_told:
            self._tell("it is too slow")

    def _tell(self, why: object) -> bool:
        """Warns of it, once a minute. Whether it did."""
        now = time.monotonic()
        if now - self._told_at < WARNED_EVERY:
            return False
        self._told_at, self._dropped_told = now, self.dropped
        logger.warning("Not everything is written to the ledger: %s (%d rows wait, %d given up)",
                       why, self.waiting, self.dropped)  # fmt: skip
        return True


LEDGER = web.AppKey("falproxy.ledger", Book)


def tell_of_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("The ledger is not looked after any more", exc_info=error)


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Until it is set, and not longer."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass  # not set, then


def keep_ledger(book: Book, patience: float) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the ledger is open exactly as long as the application. At the end, what is
    left has so many seconds to be written. Raises: SettingsError, a newer falproxy's ledger."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        app[LEDGER] = book
        async with book.ledger:
            try:
                await book.open()
            except SchemaError as error:
                raise SettingsError(str(error)) from error
            yield
            await book.close(patience)

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
