"""Calls at once, and the end of tasks: a cancellation that is lost, and a close that hangs."""

import asyncio
import time

import pytest

from falproxy.concurrency import (
    ResponsiveTimeout,
    cancel_tasks,
    close_within,
    map_concurrently,
)


async def swallow(times: int) -> None:
    """Turn a number of cancellations into errors, as redis-py does while it connects."""
    for _ in range(times):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue
    await asyncio.sleep(60)


async def test_a_task_is_cancelled_until_it_ends() -> None:
    tasks = [asyncio.create_task(swallow(times)) for times in (0, 1, 3)]
    await asyncio.sleep(0)
    await cancel_tasks(tasks, interval=0.02)
    assert all(task.cancelled() for task in tasks)


async def test_a_task_that_never_ends_is_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    task = asyncio.create_task(swallow(1000))
    await asyncio.sleep(0)
    started = time.monotonic()
    await cancel_tasks([task], timeout=0.2, interval=0.05)
    assert time.monotonic() - started < 1.0
    assert "abandoned" in caplog.text
    await cancel_tasks([task], timeout=5, interval=0.0001)


async def test_a_task_may_finish_its_work_between_two_cancellations() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            ended = True

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await cancel_tasks([task], interval=1.0)
    assert ended


async def test_the_error_of_a_cancelled_task_is_not_raised() -> None:
    async def fail() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            raise ValueError from error

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await cancel_tasks([task])
    assert task.done()


async def test_a_close_that_hangs_is_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    await close_within(asyncio.sleep(60), "The store", 0.05)
    assert time.monotonic() - started < 1.0
    assert "The store could not be closed in time" in caplog.text


async def test_a_close_that_fails_is_logged_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise OSError("an address")

    await close_within(fail(), "The store")
    assert "The store could not be closed: OSError" in caplog.text
    assert "an address" not in caplog.text


async def test_a_timeout_ends_what_begins_after_its_close() -> None:
    limits = ResponsiveTimeout(0.1)
    async with limits.limit():
        limits.close()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10), limits.limit():
            await asyncio.sleep(60)
    assert time.monotonic() - started < 5
    limits.close()


async def test_results_are_in_the_order_of_the_items() -> None:
    async def wait(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    assert await map_concurrently(wait, [0.03, 0.0, 0.02], limit=3) == [0.03, 0.0, 0.02]
    assert await map_concurrently(wait, [], limit=3) == []


async def test_no_more_calls_run_at_once_than_the_limit() -> None:
    running, most = 0, 0

    async def count(_: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    await map_concurrently(count, range(20), limit=4)
    assert most == 4


async def test_the_first_error_is_raised_after_the_other_calls_have_ended() -> None:
    ended = []

    async def fail(number: int) -> None:
        try:
            await asyncio.sleep(60 if number else 0)
        finally:
            ended.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0") as caught:
        await map_concurrently(fail, range(3), limit=3)
    assert caught.value.__suppress_context__
    assert sorted(ended) == [0, 1, 2]


async def test_a_cancellation_ends_all_calls() -> None:
    cancelled = 0

    async def wait(_: int) -> None:
        nonlocal cancelled
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled += 1
            raise

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await map_concurrently(wait, range(3), limit=3)
    assert cancelled == 3
