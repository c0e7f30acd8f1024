"""What is free again goes back to the system, when nobody has to wait for it."""

import asyncio
import subprocess
import sys

import pytest

from falproxy.server.memory import (
    IDLE_SHARE,
    POLL_INTERVAL,
    WORK_MIN,
    IdleDetector,
    check_idle,
    load_malloc_trim,
)

# Every eighth of many pieces is kept, so that nothing is free at the end of the heap.
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
    ("used", "is_calm"),
    [
        pytest.param(WORK_MIN / 2, False, id="nothing to give back"),
        pytest.param(IDLE_SHARE * POLL_INTERVAL / 2, True, id="little to do"),
        pytest.param(POLL_INTERVAL, False, id="a core's whole time"),
    ],
)
def test_who_is_busy_or_idle_gives_nothing_back(used: float, is_calm: bool) -> None:
    now = [7.0]
    calm = IdleDetector(lambda: now[0])
    now[0] += used
    assert calm() is is_calm


def test_it_is_calm_again_when_the_work_is_done() -> None:
    now = [7.0]
    calm = IdleDetector(lambda: now[0])
    now[0] += POLL_INTERVAL
    assert not calm()
    assert calm()
    assert not calm(), "once is enough"


@pytest.mark.parametrize("is_calm", [True, False])
async def test_memory_is_given_back_when_it_is_calm_and_another_look_follows(is_calm: bool) -> None:
    seen: list[bool] = []
    loop = asyncio.get_running_loop()
    later = check_idle(loop, lambda: is_calm, lambda: seen.append(True))
    assert seen == [True] * is_calm
    assert later.when() - loop.time() == pytest.approx(POLL_INTERVAL, abs=0.5)
    later.cancel()


@pytest.mark.skipif(load_malloc_trim() is None, reason="the C library is not glibc")
def test_free_memory_between_what_is_kept_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20_000_000
