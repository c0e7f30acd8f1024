"""Background tasks and the end of the application."""

import asyncio

from falproxy.background import Background


async def test_tasks_that_end_with_the_application_do_not_start_during_its_end() -> None:
    background, started = Background(), asyncio.Event()

    async def follow() -> None:
        started.set()
        await asyncio.Event().wait()

    async def cancel_job() -> None:
        await asyncio.sleep(0)
        background.spawn(follow(), cancel_on_close=True)

    background.spawn(cancel_job())
    await background.close(5)
    await asyncio.sleep(0)
    assert not started.is_set()
