"""The contract of ledgers, over SQLite and over PostgreSQL."""

import asyncio
import re
import time
from dataclasses import fields, replace
from decimal import Decimal
from typing import get_args
from uuid import uuid4

import pytest

from falproxy.fal.results import FalImage
from falproxy.stores.keys.sql_keys import SCHEMA as KEYS_SCHEMA
from falproxy.stores.ledger import (
    CallRecord,
    GroupBy,
    InvalidRowError,
    JobQuery,
    JobRow,
    Lease,
    Ledger,
    LedgerError,
    Outcome,
    SchemaError,
    Totals,
    UsageQuery,
    new_job_id,
    position_of,
)
from falproxy.stores.ledger.call_list import CallQuery, list_calls
from falproxy.stores.ledger.database import LedgerDatabase
from falproxy.stores.ledger.schema import Schema, SqlDialect
from falproxy.stores.ledger.statements import LEDGER_SCHEMA
from falproxy.stores.ledger.writer import LedgerWriter
from tests.support.ledger_processes import LedgerProcesses
from tests.support.ledger_schema import UNDO_CALL_TIMES
from tests.support.waiting import SOON

LEASE_SECONDS = 0.2
ANN = Lease("ann", 30.0)
BEN = Lease("ben", 30.0)
NOON = 1_800_000_000.0 - 1_800_000_000 % 86400 + 43200
HOUR, DAY = 3600.0, 86400.0
ALL = UsageQuery()


# What the release before the jobs of several APIs wrote.
OLD_LEDGER = """
    CREATE TABLE falproxy_ledger (version BIGINT NOT NULL);
    CREATE TABLE falproxy_entries (
        id TEXT PRIMARY KEY, at BIGINT NOT NULL, route TEXT NOT NULL, status BIGINT NOT NULL,
        principal TEXT, user_id TEXT, operation TEXT, endpoint TEXT, request_id TEXT,
        error TEXT, cache TEXT, seconds DOUBLE PRECISION NOT NULL,
        upstream_seconds DOUBLE PRECISION NOT NULL, units TEXT, estimated BIGINT, settled BIGINT
    );
    CREATE TABLE falproxy_outcomes (
        request_id TEXT PRIMARY KEY, at BIGINT NOT NULL, status BIGINT NOT NULL, error TEXT,
        units TEXT, settled BIGINT
    );
    CREATE TABLE falproxy_jobs (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, user_id TEXT, model TEXT NOT NULL,
        endpoint TEXT NOT NULL, app TEXT NOT NULL, request_id TEXT, key_mark TEXT NOT NULL,
        status TEXT NOT NULL, images TEXT NOT NULL, error TEXT, error_message TEXT,
        estimated BIGINT, settled BIGINT, created_at BIGINT NOT NULL,
        updated_at BIGINT NOT NULL, finished_at BIGINT, follower TEXT NOT NULL,
        followed_until BIGINT NOT NULL
    );
    CREATE INDEX falproxy_entries_by_time ON falproxy_entries (at);
    CREATE INDEX falproxy_outcomes_by_time ON falproxy_outcomes (at);
    CREATE INDEX falproxy_jobs_unfinished ON falproxy_jobs (followed_until)
        WHERE finished_at IS NULL;
    CREATE INDEX falproxy_jobs_by_end ON falproxy_jobs (finished_at);
    INSERT INTO falproxy_ledger (version) VALUES (1);
    INSERT INTO falproxy_entries
        VALUES ('c1', 1800000000000, 'proxy', 200, 'key:ann', NULL, 'submit', 'fal-ai/flux/dev',
            'r1', NULL, 'miss', 0.1, 0.1, NULL, 25000, NULL);
    INSERT INTO falproxy_outcomes VALUES ('r1', 1800000001000, 200, NULL, '1', 25000);
    INSERT INTO falproxy_jobs
        VALUES ('j1', 'ann', NULL, 'flux', 'fal-ai/flux/dev', 'fal-ai/flux', 'r1', '', 'completed',
            '[]', NULL, NULL, 25000, 25000, 1800000000000, 1800000000000, 1800000001000, 'p', 0)
"""


@pytest.fixture
async def other(ledger_processes: LedgerProcesses) -> Ledger:
    """The ledger of another process."""
    return await ledger_processes.store()


def record(at: float = NOON, **columns: object) -> CallRecord:
    return replace(CallRecord(at=at, route="proxy", status=200), **columns)  # type: ignore[arg-type]


