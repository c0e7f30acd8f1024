"""Returns freed memory to the system while the process is idle."""

import asyncio
import sys
import time
from collections.abc import Callable
from functools import partial

# Parameters of glibc's `mallopt` (malloc.h). By default, glibc shrinks and grows the end of the
# heap with every few pieces of a large body, and never returns free memory in the middle of it.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TRIM_THRESHOLD_BYTES = 16 * 2**20  # free bytes kept at the end of the heap
# Size of an allocation that is mapped from the system; bodies come in pieces of 256 KiB.
MMAP_THRESHOLD_BYTES = 2**20
POLL_INTERVAL = 1.0  # seconds
WORK_MIN = 0.1  # CPU seconds after which there may be memory to return
REPEAT_CHECKS = 40  # until an idle moment is reported again; idle connections to fal end before
IDLE_SHARE = 0.5  # of a core; a busier process is not stopped for the millisecond that a trim takes


class IdleDetector:
    """Reports that the process has become idle after some work, and once more after
    `REPEAT_CHECKS` calls, when idle connections have been closed.

    clock: CPU seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self._last_cpu_time = clock()
        self._work_since_idle = 0.0
        self._checks_to_repeat = 0

    def __call__(self) -> bool:
        before, self._last_cpu_time = self._last_cpu_time, self._clock()
        work = self._last_cpu_time - before
        self._work_since_idle += work
        self._checks_to_repeat = max(0, self._checks_to_repeat - 1)
        if work >= IDLE_SHARE * POLL_INTERVAL:
            return False
        if self._work_since_idle >= WORK_MIN:
            self._work_since_idle = 0.0
            self._checks_to_repeat = REPEAT_CHECKS
            return True
        return self._checks_to_repeat == 1


def trim_when_idle() -> None:
    """Start to trim the heap in idle moments, for as long as the running event loop runs."""
    start_after_work(asyncio.get_running_loop(), time.process_time() + WORK_MIN)


def start_after_work(loop: asyncio.AbstractEventLoop, cpu_deadline: float) -> None:
    """Wait until the process has done some work, since `ctypes` itself takes memory, then start.

    cpu_deadline: CPU seconds of the process.
    """
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
    """Configure glibc and return its `malloc_trim`, None for another C library."""
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
