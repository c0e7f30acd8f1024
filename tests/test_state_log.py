"""Log lines about a state that changes often."""

import asyncio
import logging

import pytest

from falproxy.state_log import BURST, WINDOW, StateLog
from tests.support.virtual_time import run_in_virtual_time

logger = logging.getLogger("falproxy.tests")


def texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == logger.name]


def test_a_state_that_changes_now_and_then_is_logged_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def change() -> None:
        log = StateLog(logger)
        for number in range(3 * BURST):
            log.warning("change %d", number)
            await asyncio.sleep(WINDOW / BURST + 0.1)

    run_in_virtual_time(change())
    assert texts(caplog) == [f"change {number}" for number in range(3 * BURST)]


def test_a_state_that_alternates_is_logged_a_few_times_and_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def change() -> None:
        log = StateLog(logger)
        for number in range(150):
            log.warning("it is %s", "away" if number % 2 == 0 else "back")
            await asyncio.sleep(0.2)
        await asyncio.sleep(2 * WINDOW)
        log.warning("it is away")
        await asyncio.sleep(2 * WINDOW)

    run_in_virtual_time(change())
    last = f"it is back (after {150 - BURST} changes within 60 s)"
    assert texts(caplog) == [*["it is away", "it is back"] * (BURST // 2), last, "it is away"]


def test_a_state_that_alternates_for_long_is_logged_once_in_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def change() -> None:
        log = StateLog(logger)
        for _ in range(3600):
            log.warning("it is away")
            log.warning("it is back")
            await asyncio.sleep(1)

    run_in_virtual_time(change())
    assert 60 / WINDOW * 59 <= len(texts(caplog)) <= BURST * 61
    assert texts(caplog)[-1].startswith("it is back")