FULL = CallRecord(
    at=NOON + 0.123,
    route="kontext",
    status=200,
    principal="ann",
    user_id="user 7",
    operation="submit",
    endpoint="fal-ai/flux/dev",
    request_id="7e2f0b8a",
    error="content_policy_violation",
    cache="miss",
    seconds=1.25,
    upstream_seconds=1.125,
    units=Decimal("1.50"),
    estimated=40_000,
    settled=60_001,
    proxy_request_id="0a1b2c3d",
)


async def grand_total(ledger: Ledger, query: UsageQuery = ALL) -> Totals:
    ((name, totals),) = await ledger.totals(query)
    assert name == ""
    return totals


async def test_a_new_ledger_is_empty(ledger: Ledger) -> None:
    await ledger.probe()
    assert await ledger.latest(ALL) == []
    assert await grand_total(ledger) == Totals()
    assert await ledger.totals(ALL, "endpoint") == []
    assert await ledger.get_job("id", "ann") is None
    assert await ledger.claim_jobs(ANN) == []
    assert await ledger.delete_before(NOON) == 0


async def test_a_record_is_read_as_it_was_written(ledger: Ledger, other: Ledger) -> None:
    await ledger.write([FULL])
    assert await other.latest(ALL) == [FULL]


async def test_an_unknown_field_stays_none(ledger: Ledger) -> None:
    await ledger.write([unknown := record()])
    assert await ledger.latest(ALL) == [unknown]
    assert unknown.estimated is None


async def test_a_record_that_is_written_twice_is_stored_once(ledger: Ledger, other: Ledger) -> None:
    await ledger.write([FULL, FULL])
    await other.write([FULL, second := record()])
    assert {row.id for row in await ledger.latest(ALL)} == {FULL.id, second.id}
    assert (await grand_total(ledger)).calls == 2


@pytest.mark.parametrize("count", [49, 50, 51, 130])
async def test_rows_of_a_batch_are_stored_as_separate_ones(
    ledger: Ledger, other: Ledger, count: int
) -> None:
    """SQLite inserts many rows with one statement."""
    unusual = [
        replace(FULL, id=new_job_id(), at=NOON + number, principal="caf\u00e9\0" * (number % 2))
        for number in range(count)
    ]
    await ledger.write([*unusual, record(NOON - 1), *unusual[:60]])
    separate = [replace(row, id=new_job_id()) for row in unusual]
    for row in separate:
        await other.write([row])
    latest = await ledger.latest(UsageQuery(since=NOON))
    by_id = {row.id: row for row in latest}
    assert len(latest) == 2 * count
    for one, two in zip(unusual, separate, strict=True):
        assert replace(by_id[one.id], id="") == replace(by_id[two.id], id="")


async def test_an_invalid_row_rejects_its_whole_batch(ledger: Ledger) -> None:
    rows = [record(NOON + number) for number in range(60)]
    rows[30].status = 2**70
    with pytest.raises(InvalidRowError):
        await ledger.write(rows)
    assert await ledger.latest(ALL) == []


async def test_the_newest_records_come_first(ledger: Ledger) -> None:
    written = [record(NOON + n) for n in range(10)]
    await ledger.write(written)
    assert await ledger.latest(UsageQuery(limit=3)) == written[:-4:-1]


@pytest.mark.parametrize("is_early", [True, False], ids=["before its record", "after it"])
async def test_an_outcome_completes_the_record_of_its_request(
    ledger: Ledger, other: Ledger, is_early: bool
) -> None:
    submit = record(request_id="r", estimated=40_000)
    outcome = Outcome(request_id="r", status=422, error="bad", units=Decimal("0.5"), settled=20_000)
    rows: list[CallRecord | Outcome] = [outcome, submit] if is_early else [submit, outcome]
    for row in rows:
        await other.write([row])
    completed = replace(submit, status=422, error="bad", units=Decimal("0.5"), settled=20_000)
    assert await ledger.latest(ALL) == [completed]
    totals = await grand_total(ledger)
    assert (totals.errors, totals.spent) == (1, 20_000)


async def test_a_repeated_outcome_keeps_known_fields(ledger: Ledger) -> None:
    await ledger.write([record(request_id="r", estimated=5)])
    await ledger.write([Outcome(request_id="r", status=200, units=Decimal(2), settled=7)])
    await ledger.write([Outcome(request_id="r", status=200)] * 2)
    (latest,) = await ledger.latest(ALL)
    assert (latest.units, latest.settled) == (Decimal(2), 7)


