"""Memory that is free again: kept while there is much to do, given back to the system when not."""

import asyncio
import sys
import time
from collections.abc import Callable
from functools import partial

# Of glibc's `mallopt` (malloc.h). Left alone, it gives the end of its heap back and asks for it
# again with every few pieces of a large body, and never gives back what is free in the middle.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
END_MAX = 16 * 2**20  # bytes at the end of the heap that it keeps
LARGE = 2**20  # bytes from which on a piece is the system's own; bodies come in pieces of 256 KiB
LOOK = 1.0  # seconds from one look to the next
WORTH = 0.1  # seconds of work that may have left something to give back
IDLE_SHARE = 0.5  # of a core: who uses more of it does not wait, about a millisecond, for this


class Calm:
    """Whether the process has little to do now, and had something to do since it was calm the last
    time. clock: of CPU seconds."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self._used = clock()
        self._done = 0.0

    def __call__(self) -> bool:
        before, self._used = self._used, self._clock()
        share = self._used - before
        self._done += share
        if share >= IDLE_SHARE * LOOK or self._done < WORTH:
            return False
        self._done = 0.0
        return True


def give_back_when_calm() -> None:
    """From now on, for as long as the running event loop runs."""
    await_work(asyncio.get_running_loop(), time.process_time() + WORTH)


def await_work(loop: asyncio.AbstractEventLoop, until: float) -> None:
    """What gives memory back takes some itself, which a process that nobody calls is spared.
    until: CPU seconds of the process."""
    if time.process_time() < until:
        loop.call_later(LOOK, await_work, loop, until)
    elif trim := trimmer():
        look(loop, Calm(), trim)


def look(
    loop: asyncio.AbstractEventLoop, is_calm: Callable[[], bool], trim: Callable[[], object]
) -> asyncio.TimerHandle:
    if is_calm():
        trim()
    return loop.call_later(LOOK, look, loop, is_calm, trim)


def trimmer() -> Callable[[], object] | None:
    """What gives free memory back. None where the C library is not glibc, and is left alone."""
    if sys.platform != "linux":
        return None
    try:
        import ctypes  # 0.3 MB

        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (ImportError, OSError, AttributeError):
        return None
    mallopt(TRIM_THRESHOLD, END_MAX)
    mallopt(MMAP_THRESHOLD, LARGE)
    return partial(trim, 0)
