"""The time limit of each test, on both event loops."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.event_loops import new_uvloop, uvloop

SECONDS = 0.05
LOOPS = [asyncio.new_event_loop, *([] if uvloop is None else [new_uvloop])]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Context: after the time a test fails, as it does with pytest-timeout; then that one's own
    limit goes on."""

    def fail(*_: object) -> None:
        pytest.fail("time limit")

    handler = signal.signal(signal.SIGALRM, fail)
    limit, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, limit)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_test_that_waits_without_end_fails(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    with (
        time_limit(SECONDS),
        asyncio.Runner(loop_factory=new_loop) as runner,
        pytest.raises((pytest.fail.Exception, RuntimeError), match=r"time limit|stopped"),
    ):
        runner.run(asyncio.Event().wait())
