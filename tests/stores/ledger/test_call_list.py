"""The list of calls and the performance of a period, over SQLite and over PostgreSQL."""

import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from falproxy.stores.ledger import CallRecord, Ledger, Outcome
from falproxy.stores.ledger.call_list import SCAN_ROWS_MAX, CallQuery, list_calls
from falproxy.stores.ledger.performance import (
    INTERVALS_MAX,
    PART_ROWS,
    PARTS,
    Intervals,
    count_unfinished_jobs,
    read_performance,
)
from falproxy.stores.ledger.postgres import postgres_ledger
from falproxy.stores.ledger.sqlite import sqlite_ledger
from tests.support.postgres_server import PostgresServer, postgres_server

NOON = 1_800_000_000.0 - 1_800_000_000 % 86400 + 43200
HOUR, DAY = 3600.0, 86400.0


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
async def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ledger]:
    if request.param == "sqlite":
        opened = sqlite_ledger(tmp_path / "ledger.sqlite")
    else:
        opened = postgres_ledger(request.getfixturevalue("postgres").fresh())
    async with opened:
        yield opened


def record(name: str, after: float = 0.0, **columns: Any) -> CallRecord:
    """Return a call that begins `after` seconds after NOON."""
    defaults: dict[str, Any] = {"operation": "run", "endpoint": "fal-ai/flux/dev", "status": 200}
    return CallRecord(id=name, at=NOON + after, route="r", **(defaults | columns))


def job(name: str, after: float = 0.0, **columns: Any) -> CallRecord:
    defaults = {"operation": "submit", "request_id": f"fal-{name}", "seconds": 0.1}
    return record(name, after, **(defaults | {"upstream_seconds": 0.08} | columns))


def ended(name: str, seconds: float, status: int = 200, **fields: Any) -> Outcome:
    return Outcome(request_id=f"fal-{name}", status=status, ended_at=NOON + seconds, **fields)


CALLS: tuple[CallRecord | Outcome, ...] = (
    record("run", 1, seconds=2.0, upstream_seconds=1.5, settled=25_000, principal="ann"),
    record("refused", 2, status=429, error="rate_limited", principal="bob", user_id="ada"),
    record("hit", 3, cache="hit", settled=0, estimated=40_000, principal="ann", user_id="ada"),
    record("policy", 4, status=422, error_type="content_policy_violation", request_id="p"),
    job("done", 5, principal="ann", proxy_request_id="own-1"),
    ended("done", 9, run_seconds=3.0, settled=50_000),
    job("failed", 6, endpoint="fal-ai/kling", principal="bob"),
    ended("failed", 16, 503, error_type="runner_connection_error", settled=0),
    job("open", 7, principal="ann"),
)


async def names(ledger: Ledger, **filters: Any) -> list[str]:
    calls, after = await list_calls(ledger, CallQuery(**filters), 50)
    assert after is None
    return [call.record.id for call in calls]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        pytest.param({}, ["open", "failed", "done", "policy", "hit", "refused", "run"], id="none"),
        pytest.param({"caller": "ann"}, ["open", "done", "hit", "run"], id="one caller's own"),
        pytest.param({"principal": "bob"}, ["failed", "refused"], id="a principal"),
        pytest.param({"caller": "ann", "principal": "bob"}, [], id="another caller's"),
        pytest.param({"endpoint": "fal-ai/kling"}, ["failed"], id="an endpoint"),
        pytest.param({"user": "ada"}, ["hit", "refused"], id="a user"),
        pytest.param({"user": "ada", "cache": "hit"}, ["hit"], id="two filters"),
        pytest.param({"statuses": (500, 599)}, ["failed"], id="the status of an outcome"),
        pytest.param({"statuses": (429, 429)}, ["refused"], id="a status"),
        pytest.param({"state": "failed"}, ["failed", "policy", "refused"], id="failed"),
        pytest.param({"state": "ok"}, ["done", "hit", "run"], id="succeeded"),
        pytest.param({"state": "running"}, ["open"], id="not fetched"),
        pytest.param({"error": "rate_limited"}, ["refused"], id="a code of the proxy"),
        pytest.param({"error": "runner_connection_error"}, ["failed"], id="fal's type of a job"),
        pytest.param({"error": "content_policy_violation"}, ["policy"], id="fal's type of a run"),
        pytest.param({"min_seconds": 3.5}, ["failed", "done"], id="until the end of a job"),
        pytest.param({"min_cost": 0.03}, ["done"], id="the settled cost"),
        pytest.param({"request_id": "fal-done"}, ["done"], id="fal's id"),
        pytest.param({"request_id": "own-1"}, ["done"], id="the proxy's id"),
        pytest.param({"since": NOON + 6.5}, ["open"], id="since"),
        pytest.param({"until": NOON + 2}, ["run"], id="until, exclusive"),
        pytest.param({"user": "' OR 1=1 --"}, [], id="SQL is a text"),
    ],
)
async def test_calls_are_filtered(
    ledger: Ledger, filters: dict[str, Any], expected: list[str]
) -> None:
    await ledger.write(CALLS)
    assert await names(ledger, **filters) == expected


