"""Blocking work in threads, waiting with a time limit, and the end of tasks.

A daemon thread that hangs does not keep the process from exiting, as one of asyncio's executor
would.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from threading import Thread
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
ItemT = TypeVar("ItemT")
KeyT = TypeVar("KeyT", bound=Hashable)

# Seconds until tasks that do not end are abandoned, and between two cancellations of a task. In the
# meantime a task may do what its end requires.
CANCEL_TIMEOUT, CANCEL_INTERVAL = 2.0, 0.25
CLOSE_TIMEOUT = 1.0  # seconds to close a connection
DEADLINE_INTERVAL = 0.05  # seconds between two looks at the deadlines of operations
OFFLOAD_MIN = 64 * 2**10  # bytes of a document that is processed in a thread


async def run_in_daemon_thread(work: Callable[[], T]) -> T:
    """Run `work` in a daemon thread and return its result. Raises: the exceptions of `work`."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def resolve(set_outcome: Callable[[], None]) -> None:
        if not future.done():
            set_outcome()

    def run() -> None:
        try:
            result = work()
            callback = partial(resolve, partial(future.set_result, result))
        except Exception as error:
            callback = partial(resolve, partial(future.set_exception, error))
        with suppress(RuntimeError):  # the event loop has been closed
            loop.call_soon_threadsafe(callback)

    Thread(target=run, daemon=True).start()
    return await future


async def offload(document: bytes, work: Callable[[], T]) -> T:
    """Return the result of `work`, run in a thread if the document is large, so that it does not
    block the event loop."""
    return work() if len(document) < OFFLOAD_MIN else await asyncio.to_thread(work)


async def map_concurrently(
    function: Callable[[ItemT], Awaitable[T]], items: Iterable[ItemT], limit: int
) -> list[T]:
    """Return the results of `function` for the items, in their order.

    limit: of the calls that run at once.

    Raises: the first error of a call, after the other calls were cancelled.
    """
    slots = asyncio.Semaphore(limit)

    async def call(item: ItemT) -> T:
        async with slots:
            return await function(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call(item)) for item in items]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def wait_while_responsive(
    futures: Iterable[asyncio.Future[Any]], seconds: float, parts: int = 10
) -> float:
    """Wait until one of the futures is done, for at most `seconds` of an event loop that responds.

    Return the seconds that passed. Of each part of them, no more counts than its length: a loop
    that is busy needs several turns to read a response that has arrived.
    """
    waiting, loop = [*futures], asyncio.get_running_loop()
    part, total = seconds / parts, 0.0
    for _ in range(parts):
        started = loop.time()
        done, _pending = await asyncio.wait(
            waiting, timeout=part, return_when=asyncio.FIRST_COMPLETED
        )
        total += min(loop.time() - started, part)
        if done:
            break
    return total


class ResponsiveDeadlines(Generic[KeyT]):
    """Deadlines of operations, each the same time after its start. Only time in which the event
    loop responds counts: of each turn of a busy loop, which needs several turns to read a reply
    that has arrived, DEADLINE_INTERVAL counts.

    There is one timer for all of them: thousands would make the loop busier still.

    seconds: of each operation.
    on_expired: called with each operation whose deadline has passed, once.
    """

    def __init__(self, seconds: float, on_expired: Callable[[KeyT], None]) -> None:
        self._seconds = seconds
        self._on_expired = on_expired
        self._deadlines: dict[KeyT, float] = {}  # by age
        self._now = 0.0  # by a clock that runs while there are deadlines
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<ResponsiveDeadlines of {len(self._deadlines)} operations>"

    def add(self, key: KeyT) -> None:
        self._deadlines[key] = self._now + self._seconds
        if self._timer is None:
            self._start_timer()

    def remove(self, key: KeyT) -> None:
        self._deadlines.pop(key, None)

    def close(self) -> None:
        """Stop the timer. The next operation starts it again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(DEADLINE_INTERVAL, self._check, loop.time())

    def _check(self, started_at: float) -> None:
        elapsed = asyncio.get_running_loop().time() - started_at
        self._now += min(elapsed, DEADLINE_INTERVAL)
        while self._deadlines:
            key, deadline = next(iter(self._deadlines.items()))
            if deadline > self._now:
                self._start_timer()
                return
            del self._deadlines[key]
            self._on_expired(key)
        self._timer = None


class ResponsiveTimeout:
    """Like `asyncio.timeout`, for many tasks; only time in which the event loop responds counts."""

    def __init__(self, seconds: float) -> None:
        self._deadlines = ResponsiveDeadlines[asyncio.Timeout](seconds, expire)

    def __repr__(self) -> str:
        return f"<ResponsiveTimeout {self._deadlines!r}>"

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Context that takes as long as this timeout at most. Raises: TimeoutError."""
        async with asyncio.timeout(None) as scope:
            self._deadlines.add(scope)
            try:
                yield
            finally:
                self._deadlines.remove(scope)

    def close(self) -> None:
        self._deadlines.close()


def expire(scope: asyncio.Timeout) -> None:
    scope.reschedule(asyncio.get_running_loop().time())


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, for at most `seconds`."""
    with suppress(TimeoutError):  # callers do not need the outcome
        async with asyncio.timeout(seconds):
            await event.wait()


async def cancel_tasks(
    tasks: Iterable[asyncio.Task[Any]],
    *,
    timeout: float = CANCEL_TIMEOUT,  # noqa: ASYNC109 - it must not cancel the wait itself
    interval: float = CANCEL_INTERVAL,
) -> None:
    """Cancel tasks again and again until they have ended: a library may turn a cancellation into an
    error of its own, so that a single one is lost. Tasks that do not end are logged and abandoned.

    interval: seconds between two cancellations.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    pending = {*tasks}
    while pending:
        for task in pending:
            task.cancel()
        if (seconds := deadline - loop.time()) <= 0:
            logger.warning("%d tasks do not end and are abandoned", len(pending))
            return
        done, pending = await asyncio.wait(pending, timeout=min(interval, seconds))
        for task in done:
            if not task.cancelled():
                task.exception()  # marks it as retrieved


async def close_within(
    closing: Awaitable[object],
    name: str,
    timeout: float = CLOSE_TIMEOUT,  # noqa: ASYNC109 - it must not cancel the wait itself
) -> None:
    """Await the end of a resource, and log it if it takes too long or fails.

    name: of the resource, in the log.
    """
    task = asyncio.ensure_future(closing)
    await asyncio.wait((task,), timeout=timeout)
    if not task.done():
        logger.warning("%s could not be closed in time", name)
        await cancel_tasks([task], timeout=CANCEL_INTERVAL)
    elif not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("%s could not be closed: %s", name, type(error).__name__)
