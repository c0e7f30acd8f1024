"""Totals and summaries of SQL agree with sums in Python, over generated rows in any order."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from falproxy.stores.ledger import (
    CallRecord,
    GroupBy,
    Interval,
    Ledger,
    Outcome,
    Totals,
    UsageQuery,
    UserTotals,
)
from falproxy.stores.ledger.postgres import postgres_ledger
from falproxy.stores.ledger.sqlite import sqlite_ledger
from tests.support.postgres_server import PostgresServer, postgres_server

START = 1_800_000_000
END = START + 60 * 86400
IDS = ("r1", "r2", "r3", None)
AMOUNTS = st.none() | st.integers(0, 2**53)
NAMES = st.sampled_from(["a", "b", "", None])
# Milliseconds: anywhere, close to each other, and at the limits of hours, days and months.
MOMENTS = (
    st.integers(START * 1000, (START + 70 * 86400) * 1000)
    | st.integers(START * 1000, (START + 7200) * 1000)
    | st.builds(
        lambda length, number, offset: (START // length + number) * length * 1000 + offset,
        st.sampled_from([3600, 86400, 30 * 86400]),
        st.integers(0, 2),
        st.integers(-1, 1),
    )
)

RECORDS = st.builds(
    CallRecord,
    at=MOMENTS.map(lambda ms: ms / 1000),
    route=st.sampled_from(["proxy", "kontext"]),
    status=st.sampled_from([200, 202, 422, 499, 500]),
    principal=NAMES,
    user_id=NAMES,
    endpoint=NAMES,
    request_id=st.sampled_from(IDS),
    error=st.none() | st.just("timeout"),
    cache=st.sampled_from(["hit", "collapsed", "miss", "bypass", None]),
    seconds=st.integers(0, 1000).map(lambda n: n / 4),
    upstream_seconds=st.integers(0, 1000).map(lambda n: n / 4),
    estimated=AMOUNTS,
    settled=AMOUNTS,
)
OUTCOMES = st.builds(
    Outcome,
    request_id=st.sampled_from(IDS[:-1]),
    status=st.sampled_from([200, 422, 500]),
    error=st.none() | st.just("bad"),
    units=st.none() | st.integers(0, 9).map(Decimal),
    settled=AMOUNTS,
)
TIMES = MOMENTS.map(lambda ms: ms / 1000)
QUERIES = st.builds(UsageQuery, since=TIMES, until=TIMES, principal=NAMES)
INTERVAL_FORMATS = {"minute": "%Y-%m-%dT%H:%MZ", "hour": "%Y-%m-%dT%H:00Z", "day": "%Y-%m-%d"}


def merged(rows: Sequence[CallRecord | Outcome]) -> list[CallRecord]:
    """Return the records with their outcomes, newest first."""
    outcomes: dict[str | None, Outcome] = {}
    for row in rows:
        if isinstance(row, Outcome):
            outcomes[row.request_id] = merge_outcomes(outcomes.get(row.request_id), row)
    records = [row for row in rows if isinstance(row, CallRecord)]
    records.sort(key=lambda record: (record.at, record.id), reverse=True)
    return [merge_outcome(record, outcomes.get(record.request_id)) for record in records]


def merge_outcomes(before: Outcome | None, now: Outcome) -> Outcome:
    if before is None or (now.status < 400 <= before.status):
        return now
    if before.status < 400 <= now.status:
        return before
    return replace(
        now,
        error=before.error if now.error is None else now.error,
        units=before.units if now.units is None else now.units,
        settled=before.settled if now.settled is None else now.settled,
    )


def merge_outcome(record: CallRecord, outcome: Outcome | None) -> CallRecord:
    if outcome is None:
        return record
    fields = {name: getattr(outcome, name) for name in ("error", "units", "settled")}
    return replace(
        record,
        status=outcome.status,
        **{name: value for name, value in fields.items() if value is not None},
    )


def sum_records(records: Sequence[CallRecord]) -> Totals:
    paid = [record for record in records if record.cache not in ("hit", "collapsed")]
    hits = [record for record in records if record.cache in ("hit", "collapsed")]
    return Totals(
        calls=len(records),
        errors=sum(is_error(record) for record in records),
        hits=len(hits),
        misses=sum(record.cache == "miss" for record in records),
        unpriced=sum(price(record) is None and not is_error(record) for record in paid),
        spent=sum(price(record) or 0 for record in paid),
        saved=sum(saved_price(record) or 0 for record in hits),
        seconds=sum(record.seconds for record in records),
        upstream_seconds=sum(record.upstream_seconds for record in records),
    )


def is_error(record: CallRecord) -> bool:
    return record.status >= 400 or record.error is not None


def price(record: CallRecord) -> int | None:
    return record.estimated if record.settled is None else record.settled


def saved_price(record: CallRecord) -> int | None:
    return record.settled if record.estimated is None else record.estimated


def group_name(record: CallRecord, by: GroupBy) -> str:
    if by in INTERVAL_FORMATS:
        return datetime.fromtimestamp(int(record.at), UTC).strftime(INTERVAL_FORMATS[by])
    return getattr(record, by) or ""


def expected(records: Sequence[CallRecord], by: GroupBy) -> list[tuple[str, Totals]]:
    groups = defaultdict(list)
    for record in records:
        groups[group_name(record, by)].append(record)
    totals = [(name, sum_records(group)) for name, group in groups.items()]
    if by in INTERVAL_FORMATS:
        return sorted(totals, key=lambda row: row[0])
    return sorted(totals, key=lambda row: (-row[1].spent, -row[1].calls, row[0]))


def expected_users(records: Sequence[CallRecord]) -> list[UserTotals]:
    groups = defaultdict(list)
    for record in records:
        groups[record.principal or "", record.user_id or ""].append(record)
    rows = [UserTotals(*names, sum_records(group)) for names, group in groups.items()]
    return sorted(
        rows, key=lambda row: (-row.totals.spent, -row.totals.calls, row.user, row.principal)
    )


async def compare(
    ledger: Ledger, rows: Sequence[CallRecord | Outcome], query: UsageQuery, summed: Sequence[int]
) -> None:
    """summed: number of periods that are summed after each write."""
    async with ledger:
        for start, limit in zip(range(0, len(rows), 7), summed, strict=False):
            await ledger.write(rows[start : start + 7])
            await ledger.sum_periods(END, limit)
        records = [
            record
            for record in merged(rows)
            if query.since <= record.at < query.until
            and (query.principal is None or (record.principal or "") == query.principal)
        ]
        assert await ledger.latest(query) == records
        assert await ledger.totals(query) == [("", sum_records(records))]
        for by in get_args(GroupBy):
            assert await ledger.totals(query, by) == expected(records, by)
        assert await ledger.totals_by_user(query) == expected_users(records)
        for interval in get_args(Interval):
            groups: list[GroupBy] = [interval, "endpoint", "principal", "route"]
            summaries = {by: expected(records, by) for by in groups}
            assert await ledger.summarize(query, interval) == summaries


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as started:
        yield started


# The rows are written in this order: the merge of outcomes depends on it.
ROWS = st.lists(RECORDS | OUTCOMES, max_size=40)
SUMMED = st.lists(st.sampled_from([0, 2, 100]), min_size=6, max_size=6)
SQLITE_SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
POSTGRES_SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.slow
@SQLITE_SETTINGS
@given(rows=ROWS, query=QUERIES | st.just(UsageQuery()), summed=SUMMED)
def test_totals_in_sqlite(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[CallRecord | Outcome],
    query: UsageQuery,
    summed: list[int],
) -> None:
    file = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    asyncio.run(compare(sqlite_ledger(Path(file)), rows, query, summed))


@pytest.mark.slow
@POSTGRES_SETTINGS
@given(rows=ROWS, query=QUERIES | st.just(UsageQuery()), summed=SUMMED)
def test_totals_in_postgres(
    server: PostgresServer,
    rows: list[CallRecord | Outcome],
    query: UsageQuery,
    summed: list[int],
) -> None:
    asyncio.run(compare(postgres_ledger(server.fresh()), rows, query, summed))
