"""Totals are what one gets by adding up, over rows of all kinds in any order."""

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
)
from falproxy.stores.ledger.postgres import postgres_ledger
from falproxy.stores.ledger.sqlite import sqlite_ledger
from tests.support.postgres_server import PostgresServer, postgres_server

START = 1_800_000_000
IDS = ("r1", "r2", "r3", None)
MONEY = st.none() | st.integers(0, 2**53)
NAMES = st.sampled_from(["a", "b", "", None])

ENTRIES = st.builds(
    CallRecord,
    at=st.integers(START * 1000, (START + 3 * 86400) * 1000).map(lambda ms: ms / 1000),
    route=st.sampled_from(["proxy", "kontext"]),
    status=st.sampled_from([200, 202, 422, 499, 500]),
    principal=NAMES,
    endpoint=NAMES,
    request_id=st.sampled_from(IDS),
    error=st.none() | st.just("timeout"),
    cache=st.sampled_from(["hit", "collapsed", "miss", "bypass", None]),
    seconds=st.integers(0, 1000).map(lambda n: n / 4),
    upstream_seconds=st.integers(0, 1000).map(lambda n: n / 4),
    estimated=MONEY,
    settled=MONEY,
)
OUTCOMES = st.builds(
    Outcome,
    request_id=st.sampled_from(IDS[:-1]),
    status=st.sampled_from([200, 422, 500]),
    error=st.none() | st.just("bad"),
    units=st.none() | st.integers(0, 9).map(Decimal),
    settled=MONEY,
)
TIMES = st.integers(START - 10, START + 3 * 86400 + 10).map(float)
QUESTIONS = st.builds(UsageQuery, since=TIMES, until=TIMES, principal=NAMES)
WORDS = {"minute": "%Y-%m-%dT%H:%MZ", "hour": "%Y-%m-%dT%H:00Z", "day": "%Y-%m-%d"}


def ended(rows: Sequence[CallRecord | Outcome]) -> list[CallRecord]:
    """The entries with what is known of them, the newest first."""
    known: dict[str | None, Outcome] = {}
    for row in rows:
        if isinstance(row, Outcome):
            known[row.request_id] = told(known.get(row.request_id), row)
    entries = [row for row in rows if isinstance(row, CallRecord)]
    entries.sort(key=lambda entry: (entry.at, entry.id), reverse=True)
    return [end(entry, known.get(entry.request_id)) for entry in entries]


def told(before: Outcome | None, now: Outcome) -> Outcome:
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


def end(entry: CallRecord, outcome: Outcome | None) -> CallRecord:
    if outcome is None:
        return entry
    better = {name: getattr(outcome, name) for name in ("error", "units", "settled")}
    return replace(
        entry,
        status=outcome.status,
        **{name: value for name, value in better.items() if value is not None},
    )


def add_up(entries: Sequence[CallRecord]) -> Totals:
    bought = [each for each in entries if each.cache not in ("hit", "collapsed")]
    hits = [each for each in entries if each.cache in ("hit", "collapsed")]
    return Totals(
        calls=len(entries),
        errors=sum(is_error(each) for each in entries),
        hits=len(hits),
        misses=sum(each.cache == "miss" for each in entries),
        unpriced=sum(price(each) is None and not is_error(each) for each in bought),
        spent=sum(price(each) or 0 for each in bought),
        saved=sum(worth(each) or 0 for each in hits),
        seconds=sum(each.seconds for each in entries),
        upstream_seconds=sum(each.upstream_seconds for each in entries),
    )


def is_error(entry: CallRecord) -> bool:
    return entry.status >= 400 or entry.error is not None


def price(entry: CallRecord) -> int | None:
    return entry.estimated if entry.settled is None else entry.settled


def worth(entry: CallRecord) -> int | None:
    return entry.settled if entry.estimated is None else entry.estimated


def name_of(entry: CallRecord, by: GroupBy) -> str:
    if by in WORDS:
        return datetime.fromtimestamp(int(entry.at), UTC).strftime(WORDS[by])
    return getattr(entry, by) or ""


def expected(entries: Sequence[CallRecord], by: GroupBy) -> list[tuple[str, Totals]]:
    groups = defaultdict(list)
    for entry in entries:
        groups[name_of(entry, by)].append(entry)
    sums = [(name, add_up(group)) for name, group in groups.items()]
    if by in WORDS:
        return sorted(sums, key=lambda each: each[0])
    return sorted(sums, key=lambda each: (-each[1].spent, -each[1].calls, each[0]))


async def compare(
    ledger: Ledger, rows: Sequence[CallRecord | Outcome], question: UsageQuery
) -> None:
    async with ledger:
        for start in range(0, len(rows), 7):
            await ledger.write(rows[start : start + 7])
        entries = [
            each
            for each in ended(rows)
            if question.since <= each.at < question.until
            and (question.principal is None or each.principal == question.principal)
        ]
        assert await ledger.latest(question) == entries
        assert await ledger.totals(question) == [("", add_up(entries))]
        for by in get_args(GroupBy):
            assert await ledger.totals(question, by) == expected(entries, by)
        for step in get_args(Interval):
            parts: list[GroupBy] = [step, "endpoint", "principal", "route"]
            overview = {by: expected(entries, by) for by in parts}
            assert await ledger.summarize(question, step) == overview


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


# Outcomes come as they are written: an outcome's rows keep their order within a ledger.
ROWS = st.lists(ENTRIES | OUTCOMES, max_size=30)
SOME = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FEW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.slow
@SOME
@given(rows=ROWS, question=QUESTIONS | st.just(UsageQuery()))
def test_totals_in_sqlite(
    tmp_path_factory: pytest.TempPathFactory, rows: list[CallRecord | Outcome], question: UsageQuery
) -> None:
    file = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    asyncio.run(compare(sqlite_ledger(Path(file)), rows, question))


@pytest.mark.slow
@FEW
@given(rows=ROWS, question=QUESTIONS | st.just(UsageQuery()))
def test_totals_in_postgres(
    server: PostgresServer, rows: list[CallRecord | Outcome], question: UsageQuery
) -> None:
    asyncio.run(compare(postgres_ledger(server.fresh()), rows, question))
