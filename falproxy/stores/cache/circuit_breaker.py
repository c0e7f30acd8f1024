"""Circuit breaker of the cache store: a store that is down, frozen or slow does not delay calls."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Self, TypeVar

from falproxy.concurrency import (
    ResponsiveDeadlines,
    cancel_tasks,
    close_within,
    wait_while_responsive,
)
from falproxy.state_log import StateLog
from falproxy.stores.cache import (
    CacheStore,
    RejectedResultError,
    ReportingStore,
    StoreContent,
    StoreError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds for one operation. Long, because a reply may be late because this process is busy, and a
# call must not be paid for twice because of that.
CALL_TIMEOUT = 1.0
# Seconds after which the reply to a probe is slow, and the number of slow probes in a row that trip
# the breaker.
SLOW_SECONDS = 0.05
SLOW_PROBES_TO_TRIP = 3
PROBE_PARTS = 100  # a reply takes a few turns of a busy event loop, which must not count as slow
PROBE_INTERVAL = 0.25  # seconds
# Seconds after a recovery, or a loss of the content, in which each process notices it and writes
# the entries that it has in memory.
SETTLE_SECONDS = 3.0
CLOSE_TIMEOUT = 3.0  # seconds
LAST_WRITE_TIMEOUT = 1.0  # seconds


class StoreBreaker:
    """Runs operations of a store while it works. After a failure operations fail at once, until a
    probe in the background succeeds. With `even_if_slow`, they run although the store is slow.

    A remote store is probed all the time, so that in most cases a probe, and not a call, finds the
    failure. Unlike in `falproxy.circuit_breaker`, no call is a probe, since a call would have to
    wait for it.

    on_recovered: coroutine functions that run when the store works again.
    on_emptied: coroutine functions that run when the store has lost its content.
    unwritten_counts: return how many entries are held in memory that the store does not have.
    """

    def __init__(self, store: CacheStore) -> None:
        self.store = store
        self.on_recovered: list[Callable[[], Coroutine[object, object, None]]] = []
        self.on_emptied: list[Callable[[], Coroutine[object, object, None]]] = []
        self._content_id: str | None = None  # of the last successful probe
        self.unwritten_counts: list[Callable[[], int]] = []
        if isinstance(store, ReportingStore):
            store.has_unwritten = self._has_unwritten
        self._complete_at = float("-inf")  # by the clock of the event loop
        # When no process held entries that the store does not have; known from the first probe on.
        self._all_written_at = float("inf")
        self._slow_probes = 0
        self._is_open = False
        self._is_slow = False  # while it is open: the last operation succeeded
        self._slow_writes: list[asyncio.Task[None]] = []
        self._state_log = StateLog(logger)
        self._trip_future: asyncio.Future[None] | None = None  # done when the breaker opens
        self._tasks: set[asyncio.Task[object]] = set()
        self._monitor_task: asyncio.Task[None] | None = None
        self._deadlines = ResponsiveDeadlines[asyncio.Task[Any]](CALL_TIMEOUT, self._on_expired)

    def __repr__(self) -> str:
        state = "open" if self._is_open else "closed"
        return f"<StoreBreaker {state}, {self.store!r}, {len(self._tasks)} operations>"

    @property
    def is_open(self) -> bool:
        """True while the store is skipped."""
        return self._is_open

    @property
    def is_complete(self) -> bool:
        """False while other processes may have entries in memory that are not in the store."""
        return self._is_usable and asyncio.get_running_loop().time() >= self._complete_at

    def is_complete_since(self, time: float) -> bool:
        """Return whether the store is complete, and no process has had other entries since a time
        by the clock of the event loop."""
        return self.is_complete and self._all_written_at >= time

    async def check_complete(self, since: float) -> bool:
        """Return `is_complete_since`. A local store is probed now, since it is not all the time.

        Raises: StoreError.
        """
        if not self.store.is_remote:
            await self.call(self.store.probe())
            return self.is_complete
        return self.is_complete_since(since)

    def _has_unwritten(self) -> bool:
        return not self._is_usable or self._holds_unwritten()

    @property
    def _is_usable(self) -> bool:
        """False while the store is skipped by all calls."""
        return not self._is_open or self._is_slow

    def _holds_unwritten(self) -> bool:
        return any(count() for count in self.unwritten_counts)

    @property
    def is_busy(self) -> bool:
        """True while operations are in progress."""
        return bool(self._tasks)

    async def __aenter__(self) -> Self:
        try:
            await self.store.__aenter__()
        except StoreError as error:
            self._trip(error)
        self._monitor_task = asyncio.get_running_loop().create_task(self._monitor())
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._monitor_task is not None:
            await cancel_tasks([self._monitor_task])
        await self._write_last()
        self._deadlines.close()
        tasks = [task for task in (self._monitor_task, *self._tasks) if task is not None]
        await cancel_tasks(tasks)
        await close_within(
            self.store.__aexit__(*error), "The store of the result cache", CLOSE_TIMEOUT
        )

    async def _write_last(self) -> None:
        """Try once more to write the entries in memory, also if the store is skipped."""
        if not self._holds_unwritten():
            return
        self._close()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WRITE_TIMEOUT):
                await asyncio.gather(*(write() for write in self.on_recovered))

    async def call(
        self, operation: Coroutine[object, object, T], *, even_if_slow: bool = False
    ) -> T:
        """Return the result of a store operation.

        All waiting calls fail as soon as the breaker opens, unless the store responds slowly: what
        waits for its reply would otherwise be paid for twice. The operations of failed calls are
        cancelled but not awaited: the client library of a store may need time to react to a
        cancellation.

        even_if_slow: also while the store is skipped because it is slow.
        Raises: StoreError.
        """
        if self._is_open and not (even_if_slow and self._is_slow):
            operation.close()
            raise StoreError("the store is being skipped")
        task = self._start_task(operation)
        try:
            if self._is_open:
                await wait_while_responsive((task,), CALL_TIMEOUT, PROBE_PARTS)
            else:
                await self._wait_until_open(task)
        finally:
            if not (is_done := task.done()):
                task.cancel()
        if not is_done:
            self._is_slow = False
            raise StoreError("the store did not respond in time")
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

    async def _wait_until_open(self, task: asyncio.Task[T]) -> None:
        """Wait for the end of an operation, or until the breaker opens."""
        self._deadlines.add(task)
        try:
            await asyncio.wait((task, self._tripped()), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._deadlines.remove(task)

    def _on_expired(self, task: asyncio.Task[Any]) -> None:
        if not task.done():
            self._trip(TimeoutError())

    def _tripped(self) -> asyncio.Future[None]:
        if self._trip_future is None:
            self._trip_future = asyncio.get_running_loop().create_future()
        return self._trip_future

    def _start_task(self, operation: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(operation)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved; a waiting call gets it as well

    def _trip(self, error: Exception, *, is_working: bool = False) -> None:
        """Open the breaker.

        is_working: the store responds, so that waiting operations may end.
        """
        if not self._is_open:
            self._state_log.warning("The result cache is bypassed for now: %s", reason(error))
        self._is_open, self._is_slow = True, False
        if (tripped := self._trip_future) is not None and not tripped.done() and not is_working:
            tripped.set_result(None)

    def _close(self) -> None:
        """Let operations run. Those that wait already may still have to fail, all at once."""
        self._is_open = False
        if self._trip_future is not None and self._trip_future.done():
            self._trip_future = None

    async def _monitor(self) -> None:
        while True:
            if not self._is_open and not self.store.is_remote:
                await asyncio.wait((self._tripped(),))
            if self._is_open or not self._slow_probes:
                await asyncio.sleep(PROBE_INTERVAL)
            await self._probe()

    async def _probe(self) -> None:
        """Probe once; the time that the event loop was busy does not count as the store's."""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        probe = loop.create_task(self.store.probe())
        try:
            seconds = await wait_while_responsive((probe,), CALL_TIMEOUT, PROBE_PARTS)
            if not probe.done():
                self._trip(TimeoutError())
                return
            content = probe.result()
        except Exception as error:
            if not isinstance(error, StoreError | TimeoutError):
                logger.exception("The result cache failed inside the proxy")
            self._trip(error)
            return
        finally:
            probe.cancel()
        self._on_probed(content, seconds)
        age = 0.0 if content is None else content.complete_age
        self._all_written_at = started_at - age

    def _on_probed(self, content: StoreContent | None, seconds: float) -> None:
        """Set the state after a successful probe, which took some seconds."""
        loop = asyncio.get_running_loop()
        self._slow_probes = self._slow_probes + 1 if seconds > SLOW_SECONDS else 0
        if self._slow_probes >= SLOW_PROBES_TO_TRIP:
            self._trip(TimeoutError(), is_working=True)
        elif self._is_open and not self._slow_probes:
            self._state_log.warning("The result cache works again")
            self._close()
            self._complete_at = loop.time() + SETTLE_SECONDS
            _ = self._run_callbacks(self.on_recovered)
        if self._is_open:
            # A store that has lost its content is not asked until it is fast again.
            self._is_slow = (
                content is not None and content.id == self._content_id and not content.is_new
            )
            self._write_slowly()
        elif content is not None:
            self._check_content(content)

    def _write_slowly(self) -> None:
        """Write the entries in memory while the store is slow."""
        is_writing = any(not task.done() for task in self._slow_writes)
        if self._is_slow and not is_writing and self._holds_unwritten():
            self._slow_writes = self._run_callbacks(self.on_recovered)

    def _check_content(self, content: StoreContent) -> None:
        """Notice that the store has lost its content since the last probe."""
        now = asyncio.get_running_loop().time()
        if content.is_new:
            self._complete_at = max(self._complete_at, now + 2 * PROBE_INTERVAL)
        if self._content_id not in (None, content.id):
            logger.warning("The result cache was emptied: what this process remembers is restored")
            self._complete_at = now + SETTLE_SECONDS
            _ = self._run_callbacks(self.on_emptied)
        self._content_id = content.id

    def _run_callbacks(
        self, callbacks: list[Callable[[], Coroutine[object, object, None]]]
    ) -> list[asyncio.Task[None]]:
        return [self._start_task(callback()) for callback in callbacks]


def reason(error: Exception) -> str:
    return "it is too slow" if isinstance(error, TimeoutError) else str(error)