async def test_a_success_replaces_a_failure_and_is_final(ledger: Ledger) -> None:
    await ledger.write([record(request_id="r", estimated=5)])
    failure = Outcome(request_id="r", status=502, error="unreachable", settled=0)
    for outcome in (failure, Outcome(request_id="r", status=200), failure):
        await ledger.write([outcome])
    (latest,) = await ledger.latest(ALL)
    assert (latest.status, latest.error, latest.settled) == (200, None, None)
    assert (await grand_total(ledger)).spent == 5


@pytest.mark.parametrize("is_early", [True, False], ids=["before its record", "after it"])
async def test_the_first_times_of_an_outcome_are_kept(ledger: Ledger, is_early: bool) -> None:
    submit = record(id="c", request_id="r", operation="submit")
    ended = Outcome(
        request_id="r", status=200, ended_at=NOON + 3, run_seconds=2.5, stored_seconds=0.4
    )
    again = Outcome(request_id="r", status=200, ended_at=NOON + 60, stored_seconds=0.0)
    rows: list[CallRecord | Outcome] = [submit, ended, again]
    for row in rows[1:] + rows[:1] if is_early else rows:
        await ledger.write([row])
    ((call,), _) = await list_calls(ledger, CallQuery(), 10)
    assert (call.ended_at, call.run_seconds) == (NOON + 3, 2.5)
    assert call.record.stored_seconds == 0.4


@pytest.mark.parametrize("is_summed", [False, True], ids=["from records", "from sums"])
async def test_an_empty_principal_selects_the_calls_without_one(
    ledger: Ledger, is_summed: bool
) -> None:
    await ledger.write([record(), record(principal="ann"), record(principal="")])
    if is_summed:
        await ledger.sum_periods(NOON + 40 * DAY, 100)
    query = UsageQuery(until=NOON + 50 * DAY, principal="")
    assert (await grand_total(ledger, query)).calls == 2
    assert len(await ledger.latest(query)) == 2


AMOUNTS = [
    pytest.param({"estimated": 5}, (5, 0, 0), id="an estimate counts until the price is known"),
    pytest.param(
        {"estimated": 5, "settled": 7}, (7, 0, 0), id="the settled price replaces the estimate"
    ),
    pytest.param({"estimated": 5, "settled": 0}, (0, 0, 0), id="a settled price of zero counts"),
    pytest.param({}, (0, 0, 1), id="an unknown price is not zero"),
    pytest.param({"cache": "hit", "estimated": 5}, (0, 5, 0), id="a hit saves its price"),
    pytest.param(
        {"cache": "hit", "estimated": 5, "settled": 0},
        (0, 5, 0),
        id="a hit that is settled at zero",
    ),
    pytest.param(
        {"cache": "collapsed", "estimated": 5}, (0, 5, 0), id="a shared job saves its price"
    ),
    pytest.param({"cache": "hit"}, (0, 0, 0), id="a hit of unknown price"),
    pytest.param({"cache": "bypass", "estimated": 5}, (5, 0, 0), id="a bypass is paid"),
    pytest.param({"status": 500}, (0, 0, 0), id="a failure of unknown price is not unpriced"),
    pytest.param({"status": 499, "estimated": 5}, (5, 0, 0), id="a client that left is charged"),
    pytest.param({"estimated": 2**53}, (2**53, 0, 0), id="beyond the precision of floats"),
]


@pytest.mark.parametrize(("columns", "amounts"), AMOUNTS)
async def test_amounts_by_cache_outcome_and_price(
    ledger: Ledger, columns: dict[str, object], amounts: tuple[int, int, int]
) -> None:
    await ledger.write([record(**columns)])  # type: ignore[arg-type]
    totals = await grand_total(ledger)
    assert (totals.spent, totals.saved, totals.unpriced) == amounts
    assert {type(amount) for amount in (totals.spent, totals.saved)} == {int}


async def test_totals_are_exact_beyond_the_precision_of_floats(ledger: Ledger) -> None:
    await ledger.write([record(settled=2**53), record(settled=1), record(settled=2**53)])
    assert (await grand_total(ledger)).spent == 2**54 + 1


async def test_the_hit_rate_is_that_of_cacheable_calls(ledger: Ledger) -> None:
    assert (await grand_total(ledger)).hit_rate is None
    outcomes = ["hit", "collapsed", "miss", "miss", "bypass", None]
    await ledger.write([record(cache=outcome) for outcome in outcomes])
    totals = await grand_total(ledger)
    assert (totals.hits, totals.misses, totals.hit_rate) == (2, 2, 0.5)


