"""The time limit of each test, on both event loops."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.event_loops import EVENT_LOOPS

SECONDS = 0.05


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


@pytest.mark.parametrize("name", EVENT_LOOPS)
def test_a_test_that_waits_without_end_fails(name: str) -> None:
    with (
        time_limit(SECONDS),
        asyncio.Runner(loop_factory=EVENT_LOOPS[name]) as runner,
        pytest.raises((pytest.fail.Exception, RuntimeError), match=r"time limit|stopped"),
    ):
        runner.run(asyncio.Event().wait())
