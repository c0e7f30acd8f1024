"""Blocking work in threads, and waiting with a time limit.

A daemon thread that hangs does not keep the process from exiting, as one of asyncio's executor
would.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

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


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, for at most `seconds`."""
    with suppress(TimeoutError):  # callers do not need the outcome
        async with asyncio.timeout(seconds):
            await event.wait()
