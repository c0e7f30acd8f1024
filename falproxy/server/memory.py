"""Memory that is free again: kept while there is much to do, given back to the system when not."""

import asyncio
import sys
import time
from collections.abc import Callable
from functools import partial

# Of glibc's `mallopt` (malloc.h). Left alone, it gives the end of its heap back and asks for it
# again with every few pieces of a large body, and never gives back what is free in the middle.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TRIM_THRESHOLD_BYTES = 16 * 2**20  # bytes at the end of the heap that it keeps
MMAP_THRESHOLD_BYTES = (
    2**20
)  # bytes from which on a piece is the system's own; bodies come in pieces of 256 KiB
POLL_INTERVAL = 1.0  # seconds from one look to the next
WORK_MIN = 0.1  # seconds of work that may have left something to give back
IDLE_SHARE = 0.5  # of a core: who uses more of it does not wait, about a millisecond, for this


class IdleDetector:
    """Whether the process has little to do now, and had something to do since it was calm the last
    time. clock: of CPU seconds."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self._last_cpu_time = clock()
        self._work_since_idle = 0.0

    def __call__(self) -> bool:
        before, self._last_cpu_time = self._last_cpu_time, self._clock()
        share = self._last_cpu_time - before
        self._work_since_idle += share
        if share >= IDLE_SHARE * POLL_INTERVAL or self._work_since_idle < WORK_MIN:
            return False
        self._work_since_idle = 0.0
        return True


def trim_when_idle() -> None:
    """From now on, for as long as the running event loop runs."""
    start_after_work(asyncio.get_running_loop(), time.process_time() + WORK_MIN)


def start_after_work(loop: asyncio.AbstractEventLoop, cpu_deadline: float) -> None:
    """What gives memory back takes some itself, which a process that nobody calls is spared.
    until: CPU seconds of the process."""
    if time.process_time() < cpu_deadline:
        loop.call_later(POLL_INTERVAL, start_after_work, loop, cpu_deadline)
    elif trim := load_malloc_trim():
        check_idle(loop, IdleDetector(), trim)


def check_idle(
    loop: asyncio.AbstractEventLoop, is_idle: Callable[[], bool], trim: Callable[[], object]
) -> asyncio.TimerHandle:
    if is_idle():
        trim()
    return loop.call_later(POLL_INTERVAL, check_idle, loop, is_idle, trim)


def load_malloc_trim() -> Callable[[], object] | None:
    """What gives free memory back. None where the C library is not glibc, and is left alone."""
    if sys.platform != "linux":
        return None
    try:
        import ctypes  # 0.3 MB

        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (ImportError, OSError, AttributeError):
        return None
    mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    return partial(trim, 0)
