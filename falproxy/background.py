"""Tasks that outlive the request that started them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from weakref import WeakSet

from aiohttp import web

from falproxy.concurrency import cancel_tasks

logger = logging.getLogger(__name__)


class ShutdownDeadline:
    """The time at which the end of an application has to be over.

    seconds: from the start of the shutdown.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends_at: float | None = None

    def __repr__(self) -> str:
        return f"<ShutdownDeadline {'not ' if self._ends_at is None else ''}started>"

    async def start(self, app: web.Application) -> None:
        self._ends_at = asyncio.get_running_loop().time() + self._seconds

    def limit(self, seconds: float) -> float:
        if self._ends_at is None:
            return seconds
        return max(0.0, min(seconds, self._ends_at - asyncio.get_running_loop().time()))


SHUTDOWN_DEADLINE = web.AppKey("falproxy.shutdown_deadline", ShutdownDeadline)


def time_left(app: web.Application, seconds: float) -> float:
    """Return the seconds that one resource may take to close, at most `seconds`."""
    deadline = app.get(SHUTDOWN_DEADLINE)
    return seconds if deadline is None else deadline.limit(seconds)


class Background:
    """A set of running tasks. A task that fails is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancel_on_close = WeakSet[asyncio.Task[None]]()
        self._is_closing = False

    def __repr__(self) -> str:
        return f"<Background {len(self._tasks)} tasks>"

    def spawn(
        self, work: Coroutine[object, object, None], *, cancel_on_close: bool = False
    ) -> None:
        """Start a task.

        cancel_on_close: cancel it at shutdown immediately, without the grace period.
        """
        if cancel_on_close and self._is_closing:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        if cancel_on_close:
            self._cancel_on_close.add(task)
        task.add_done_callback(self._on_done)

    async def close(self, grace_period: float) -> None:
        """Wait for the tasks, and cancel those that are still running after `grace_period`
        seconds."""
        self._is_closing = True
        for task in tuple(self._cancel_on_close):
            task.cancel()
        tasks = tuple(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=grace_period)
        await cancel_tasks(tasks)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("A background task failed", exc_info=error)


def background_context(
    background: Background, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Return a cleanup context that closes `background` at the end.

    grace_period: seconds for the tasks that are running then.
    """

    async def background_cleanup(app: web.Application) -> AsyncIterator[None]:
        yield
        await background.close(time_left(app, grace_period))

    return background_cleanup