@pytest.mark.parametrize(
    ("by", "names"),
    [
        pytest.param("endpoint", ["dear", "cheap", ""], id="by endpoint, highest cost first"),
        pytest.param("principal", ["ben", "ann"], id="by principal"),
        pytest.param("route", ["kontext", "proxy"], id="by route"),
        pytest.param(
            "hour",
            ["2027-01-14T11:00Z", "2027-01-15T12:00Z", "2027-01-15T13:00Z"],
            id="by hour, oldest first",
        ),
        pytest.param("day", ["2027-01-14", "2027-01-15"], id="by day"),
    ],
)
async def test_totals_by_group(ledger: Ledger, by: GroupBy, names: list[str]) -> None:
    await ledger.write(
        [
            record(NOON, endpoint="cheap", principal="ann", settled=1),
            record(NOON + HOUR - 0.001, endpoint="cheap", principal="ann", settled=1),
            record(NOON + HOUR, endpoint="dear", principal="ben", route="kontext", settled=100),
            record(NOON - DAY - 0.001, principal="ann"),
        ]
    )
    groups = await ledger.totals(ALL, by)
    assert [name for name, _ in groups] == names
    assert sum(totals.calls for _, totals in groups) == 4
    assert sum(totals.spent for _, totals in groups) == 102
    assert [name for name, _ in await ledger.totals(UsageQuery(limit=1), by)] == names[:1]


async def test_totals_by_user_are_those_of_each_user_of_a_principal(
    ledger: Ledger, other: Ledger
) -> None:
    await other.write(
        [
            record(principal="ann", user_id="ada", settled=5),
            record(principal="ann", user_id="ada", settled=5, cache="miss", request_id="r"),
            record(principal="ben", user_id="ada", settled=70),
            record(principal="ben", user_id="Ada", status=500),
            record(principal="ann", settled=8),
            record(user_id="", settled=1),
            record(NOON - DAY, principal="ann", user_id="old"),
        ]
    )
    await other.write([Outcome(request_id="r", status=200, settled=50)])
    rows = await ledger.totals_by_user(UsageQuery(since=NOON))
    assert [(row.principal, row.user, row.totals.calls, row.totals.spent) for row in rows] == [
        ("ben", "ada", 1, 70), ("ann", "ada", 2, 55), ("ann", "", 1, 8), ("", "", 1, 1),
        ("ben", "Ada", 1, 0),
    ]  # fmt: skip
    assert rows[-1].totals.errors == 1
    own = await ledger.totals_by_user(UsageQuery(since=NOON, principal="ann"))
    assert own == rows[1:3]


@pytest.mark.parametrize("limit", [1, 7, 10])
async def test_pages_have_each_row_once(ledger: Ledger, limit: int) -> None:
    """Rows of equal cost have a fixed order too."""
    users = [f"user {n}" for n in range(25)]
    await ledger.write(
        [
            record(principal=caller, user_id=user, settled=int(user[-1]))
            for user in users
            for caller in ("ann", "ben")
        ]
    )
    pages = [
        await ledger.totals_by_user(UsageQuery(limit=limit, offset=offset))
        for offset in range(0, 51, limit)
    ]
    assert all(len(page) <= limit for page in pages)
    rows = [row for page in pages for row in page]
    assert len(rows) == 50
    assert {(row.principal, row.user) for row in rows} == {
        (caller, user) for user in users for caller in ("ann", "ben")
    }
    assert rows == await ledger.totals_by_user(UsageQuery())
    names = [name for name, _ in await ledger.totals(UsageQuery(limit=1, offset=1), "principal")]
    assert names == ["ben"]


async def test_a_query_filters_by_time_and_principal(ledger: Ledger) -> None:
    await ledger.write([record(NOON + n, principal="ann") for n in range(5)])
    await ledger.write([record(NOON + n, principal="ben") for n in range(5)])
    some = UsageQuery(since=NOON + 1, until=NOON + 3, principal="ann")
    assert (await grand_total(ledger, some)).calls == len(await ledger.latest(some)) == 2
    assert [row.at for row in await ledger.latest(some)] == [NOON + 2, NOON + 1]
    assert (await grand_total(ledger, UsageQuery(principal="unknown"))).calls == 0


async def test_old_records_are_deleted(ledger: Ledger) -> None:
    await ledger.write([record(NOON + n) for n in range(2500)])
    assert await ledger.delete_before(NOON + 2400) == 2400
    assert (await grand_total(ledger)).calls == 100
    assert await ledger.delete_before(NOON + 2400) == 0


