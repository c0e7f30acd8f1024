"""Work that all concurrent callers with the same key share."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Generic, TypeVar

from falproxy.concurrency import cancel_tasks

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SharedTasks(Generic[K, T]):
    """One running task for each key.

    cancel_unused: cancel a task when all its callers have been cancelled; otherwise it runs to its
        end, for the callers to come.
    """

    def __init__(self, *, cancel_unused: bool = False) -> None:
        self._tasks: dict[K, asyncio.Task[T]] = {}
        self._callers: dict[K, int] = {}
        self._running: set[asyncio.Task[T]] = set()  # with those that are being cancelled
        self._cancel_unused = cancel_unused

    def __repr__(self) -> str:
        return f"<SharedTasks {list(self._tasks)}>"

    def __len__(self) -> int:
        return len(self._tasks)

    def get(self, key: K) -> asyncio.Task[T] | None:
        return self._tasks.get(key)

    def running(self) -> list[asyncio.Task[T]]:
        return [*self._tasks.values()]

    def start(self, key: K, work: Callable[[], Coroutine[object, object, T]]) -> asyncio.Task[T]:
        """Return the task with this key, started now unless it is running."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.get_running_loop().create_task(work())
            self._callers[key] = 0
            self._running.add(task)
            task.add_done_callback(lambda ended: self._on_done(key, ended))
        return task

    async def run(self, key: K, work: Callable[[], Coroutine[object, object, T]]) -> T:
        """Return the result of the task with this key, started now unless it is running.

        Raises: the exception of the task, to each caller.
        """
        task = self.start(key, work)
        self._callers[key] += 1
        try:
            return await asyncio.shield(task)
        finally:
            if self._tasks.get(key) is task:
                self._callers[key] -= 1
                if self._cancel_unused and not self._callers[key]:
                    del self._tasks[key], self._callers[key]
                    task.cancel()

    async def close(self) -> None:
        """Cancel the tasks that are running, and wait for their end."""
        await cancel_tasks(tuple(self._running))

    def _on_done(self, key: K, task: asyncio.Task[T]) -> None:
        self._running.discard(task)
        if self._tasks.get(key) is task:
            del self._tasks[key], self._callers[key]
        if not task.cancelled():
            task.exception()  # a task without callers must not log that nothing read its exception
