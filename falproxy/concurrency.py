"""Work in threads that nobody has to wait for: one that never ends does not keep the process from
ending, as those of asyncio's own executor would."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

OFFLOAD_MIN = 64 * 2**10  # bytes of a document that are not gone through on the event loop


async def run_in_daemon_thread(work: Callable[[], T]) -> T:
    """What work returns or raises."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def tell(set_answer: Callable[[], None]) -> None:
        if not answer.done():
            set_answer()

    def run() -> None:
        try:
            found = work()
            told = partial(tell, partial(answer.set_result, found))
        except Exception as error:
            told = partial(tell, partial(answer.set_exception, error))
        with suppress(RuntimeError):  # the event loop has ended meanwhile
            loop.call_soon_threadsafe(told)

    Thread(target=run, daemon=True).start()
    return await answer


async def offload(document: bytes, work: Callable[[], T]) -> T:
    """What work makes of a document: of a large one in a thread, which lets others have a turn."""
    return work() if len(document) < OFFLOAD_MIN else await asyncio.to_thread(work)