async def test_finished_jobs_can_be_deleted_alone(ledger: Ledger) -> None:
    running, done = await ledger.add_job(job(), ANN), await ledger.add_job(job(), ANN)
    await ledger.save_job(replace(done, status="failed"))
    await ledger.write([record()])
    later = time.time() + 60
    assert await ledger.count_jobs_before(later) == 1
    assert await ledger.delete_jobs_before(later - 120) == 0
    assert await ledger.delete_jobs_before(later) == 1
    assert await ledger.get_job(done.id, done.owner) is None
    assert await ledger.get_job(running.id, running.owner) is not None
    assert await ledger.count_jobs_before(later) == 0
    assert [await ledger.count_before(at) for at in (NOON, NOON + 1)] == [0, 1]


async def test_finished_jobs_and_outcomes_are_deleted_with_them(ledger: Ledger) -> None:
    running, done = await ledger.add_job(job(), ANN), await ledger.add_job(job(), ANN)
    await ledger.save_job(replace(done, status="failed"))
    await ledger.write([Outcome(request_id="r", status=200, settled=5)])
    await ledger.delete_before(time.time() + 60)
    assert await ledger.get_job(done.id, done.owner) is None
    assert await ledger.get_job(running.id, running.owner) is not None
    await ledger.write([record(request_id="r")])
    assert (await ledger.latest(ALL))[0].settled is None


@pytest.mark.parametrize(("retention", "stored"), [(2 * DAY, 1), (None, 3)])
async def test_a_writer_deletes_records_older_than_the_retention(
    ledger: Ledger, other: Ledger, retention: float | None, stored: int
) -> None:
    now = time.time()
    await ledger.write([record(now - 400 * DAY), record(now - 2 * DAY - 60), record(now - DAY)])
    writer = LedgerWriter(other, retention)
    await writer.open()
    writer.enqueue(record(now))
    async with asyncio.timeout(SOON):
        while (await grand_total(ledger)).calls != stored + 1:
            await asyncio.sleep(0.01)
    await writer.close(5)
    assert {row.at for row in await ledger.latest(ALL)} >= {round(at, 3) for at in (now, now - DAY)}


UNUSUAL_TEXTS = [
    "",
    "a\0b",
    "\ud800",
    "'; DROP TABLE falproxy_entries; --",
    "$1 NOW ?",
    "ключ 🔑",
    "x" * 9000,
]


@pytest.mark.parametrize("unusual", UNUSUAL_TEXTS, ids=ascii)
async def test_any_text_can_be_stored(ledger: Ledger, unusual: str) -> None:
    await ledger.write(
        [
            record(
                principal=unusual,
                user_id=unusual,
                endpoint=unusual,
                request_id=unusual,
                error=unusual,
            )
        ]
    )
    await ledger.write([Outcome(request_id=unusual, status=200, settled=7)])
    (latest,) = await ledger.latest(UsageQuery(principal=unusual))
    assert latest.settled == 7
    assert latest.endpoint is not None
    assert len(latest.endpoint) <= 500
    ((_, totals),) = await ledger.totals(UsageQuery(principal=unusual), "endpoint")
    assert totals.spent == 7
    (row,) = await ledger.totals_by_user(UsageQuery(principal=unusual))
    assert (row.user, row.totals) == (latest.user_id, totals)


async def test_a_ledger_is_usable_after_an_invalid_batch(ledger: Ledger) -> None:
    with pytest.raises(InvalidRowError):
        await ledger.write([record(), record(status=2**70)])
    assert await ledger.latest(ALL) == []
    await ledger.write([record()])
    assert (await grand_total(ledger)).calls == 1


def job(**columns: object) -> JobRow:
    template = JobRow(owner="ann", model="flux-dev", endpoint="fal-ai/flux/dev", request_id="r")
    return replace(template, id=uuid4().hex, **columns)  # type: ignore[arg-type]


async def test_a_job_is_read_as_it_was_written(ledger: Ledger, other: Ledger) -> None:
    new = job(
        app="fal-ai/flux",
        key_mark="mark",
        user_id="user 7",
        status="running",
        images=(FalImage("https://a/1.png", 1024, 768), FalImage("https://a/ü.png")),
        error="code",
        error_message="It\n'failed'.",
        estimated=40_000,
        settled=41_000,
        api="videos",
        details={"prompt": "a \ud800\0 ü" + "x" * 1000, "files": {"video": "https://a/1.mp4"}},
    )
    before = time.time()
    stored = await ledger.add_job(new, ANN)
    assert before - 0.1 <= stored.created_at == stored.updated_at <= time.time() + 0.1
    assert replace(stored, created_at=0.0, updated_at=0.0) == new
    assert await other.get_job(new.id, "ann") == stored


