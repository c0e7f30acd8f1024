"""The short form of `make faults`: a few faults of each kind on one cluster."""

import logging

import pytest

from tests.support.faults.suite import PAIRS, Plan, Results, as_markdown, plan, run_plan

pytestmark = pytest.mark.slow(seconds=25)

logger = logging.getLogger(__name__)
FAULTS = [
    ("a worker is killed",),
    ("Redis is killed, and fails over",),
    ("a node is killed", "fal's responses are lost"),
]


@pytest.mark.timeout(300)
async def test_no_promise_is_broken_while_parts_fail() -> None:
    results = Results()
    await run_plan(Plan(seed=7, uses_disk=True, faults=FAULTS), results, logger.info)
    assert results.notes == []
    assert results.broken_promises == 0
    assert results.calls > 20


def test_all_faults_come_before_one_is_repeated() -> None:
    schedule = plan(3, uses_disk=True, windows=40)
    first = [names[0] for names in schedule.faults]
    kinds = len({*first})
    assert len({*first[:kinds]}) == kinds
    assert schedule == plan(3, uses_disk=True, windows=40)
    assert any(len(names) == 2 for names in schedule.faults)


def test_the_table_has_all_rows_and_their_sum() -> None:
    results = Results()
    for name, calls in (("none", 3), ("the disk is full", 4), (PAIRS, 5)):
        tally = results.tally(name)
        tally.calls, tally.doubles = calls, 1
        tally.errors["504 outcome_unknown"] += 1
        results.applied[name] += 1
    lines = as_markdown(results).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        *("none", "the disk is full", PAIRS, "**all**")
    ]
    assert lines[-1].split(" | ")[1:4] == ["3", "12", "3"]
    assert lines[-1].endswith("| 3 x 504 outcome_unknown |")
