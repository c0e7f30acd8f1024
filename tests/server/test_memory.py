"""Freed memory is returned to the system while the process is idle."""

import asyncio
import subprocess
import sys

import pytest

from falproxy.server.memory import (
    IDLE_SHARE,
    POLL_INTERVAL,
    REPEAT_CHECKS,
    WORK_MIN,
    IdleDetector,
    check_idle,
    load_malloc_trim,
)

# Every eighth piece stays allocated, so that the end of the heap is in use.
HOLES = """
from falproxy.server.memory import load_malloc_trim

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

trim = load_malloc_trim()
pieces = [bytes(100_000) for _ in range(400)]
kept = pieces[::8]
del pieces
held = resident()
trim()
print(held - resident())
"""


@pytest.mark.parametrize(
    ("used", "is_idle"),
    [
        pytest.param(WORK_MIN / 2, False, id="too little work before"),
        pytest.param(IDLE_SHARE * POLL_INTERVAL / 2, True, id="idle"),
        pytest.param(POLL_INTERVAL, False, id="busy"),
    ],
)
def test_idle_is_reported_after_some_work_only(used: float, is_idle: bool) -> None:
    now = [7.0]
    calm = IdleDetector(lambda: now[0])
    now[0] += used
    assert calm() is is_idle


def test_idle_is_reported_again_after_more_work() -> None:
    now = [7.0]
    calm = IdleDetector(lambda: now[0])
    now[0] += POLL_INTERVAL
    assert not calm()
    assert calm()
    assert not calm(), "once is enough"


def test_idle_is_reported_once_more_when_connections_have_ended() -> None:
    now = [7.0]
    calm = IdleDetector(lambda: now[0])
    now[0] += 2 * WORK_MIN
    assert [calm() for _ in range(3 * REPEAT_CHECKS)].count(True) == 2
    now[0] += 2 * WORK_MIN
    assert calm()
    now[0] += POLL_INTERVAL
    assert not calm(), "busy again"


@pytest.mark.parametrize("is_idle", [True, False])
async def test_the_heap_is_trimmed_when_idle_and_checked_again(is_idle: bool) -> None:
    seen: list[bool] = []
    loop = asyncio.get_running_loop()
    later = check_idle(loop, lambda: is_idle, lambda: seen.append(True))
    assert seen == [True] * is_idle
    assert later.when() - loop.time() == pytest.approx(POLL_INTERVAL, abs=0.5)
    later.cancel()


@pytest.mark.skipif(load_malloc_trim() is None, reason="the C library is not glibc")
def test_free_memory_in_the_middle_of_the_heap_is_returned() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20_000_000
