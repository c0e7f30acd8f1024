"""Operations of a store that wait at the same time, run together in the store's thread.

A store that commits to the disk takes about as long for many operations as for one: those that come
while a group is running are the next group. Each group costs one switch to the thread and back.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

OperationT = TypeVar("OperationT")
ReturnT = TypeVar("ReturnT")

GROUP_MAX = 200  # operations


@dataclass(frozen=True, slots=True)
class Failure:
    """The outcome of an operation that failed."""

    error: Exception


class OperationGroups(Generic[OperationT]):
    """A thread, and the operations that wait for it.

    An operation runs even if its caller is cancelled. Operations run in the order in which they
    were added.

    name: of the thread.
    run_group: runs a group in the thread and returns its outcomes: results and `Failure`s.
    """

    def __init__(
        self, name: str, run_group: Callable[[Sequence[OperationT]], Sequence[object]]
    ) -> None:
        self._run_group = run_group
        self._executor = ThreadPoolExecutor(1, name)
        self._waiting: list[tuple[OperationT, asyncio.Future[Any]]] = []
        self._is_running = False

    def __repr__(self) -> str:
        return f"<OperationGroups {len(self._waiting)} waiting>"

    def add(self, operation: OperationT) -> "asyncio.Future[Any]":
        """Return the result of an operation, which runs in the next group."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((operation, future))
        if not self._is_running:
            self._is_running = True
            loop.call_soon(self._start, loop)  # after the callers of this iteration of the loop
        return future

    def run_alone(self, work: Callable[[], ReturnT]) -> "asyncio.Future[ReturnT]":
        """Return the result of a function, which runs in the thread between two groups."""
        return asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def close(self, work: Callable[[], None]) -> None:
        """Run the operations that wait, then `work`, and end the thread."""
        while self._waiting:
            await asyncio.wait([future for _, future in self._waiting])
        await self.run_alone(work)
        self._executor.shutdown(wait=False)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        group, self._waiting = self._waiting[:GROUP_MAX], self._waiting[GROUP_MAX:]
        operations = [operation for operation, _ in group]
        futures = [future for _, future in group]
        running = loop.run_in_executor(self._executor, self._run_group, operations)

        def end(ended: "asyncio.Future[Sequence[object]]") -> None:
            self._is_running = bool(self._waiting)
            if self._is_running:
                self._start(loop)
            complete(futures, ended)

        running.add_done_callback(end)


def complete(
    futures: Sequence["asyncio.Future[Any]"], ended: "asyncio.Future[Sequence[object]]"
) -> None:
    """Give the callers of a group its outcomes. Those that were cancelled get none."""
    if ended.cancelled():
        for future in futures:
            future.cancel()
        return
    error = ended.exception()
    outcomes = ended.result() if error is None else [error] * len(futures)
    for future, outcome in zip(futures, outcomes, strict=True):
        if future.done():
            continue
        if isinstance(outcome, Failure):
            future.set_exception(outcome.error)
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(outcome)
