"""Operations of a store that wait at the same time, run together as a group.

A transaction of many operations takes about as long as one of a single operation, and so does a
round trip to a server. Operations that come while groups are running are the next group.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

OperationT = TypeVar("OperationT")

GROUP_MAX = 200  # operations


@dataclass(frozen=True, slots=True)
class Failure:
    """The outcome of an operation that failed."""

    error: Exception


class OperationGroups(Generic[OperationT]):
    """The operations that wait. They start in the order in which they were added. The operation of
    a caller that was cancelled before it started is not run.

    start: starts a group. The future has its outcomes: results and `Failure`s. All operations of a
        group that cannot be started fail with its exception.
    concurrency: groups that run at the same time.
    """

    def __init__(
        self,
        start: Callable[[Sequence[OperationT]], "asyncio.Future[Sequence[object]]"],
        concurrency: int = 1,
    ) -> None:
        self._start = start
        self._concurrency = concurrency
        self._waiting: list[tuple[OperationT, asyncio.Future[Any]]] = []
        self._running = 0
        self._is_scheduled = False

    def __repr__(self) -> str:
        return f"<OperationGroups {self._running} running, {len(self._waiting)} operations waiting>"

    def add(self, operation: OperationT) -> "asyncio.Future[Any]":
        """Return the result of an operation."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((operation, future))
        if not self._is_scheduled and self._running < self._concurrency:
            self._is_scheduled = True
            loop.call_soon(self._start_group)  # with all others of this iteration of the loop
        return future

    async def wait_started(self) -> None:
        """Wait until no operation is waiting."""
        while waiting := [future for _, future in self._waiting if not future.done()]:
            await asyncio.wait(waiting)

    def _start_group(self) -> None:
        self._is_scheduled = False
        waiting = [pair for pair in self._waiting if not pair[1].done()]
        group, self._waiting = waiting[:GROUP_MAX], waiting[GROUP_MAX:]
        if not group:
            return
        futures = [future for _, future in group]
        self._running += 1
        try:
            running = self._start([operation for operation, _ in group])
        except Exception as error:
            running = asyncio.get_running_loop().create_future()
            running.set_exception(error)

        def end(ended: "asyncio.Future[Sequence[object]]") -> None:
            self._running -= 1
            if self._waiting and not self._is_scheduled:
                self._start_group()
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
    outcomes = [error] * len(futures) if error is not None else ended.result()
    for future, outcome in zip(futures, outcomes, strict=True):
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        elif isinstance(outcome, Failure):
            future.set_exception(outcome.error)
        else:
            future.set_result(outcome)
