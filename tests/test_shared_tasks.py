"""SharedTasks: concurrent callers with one key share one task."""

import asyncio

import pytest

from falproxy.shared_tasks import SharedTasks


class Work:
    """A task that waits for `finish`, and counts its starts and cancellations."""

    def __init__(self) -> None:
        self.starts = self.cancellations = 0
        self.finish = asyncio.Event()

    async def __call__(self) -> int:
        self.starts += 1
        try:
            await self.finish.wait()
        except asyncio.CancelledError:
            self.cancellations += 1
            raise
        return self.starts


async def start(count: int, shared: SharedTasks[str, int], work: Work) -> list[asyncio.Task[int]]:
    callers = [asyncio.ensure_future(shared.run("a", work)) for _ in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return callers


async def test_concurrent_callers_get_the_result_of_one_task() -> None:
    shared, work = SharedTasks[str, int](), Work()
    callers = await start(5, shared, work)
    work.finish.set()
    assert await asyncio.gather(*callers) == [1] * 5
    assert await shared.run("a", work) == 2
    assert len(shared) == 0


async def test_different_keys_are_different_tasks() -> None:
    shared, work = SharedTasks[str, int](), Work()
    work.finish.set()
    assert [*await asyncio.gather(shared.run("a", work), shared.run("b", work))] == [1, 2]


async def test_each_caller_gets_the_exception() -> None:
    async def fail() -> int:
        raise OSError("no")

    shared = SharedTasks[str, int]()
    results = await asyncio.gather(
        *(shared.run("a", fail) for _ in range(3)), return_exceptions=True
    )
    assert [type(result) for result in results] == [OSError] * 3


@pytest.mark.parametrize("cancel_unused", [False, True])
async def test_a_caller_that_leaves_does_not_cancel_the_others(cancel_unused: bool) -> None:
    shared, work = SharedTasks[str, int](cancel_unused=cancel_unused), Work()
    first, second = await start(2, shared, work)
    first.cancel()
    await asyncio.sleep(0)
    work.finish.set()
    assert await second == 1


async def test_a_task_without_callers_runs_to_its_end() -> None:
    shared, work = SharedTasks[str, int](), Work()
    (caller,) = await start(1, shared, work)
    caller.cancel()
    await asyncio.sleep(0)
    (other,) = await start(1, shared, work)
    work.finish.set()
    assert await other == 1
    assert work.cancellations == 0


async def test_a_task_without_callers_is_cancelled_if_configured() -> None:
    shared, work = SharedTasks[str, int](cancel_unused=True), Work()
    for caller in await start(2, shared, work):
        caller.cancel()
    await asyncio.sleep(0.01)
    assert (work.cancellations, len(shared)) == (1, 0)
    work.finish.set()
    assert await shared.run("a", work) == 2


async def test_close_cancels_running_tasks() -> None:
    shared, work = SharedTasks[str, int](), Work()
    (caller,) = await start(1, shared, work)
    await shared.close()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert (work.cancellations, len(shared)) == (1, 0)