async def test_only_the_owner_can_read_a_job(ledger: Ledger) -> None:
    stored = await ledger.add_job(job(), ANN)
    for owner in ("ben", "", "ANN", "ann "):
        assert await ledger.get_job(stored.id, owner) is None


async def test_a_job_that_is_added_twice_stays_as_it_is(ledger: Ledger, other: Ledger) -> None:
    stored = await ledger.add_job(job(), ANN)
    again = await other.add_job(replace(stored, request_id="bought twice"), BEN)
    assert again == stored


async def test_a_job_can_be_changed_until_it_is_finished(ledger: Ledger, other: Ledger) -> None:
    stored = await ledger.add_job(job(request_id=None), ANN)
    accepted = await ledger.save_job(replace(stored, app="a", request_id="r", key_mark="m"))
    assert accepted is not None
    assert (accepted.request_id, accepted.finished_at) == ("r", None)
    running = await other.save_job(replace(accepted, status="running"))
    assert running is not None
    images = (FalImage("https://a/1.png", 1, 2),)
    done = await other.save_job(replace(running, status="completed", images=images, settled=5))
    assert done is not None
    assert done.finished_at == done.updated_at
    assert stored.created_at <= done.updated_at
    assert (done.images, done.settled) == (images, 5)
    assert await ledger.save_job(replace(running, status="failed")) is None
    assert await ledger.get_job(stored.id, "ann") == done


async def test_details_of_a_job_can_be_changed(ledger: Ledger) -> None:
    stored = await ledger.add_job(job(details={"seconds": "4"}), ANN)
    details = {"seconds": "4", "files": {"video": "https://a/1.mp4"}}
    await ledger.save_job(replace(stored, status="completed", details=details))
    done = await ledger.get_job(stored.id, "ann")
    assert done is not None
    assert done.details == details


@pytest.mark.parametrize("is_ascending", [False, True])
async def test_jobs_are_listed_in_pages(ledger: Ledger, is_ascending: bool) -> None:
    added = [await ledger.add_job(job(api="videos"), ANN) for _ in range(5)]
    for foreign in (job(), job(owner="ben", api="videos")):
        await ledger.add_job(foreign, ANN)
    added.sort(key=lambda each: (each.created_at, each.id), reverse=not is_ascending)
    query = JobQuery(owner="ann", api="videos", limit=2, is_ascending=is_ascending)
    pages = [await ledger.list_jobs(query)]
    while pages[-1]:
        pages.append(await ledger.list_jobs(replace(query, after=position_of(pages[-1][-1]))))
    assert [len(page) for page in pages] == [2, 2, 1, 0]
    assert [each for page in pages for each in page] == added


async def test_only_the_owner_can_delete_a_job(ledger: Ledger, other: Ledger) -> None:
    stored = await ledger.add_job(job(), ANN)
    for owner in ("ben", ""):
        assert await other.delete_job(stored.id, owner) is False
    assert await other.delete_job(stored.id, "ann") is True
    assert await ledger.get_job(stored.id, "ann") is None
    assert await other.delete_job(stored.id, "ann") is False


async def test_jobs_of_another_api_are_not_taken_over(ledger: Ledger, other: Ledger) -> None:
    images = await ledger.add_job(job(), Lease("gone", 0.0))
    videos = await ledger.add_job(job(api="videos"), Lease("gone", 0.0, "videos"))
    assert await other.claim_jobs(Lease("ben", 30.0, "videos")) == [videos]
    assert await other.claim_jobs(BEN) == [images]


@pytest.mark.parametrize("kind", ["image", "video", "audio", "file"])
async def test_the_kind_of_a_file_of_a_job_is_stored(ledger: Ledger, kind: str) -> None:
    stored = await ledger.add_job(job(), ANN)
    images = (FalImage("https://a/1", 1, 2, kind),)
    saved = await ledger.save_job(replace(stored, status="completed", images=images))
    assert saved is not None
    assert saved.images == images


async def test_an_unknown_job_is_not_saved(ledger: Ledger) -> None:
    assert await ledger.save_job(job()) is None


