"""The guard before a store: one that is down, frozen or slow costs a call next to nothing."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Self, TypeVar

from falproxy.stores.cache import CacheStore, RejectedResultError, StoreError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds that one answer may take. An answer may be late because this process is busy, which is no
# reason to buy anything twice.
CALL_TIMEOUT = 1.0
# Seconds after which an answer to the guard's own question is slow, and how many slow ones in a row
# mean that the store is.
SLOW_SECONDS = 0.05
SLOW_PROBES_TO_TRIP = 3
# Seconds between two questions of the guard's own.
PROBE_INTERVAL = 0.25


class StoreBreaker:
    """Asks a store while it is well. When it fails, calls skip it at once, and the guard alone
    finds out when it is back.

    A remote store is also asked while nobody calls, so that as a rule the guard notices first.
    on_back: what is done when the store is back.
    """

    def __init__(self, store: CacheStore) -> None:
        self.store = store
        self.on_recovered: list[Callable[[], Coroutine[object, object, None]]] = []
        self._slow_probes = 0
        self._is_open = False
        self._trip_future: asyncio.Future[None] | None = (
            None  # done when it opens, for those who wait
        )
        self._tasks: set[asyncio.Task[object]] = set()
        self._monitor_task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the store is being skipped."""
        return self._is_open

    async def __aenter__(self) -> Self:
        try:
            await self.store.__aenter__()
        except StoreError as error:
            self._trip(error)
        self._monitor_task = asyncio.get_running_loop().create_task(self._monitor())
        return self

    async def __aexit__(self, *error: object) -> None:
        tasks = [task for task in (self._monitor_task, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.store.__aexit__(*error)

    async def call(self, operation: Coroutine[object, object, T]) -> T:
        """The store's answer. Raises: StoreError, there is none to be had now.

        Who waits for one is let go when the store is given up meanwhile. What was asked ends by
        itself: a client of the store may be slow to let itself be cancelled.
        """
        if self._is_open:
            operation.close()
            raise StoreError("the store is being skipped")
        task, first = self._start_task(operation), asyncio.FIRST_COMPLETED
        try:
            await asyncio.wait((task, self._tripped()), timeout=CALL_TIMEOUT, return_when=first)
            if not task.done() and not self._is_open:
                # This process may be the late one: what has come meanwhile is read first.
                await asyncio.wait((task,), timeout=SLOW_SECONDS)
        finally:
            if not (is_answered := task.done()):
                task.cancel()
        if not is_answered:
            self._trip(TimeoutError())
            raise StoreError("the store did not answer in time")
        try:
            return task.result()
        except RejectedResultError:
            raise
        except StoreError as error:
            self._trip(error)
            raise
        except Exception as error:
            logger.exception("The result cache failed inside the proxy")
            self._trip(error)
            raise StoreError("the store failed") from error

    def _tripped(self) -> asyncio.Future[None]:
        if self._trip_future is None:
            self._trip_future = asyncio.get_running_loop().create_future()
        return self._trip_future

    def _start_task(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still waits for it has it as well

    def _trip(self, error: Exception) -> None:
        if not self._is_open:
            logger.warning("The result cache is done without for now: %s", reason(error))
        self._is_open = True
        if (opened := self._trip_future) is not None and not opened.done():
            opened.set_result(None)

    async def _monitor(self) -> None:
        while True:
            if not self._is_open and not self.store.is_remote:
                await asyncio.wait((self._tripped(),))
            if self._is_open or not self._slow_probes:
                await asyncio.sleep(PROBE_INTERVAL)
            await self._probe()

    async def _probe(self) -> None:
        """One question, timed without what this process itself was too busy to read it for."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        late = loop.create_task(event_loop_lag())
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                await self.store.probe()
        except Exception as error:
            late.cancel()
            if not isinstance(error, StoreError | TimeoutError):
                logger.exception("The result cache failed inside the proxy")
            self._trip(error)
            return
        seconds = loop.time() - asked - await late
        self._slow_probes = self._slow_probes + 1 if seconds > SLOW_SECONDS else 0
        if self._slow_probes >= SLOW_PROBES_TO_TRIP:
            self._trip(TimeoutError())
        elif self._is_open and not self._slow_probes:
            logger.warning("The result cache is back")
            self._is_open, self._trip_future = False, None
            for catch_up in self.on_recovered:
                _ = self._start_task(catch_up())


def reason(error: Exception) -> str:
    return "it is too slow" if isinstance(error, TimeoutError) else str(error)


async def event_loop_lag() -> float:
    """Seconds that this process's event loop is behind."""
    loop = asyncio.get_running_loop()
    due = loop.time() + SLOW_SECONDS / 2
    await asyncio.sleep(SLOW_SECONDS / 2)
    return loop.time() - due
