"""Work that nobody waits for, and that is brought to its end all the same."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from weakref import WeakSet

from aiohttp import web

logger = logging.getLogger(__name__)


class Background:
    """What is under way. A failure is logged: there is nobody else to tell."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancel_on_close = WeakSet[asyncio.Task[None]]()

    def spawn(
        self, work: Coroutine[object, object, None], *, cancel_on_close: bool = False
    ) -> None:
        """Start a task.

        cancel_on_close: cancel it at shutdown immediately, without the grace period.
        """
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        if cancel_on_close:
            self._cancel_on_close.add(task)
        task.add_done_callback(self._on_done)

    async def close(self, grace_period: float) -> None:
        """Lets what is under way end within so many seconds."""
        for task in tuple(self._cancel_on_close):
            task.cancel()
        tasks = tuple(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=grace_period)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Something in the background failed", exc_info=error)


def background_context(
    background: Background, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: at the end, what is under way has so many seconds."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        yield
        await background.close(grace_period)

    return context