async def test_a_job_with_a_valid_lease_is_not_taken_over(ledger: Ledger, other: Ledger) -> None:
    await ledger.add_job(job(), ANN)
    assert await other.claim_jobs(BEN) == []
    assert await ledger.claim_jobs(ANN) == []


async def test_a_job_with_an_expired_lease_is_taken_over_once(
    ledger: Ledger, other: Ledger
) -> None:
    stored = [await ledger.add_job(job(), Lease("ann", LEASE_SECONDS)) for _ in range(3)]
    await ledger.save_job(replace(stored[1], status="failed"))
    await asyncio.sleep(LEASE_SECONDS + 0.05)
    assert await other.claim_jobs(BEN, limit=1) == [stored[0]]
    assert await other.claim_jobs(BEN) == [stored[2]]
    assert await other.claim_jobs(BEN) == []
    assert await ledger.claim_jobs(ANN) == []


async def test_a_process_that_renews_its_leases_keeps_its_jobs(
    ledger: Ledger, other: Ledger
) -> None:
    await ledger.add_job(job(), Lease("ann", 0.4))
    for _ in range(4):
        await asyncio.sleep(0.15)
        assert await ledger.claim_jobs(Lease("ann", 0.4)) == []
        assert await other.claim_jobs(BEN) == []


async def test_concurrent_claims_get_different_jobs(ledger_processes: LedgerProcesses) -> None:
    ledgers = [await ledger_processes.store() for _ in range(5)]
    for _ in range(5):
        added = [await ledgers[0].add_job(job(), Lease("gone", 0.0)) for _ in range(100)]
        claims = (process.claim_jobs(Lease(str(n), 30.0)) for n, process in enumerate(ledgers))
        claimed = [row.id for rows in await asyncio.gather(*claims) for row in rows]
        assert sorted(claimed) == sorted(row.id for row in added)


@pytest.mark.parametrize("name", ["owner", "request_id", "app"])
async def test_ids_of_a_job_are_stored_exactly_or_rejected(ledger: Ledger, name: str) -> None:
    for unusual in UNUSUAL_TEXTS:
        new = job(**{name: unusual})
        try:
            stored = await ledger.add_job(new, ANN)
        except LedgerError:
            assert unusual in ("a\0b", "\ud800")
            continue
        assert getattr(stored, name) == unusual
        assert await ledger.get_job(new.id, stored.owner) == stored


async def test_several_processes_can_create_the_schema_at_once(
    ledger_processes: LedgerProcesses,
) -> None:
    ledgers = [await ledger_processes.store() for _ in range(6)]
    await asyncio.gather(*(process.write([record()]) for process in ledgers))
    assert (await grand_total(ledgers[0])).calls == 6


async def test_records_and_jobs_survive_a_restart(ledger_processes: LedgerProcesses) -> None:
    async with ledger_processes.make() as first:
        await first.write([FULL])
        stored = await first.add_job(job(), ANN)
    async with ledger_processes.make() as second:
        assert await second.latest(ALL) == [FULL]
        assert await second.get_job(stored.id, "ann") == stored


async def test_a_ledger_of_the_first_version_is_migrated(ledger_processes: LedgerProcesses) -> None:
    async with ledger_processes.make() as first:
        await first.write([FULL])
        for statement in (
            *UNDO_CALL_TIMES,
            "ALTER TABLE falproxy_entries DROP COLUMN proxy_request_id",
            "DROP INDEX falproxy_jobs_by_owner",
            "ALTER TABLE falproxy_jobs DROP COLUMN api",
            "ALTER TABLE falproxy_jobs DROP COLUMN details",
            "UPDATE falproxy_ledger SET version = 1",
        ):
            await first._database.execute(statement)  # type: ignore[attr-defined]
    async with ledger_processes.make() as second:
        later = replace(FULL, id="later", at=NOON + 1)
        await second.write([later])
        assert await second.latest(ALL) == [later, replace(FULL, proxy_request_id=None)]


async def test_a_ledger_that_an_older_release_wrote_is_migrated(
    ledger_processes: LedgerProcesses,
) -> None:
    async with ledger_processes.make() as writer:
        database = writer._database  # type: ignore[attr-defined]
        connection = await database._factory.connect()
        for statement in OLD_LEDGER.split(";"):
            await connection.execute_many(statement, [()])
        await connection.close()
        (old,) = await writer.latest(ALL)
        assert (old.request_id, old.settled, old.proxy_request_id) == ("r1", 25000, None)
        await writer.write([record(id="new")])
        (stored,) = await writer.list_jobs(JobQuery(owner="ann", api="generate"))
        assert (stored.id, stored.details) == ("j1", {})