async def test_a_job_takes_until_its_end_in_three_parts(ledger: Ledger) -> None:
    await ledger.write(CALLS)
    calls, _ = await list_calls(ledger, CallQuery(), 50)
    by_id = {call.record.id: call for call in calls}
    done, run, still_running = by_id["done"], by_id["run"], by_id["open"]
    assert done.total_seconds == pytest.approx(4.0)
    assert done.run_seconds == 3.0
    assert done.own_seconds == pytest.approx(0.02)
    assert done.queue_seconds == pytest.approx(0.98)
    assert (run.total_seconds, run.run_seconds, run.queue_seconds) == (2.0, 1.5, None)
    assert (still_running.is_running, still_running.total_seconds) == (True, None)
    assert not any(call.is_running for call in calls if call is not still_running)
    assert by_id["failed"].record.error_type == "runner_connection_error"


@pytest.mark.parametrize("limit", [1, 3, 7, 50])
async def test_pages_have_each_call_once(ledger: Ledger, limit: int) -> None:
    await ledger.write([record(f"c{n}", n // 5) for n in range(30)])
    seen: list[str] = []
    query = CallQuery()
    while True:
        calls, after = await list_calls(ledger, query, limit)
        assert len(calls) <= limit
        seen += [call.record.id for call in calls]
        if after is None:
            break
        query = CallQuery(after=after)
    assert len(seen) == len({*seen}) == 30


async def test_rare_calls_are_found_beyond_the_rows_of_one_query(tmp_path: Path) -> None:
    async with sqlite_ledger(tmp_path / "ledger.sqlite") as ledger:
        await ledger.write([record("rare", 0, user_id="ada")])
        await ledger.write([record(f"c{n}", 1 + n / 100) for n in range(SCAN_ROWS_MAX + 50)])
        found: list[str] = []
        query = CallQuery(user="ada")
        while True:
            calls, after = await list_calls(ledger, query, 10)
            found += [call.record.id for call in calls]
            if after is None:
                break
            query = CallQuery(user="ada", after=after)
    assert found == ["rare"]


async def test_durations_are_those_of_callers(ledger: Ledger) -> None:
    rows: list[CallRecord | Outcome] = []
    for n in range(1, 101):
        rows += [job(f"j{n}", n), ended(f"j{n}", 2 * n, run_seconds=n / 2)]
    await ledger.write(rows)
    found = await read_performance(ledger, NOON, NOON + HOUR, None)
    assert not found.is_sample
    assert found.total.calls == 100
    assert found.total.quantiles == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    parts = (found.total.queue, found.total.run, found.total.own)
    assert parts == pytest.approx((25.25 - 0.02, 25.25, 0.02), abs=0.001)
    assert sum(each.calls for each in found.series) == 100
    assert len(found.series) == len(found.failures) == found.intervals.count


async def test_refused_calls_and_jobs_without_an_end_have_no_duration(ledger: Ledger) -> None:
    refused: dict[str, Any] = {"status": 429, "error": "rate_limited", "seconds": 0.001}
    refused["upstream_seconds"] = 0.0
    await ledger.write([job("open"), record("run", **refused), job("submit", **refused)])
    found = await read_performance(ledger, NOON - HOUR, NOON + HOUR, None)
    assert (found.total.calls, found.total.quantiles) == (0, {})


async def test_a_sample_has_the_quantiles_of_all_calls(tmp_path: Path) -> None:
    count = 40_000
    async with sqlite_ledger(tmp_path / "ledger.sqlite") as ledger:
        for start in range(0, count, 5000):
            await ledger.write([
                record(f"c{n}", DAY * n / count, seconds=(n * 7919 % 1000) / 100)
                for n in range(start, start + 5000)
            ])  # fmt: skip
        found = await read_performance(ledger, NOON, NOON + DAY, None)
    assert found.is_sample
    assert found.total.calls == pytest.approx(count, rel=0.1)
    assert found.total.quantiles == {
        "p50": pytest.approx(5.0, rel=0.05),
        "p95": pytest.approx(9.5, rel=0.05),
        "p99": pytest.approx(9.9, rel=0.05),
    }
    assert count > INTERVALS_MAX * PARTS * PART_ROWS


@pytest.mark.parametrize(
    ("caller", "expected"),
    [
        pytest.param(
            None,
            {
                (429, "rate_limited", "fal-ai/flux/dev"): (1, 0),
                (422, "content_policy_violation", "fal-ai/flux/dev"): (1, 0),
                (503, "runner_connection_error", "fal-ai/kling"): (1, 0),
            },
            id="all calls",
        ),
        pytest.param(
            "bob",
            {
                (429, "rate_limited", "fal-ai/flux/dev"): (1, 0),
                (503, "runner_connection_error", "fal-ai/kling"): (1, 0),
            },
            id="those of one caller",
        ),
    ],
)
async def test_failures_are_counted_by_kind(
    ledger: Ledger, caller: str | None, expected: dict[tuple[int, str, str], tuple[int, int]]
) -> None:
    await ledger.write(CALLS)
    found = await read_performance(ledger, NOON, NOON + HOUR, caller)
    assert {
        (kind.status, kind.error, kind.endpoint): (kind.present, kind.previous)
        for kind in found.kinds
    } == expected
    by_status: dict[int, int] = {}
    for each in found.failures:
        for status, number in each.items():
            by_status[status] = by_status.get(status, 0) + number
    assert by_status == {status: 1 for status, _, _ in expected}


@pytest.mark.parametrize("is_early", [True, False], ids=["before its record", "after it"])
async def test_a_failed_job_is_counted_once_in_whichever_order_it_is_written(
    ledger: Ledger, is_early: bool
) -> None:
    rows: list[CallRecord | Outcome] = [job("j"), ended("j", 3, 500)]
    for row in reversed(rows) if is_early else rows:
        await ledger.write([row])
    await ledger.write([ended("j", 5, 500, error_type="internal_error")])
    found = await read_performance(ledger, NOON, NOON + HOUR, None)
    (kind,) = found.kinds
    assert (kind.status, kind.error, kind.present) == (500, "internal_error", 1)
    assert (kind.first_at, kind.last_at) == (NOON, NOON)


async def test_a_failed_run_whose_type_comes_later_is_counted_once(ledger: Ledger) -> None:
    await ledger.write([record("r", status=422, request_id="fal-r")])
    await ledger.write([Outcome(request_id="fal-r", status=422, error_type="image_too_small")])
    (kind,) = (await read_performance(ledger, NOON, NOON + HOUR, None)).kinds
    assert (kind.status, kind.error, kind.present) == (422, "image_too_small", 1)


async def test_a_failure_that_a_success_replaced_is_not_counted(ledger: Ledger) -> None:
    await ledger.write([job("j"), ended("j", 3, 500), ended("j", 9, 200)])
    assert (await read_performance(ledger, NOON, NOON + HOUR, None)).kinds == []


async def test_failures_are_compared_with_the_period_before(ledger: Ledger) -> None:
    failed = {"status": 500, "error": "e"}
    await ledger.write([record(f"old{n}", -60 - n, **failed) for n in range(3)])
    await ledger.write([record(f"new{n}", 60 + n, **failed) for n in range(5)])
    await ledger.write([record("older", -2 * HOUR, **failed)])
    await ledger.write([record(f"gone{n}", -60, status=404, error="gone") for n in range(9)])
    found = await read_performance(ledger, NOON, NOON + HOUR, None)
    assert [(kind.error, kind.present, kind.previous) for kind in found.kinds] == [("e", 5, 3)]


@pytest.mark.parametrize("seconds", [1.0, 90.0, HOUR, DAY, 7 * DAY, 30 * DAY, 400 * DAY])
def test_the_intervals_cover_a_period(seconds: float) -> None:
    for since in (NOON, NOON + 1234.567):
        intervals = Intervals(since, since + seconds)
        assert 1 <= intervals.count <= INTERVALS_MAX
        assert intervals.first <= since
        assert intervals.first + intervals.count * intervals.step >= since + seconds


async def test_jobs_whose_result_was_not_fetched_are_counted(ledger: Ledger) -> None:
    await ledger.write(CALLS)
    assert await count_unfinished_jobs(ledger, NOON + 60) == 1
    await ledger.write([job("later", 30), ended("later", 90, 200)])
    assert await count_unfinished_jobs(ledger, NOON + 60) == 2
    assert await count_unfinished_jobs(ledger, NOON + 91) == 1
    assert await count_unfinished_jobs(ledger, NOON + 2 * HOUR) == 0
    assert await count_unfinished_jobs(ledger, time.time() + DAY * 10_000) == 0