NEWER = Schema(
    LEDGER_SCHEMA.version_table,
    (
        *LEDGER_SCHEMA.migrations,
        (
            "ALTER TABLE falproxy_entries ADD COLUMN region TEXT",
            "ALTER TABLE falproxy_jobs ADD COLUMN attempts BIGINT NOT NULL DEFAULT 1",
            "CREATE TABLE falproxy_regions (name TEXT PRIMARY KEY)",
            "CREATE INDEX falproxy_entries_by_region ON falproxy_entries (region)",
        ),
    ),
    (*LEDGER_SCHEMA.tables, "falproxy_regions"),
)
NEWEST = len(NEWER.migrations)


def with_schema(ledger: Ledger, schema: Schema) -> LedgerDatabase:
    """Return the database of a ledger as a node of another version opens it."""
    database: LedgerDatabase = ledger._database  # type: ignore[attr-defined]
    return LedgerDatabase(database._factory, schema)


async def test_two_versions_work_side_by_side_and_after_a_roll_back(
    ledger_processes: LedgerProcesses,
) -> None:
    async with ledger_processes.make() as older:
        await older.write([record(id="before")])
        newer = with_schema(older, NEWER)
        await newer.execute("INSERT INTO falproxy_regions (name) VALUES ('eu')")
        await older.write([record(id="during", at=NOON + 1)])
        job = await older.add_job(JobRow(owner="ann", model="m", endpoint="e"), ANN)
        async with ledger_processes.make() as restarted:
            await restarted.probe()
            await restarted.write([record(id="after", at=NOON + 2)])
            assert [each.id for each in await restarted.latest(ALL)] == [
                "after",
                "during",
                "before",
            ]
            assert await restarted.get_job(job.id, "ann") == job
        assert await newer.execute("SELECT version FROM falproxy_ledger") == [(NEWEST,)]
        assert await newer.execute("SELECT name FROM falproxy_regions") == [("eu",)]
        await newer.close()


@pytest.mark.parametrize("knows_readers", [True, False])
async def test_a_newer_schema_that_this_version_cannot_work_with_is_rejected(
    ledger_processes: LedgerProcesses, knows_readers: bool
) -> None:
    async with ledger_processes.make() as ledger:
        newer = with_schema(ledger, replace(NEWER, min_reader=NEWEST))
        await newer.execute("UPDATE falproxy_ledger SET version = version")
        if not knows_readers:  # as releases before the table of readers
            await newer.execute("DROP TABLE falproxy_min_readers")
        await newer.close()
        with pytest.raises(SchemaError, match=rf"newer falproxy \(version {NEWEST}, .* Upgrade"):
            await ledger.probe()
        with pytest.raises(SchemaError):
            await ledger.latest(ALL)


@pytest.mark.parametrize(
    "schema", [LEDGER_SCHEMA, KEYS_SCHEMA], ids=lambda each: each.version_table
)
@pytest.mark.parametrize("dialect", get_args(SqlDialect))
def test_migrations_after_the_oldest_reader_only_add(schema: Schema, dialect: SqlDialect) -> None:
    """What an older version does not know may be left out by its statements."""
    added = re.compile(
        r"\s*(CREATE TABLE|CREATE INDEX|INSERT INTO falproxy_open_periods)|"
        r"CREATE( OR REPLACE)? (TRIGGER|FUNCTION)|DROP TRIGGER IF EXISTS|"
        r"ALTER TABLE \w+ ADD COLUMN \w+ \w+( PRECISION)?( NOT NULL DEFAULT \S+| DEFAULT \S+)?$"
    )
    for statement in schema.migrations_after(schema.min_reader, dialect):
        assert added.match(statement), f"raise min_reader: {statement}"


async def test_a_cancelled_write_leaves_the_ledger_usable(ledger: Ledger) -> None:
    for n in range(30):
        task = asyncio.ensure_future(ledger.write([record(), record()]))
        for _ in range(n):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    written = (await grand_total(ledger)).calls
    assert written % 2 == 0
    await asyncio.gather(*(ledger.write([record()]) for _ in range(30)))
    assert (await grand_total(ledger)).calls >= written + 30


def test_a_record_has_no_fields_for_inputs() -> None:
    names = {field.name for field in fields(CallRecord)}
    assert not names & {"prompt", "url", "path", "query", "headers", "body", "key", "image"}
