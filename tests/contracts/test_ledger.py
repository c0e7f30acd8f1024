"""What every ledger does: one contract, over SQLite and over PostgreSQL."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import pytest

from falproxy.fal.results import FalImage
from falproxy.stores.ledger import (
    CallRecord,
    GroupBy,
    InvalidRowError,
    JobRow,
    Lease,
    Ledger,
    LedgerError,
    Outcome,
    SchemaError,
    Totals,
    UsageQuery,
    new_job_id,
)
from falproxy.stores.ledger.postgres import postgres_ledger
from falproxy.stores.ledger.sqlite import sqlite_ledger
from falproxy.stores.ledger.writer import LedgerWriter
from tests.support.postgres_server import PostgresServer, postgres_server

LEASE = 0.2
ANN = Lease("ann", 30.0)
BEN = Lease("ben", 30.0)
NOON = 1_800_000_000.0 - 1_800_000_000 % 86400 + 43200
HOUR, DAY = 3600.0, 86400.0
ALL = UsageQuery()


@dataclass(slots=True)
class Processes:
    """Ledgers that share one file or server, as those of several processes do."""

    make: Callable[[], Ledger]
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def ledger(self) -> Ledger:
        return await self.stack.enter_async_context(self.make())


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
async def processes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Processes]:
    if request.param == "sqlite":
        made = Processes(lambda: sqlite_ledger(tmp_path / "data" / "ledger.sqlite"))
    else:
        url = request.getfixturevalue("server").fresh()
        made = Processes(lambda: postgres_ledger(url))
    async with made.stack:
        yield made


@pytest.fixture
async def ledger(processes: Processes) -> Ledger:
    return await processes.ledger()


@pytest.fixture
async def other(processes: Processes) -> Ledger:
    """The ledger of another process."""
    return await processes.ledger()


def entry(at: float = NOON, **given: object) -> CallRecord:
    return replace(CallRecord(at=at, route="proxy", status=200), **given)  # type: ignore[arg-type]


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
)


async def sums(ledger: Ledger, question: UsageQuery = ALL) -> Totals:
    ((name, totals),) = await ledger.totals(question)
    assert name == ""
    return totals


async def test_a_new_ledger_is_empty(ledger: Ledger) -> None:
    await ledger.probe()
    assert await ledger.latest(ALL) == []
    assert await sums(ledger) == Totals()
    assert await ledger.totals(ALL, "endpoint") == []
    assert await ledger.get_job("id", "ann") is None
    assert await ledger.claim_jobs(ANN) == []
    assert await ledger.delete_before(NOON) == 0


async def test_an_entry_comes_back_as_it_was(ledger: Ledger, other: Ledger) -> None:
    await ledger.write([FULL])
    assert await other.latest(ALL) == [FULL]


async def test_what_is_unknown_stays_unknown(ledger: Ledger) -> None:
    await ledger.write([unknown := entry()])
    assert await ledger.latest(ALL) == [unknown]
    assert unknown.estimated is None


async def test_an_entry_that_is_written_twice_is_there_once(ledger: Ledger, other: Ledger) -> None:
    await ledger.write([FULL, FULL])
    await other.write([FULL, second := entry()])
    assert {each.id for each in await ledger.latest(ALL)} == {FULL.id, second.id}
    assert (await sums(ledger)).calls == 2


@pytest.mark.parametrize("count", [49, 50, 51, 130])
async def test_rows_that_are_written_together_are_as_those_that_are_not(
    ledger: Ledger, other: Ledger, count: int
) -> None:
    """Some ledgers write many rows by one statement."""
    odd = [
        replace(FULL, id=new_job_id(), at=NOON + number, principal="caf\u00e9\0" * (number % 2))
        for number in range(count)
    ]
    await ledger.write([*odd, entry(NOON - 1), *odd[:60]])
    alone = [replace(each, id=new_job_id()) for each in odd]
    for each in alone:
        await other.write([each])
    known = await ledger.latest(UsageQuery(since=NOON))
    mine = {each.id: each for each in known}
    assert len(known) == 2 * count
    for one, two in zip(odd, alone, strict=True):
        assert replace(mine[one.id], id="") == replace(mine[two.id], id="")


async def test_one_row_that_does_not_fit_keeps_all_of_its_company_out(ledger: Ledger) -> None:
    rows = [entry(NOON + number) for number in range(60)]
    rows[30].status = 2**70
    with pytest.raises(InvalidRowError):
        await ledger.write(rows)
    assert await ledger.latest(ALL) == []


async def test_the_newest_come_first(ledger: Ledger) -> None:
    written = [entry(NOON + n) for n in range(10)]
    await ledger.write(written)
    assert await ledger.latest(UsageQuery(limit=3)) == written[:-4:-1]


@pytest.mark.parametrize("is_early", [True, False], ids=["before its entry", "after it"])
async def test_an_outcome_belongs_to_its_entry(
    ledger: Ledger, other: Ledger, is_early: bool
) -> None:
    submit = entry(request_id="r", estimated=40_000)
    ending = Outcome(request_id="r", status=422, error="bad", units=Decimal("0.5"), settled=20_000)
    rows: list[CallRecord | Outcome] = [ending, submit] if is_early else [submit, ending]
    for row in rows:
        await other.write([row])
    known = replace(submit, status=422, error="bad", units=Decimal("0.5"), settled=20_000)
    assert await ledger.latest(ALL) == [known]
    totals = await sums(ledger)
    assert (totals.errors, totals.spent) == (1, 20_000)


async def test_an_outcome_that_is_told_again_forgets_nothing(ledger: Ledger) -> None:
    await ledger.write([entry(request_id="r", estimated=5)])
    await ledger.write([Outcome(request_id="r", status=200, units=Decimal(2), settled=7)])
    await ledger.write([Outcome(request_id="r", status=200)] * 2)
    (known,) = await ledger.latest(ALL)
    assert (known.units, known.settled) == (Decimal(2), 7)


async def test_a_result_that_came_after_all_stands(ledger: Ledger) -> None:
    await ledger.write([entry(request_id="r", estimated=5)])
    away = Outcome(request_id="r", status=502, error="unreachable", settled=0)
    for told in (away, Outcome(request_id="r", status=200), away):
        await ledger.write([told])
    (known,) = await ledger.latest(ALL)
    assert (known.status, known.error, known.settled) == (200, None, None)
    assert (await sums(ledger)).spent == 5


MONEY = [
    pytest.param({"estimated": 5}, (5, 0, 0), id="an estimate counts until more is known"),
    pytest.param({"estimated": 5, "settled": 7}, (7, 0, 0), id="what was settled counts"),
    pytest.param({"estimated": 5, "settled": 0}, (0, 0, 0), id="nothing is a price as well"),
    pytest.param({}, (0, 0, 1), id="unknown is not nothing"),
    pytest.param({"cache": "hit", "estimated": 5}, (0, 5, 0), id="a hit saves its price"),
    pytest.param(
        {"cache": "hit", "estimated": 5, "settled": 0}, (0, 5, 0), id="which cost nothing itself"
    ),
    pytest.param({"cache": "collapsed", "estimated": 5}, (0, 5, 0), id="so does a shared job"),
    pytest.param({"cache": "hit"}, (0, 0, 0), id="a hit of unknown price buys nothing"),
    pytest.param({"cache": "bypass", "estimated": 5}, (5, 0, 0), id="a bypass buys"),
    pytest.param({"status": 500}, (0, 0, 0), id="a failure of unknown price is no riddle"),
    pytest.param({"status": 499, "estimated": 5}, (5, 0, 0), id="who left is charged"),
    pytest.param({"estimated": 2**53}, (2**53, 0, 0), id="more than a float holds exactly"),
]


@pytest.mark.parametrize(("given", "money"), MONEY)
async def test_money_is(
    ledger: Ledger, given: dict[str, object], money: tuple[int, int, int]
) -> None:
    await ledger.write([entry(**given)])  # type: ignore[arg-type]
    totals = await sums(ledger)
    assert (totals.spent, totals.saved, totals.unpriced) == money
    assert {type(each) for each in (totals.spent, totals.saved)} == {int}


async def test_totals_are_whole_numbers_beyond_what_a_float_holds(ledger: Ledger) -> None:
    await ledger.write([entry(settled=2**53), entry(settled=1), entry(settled=2**53)])
    assert (await sums(ledger)).spent == 2**54 + 1


async def test_the_hit_rate_is_of_calls_that_could_have_been_hits(ledger: Ledger) -> None:
    assert (await sums(ledger)).hit_rate is None
    outcomes = ["hit", "collapsed", "miss", "miss", "bypass", None]
    await ledger.write([entry(cache=each) for each in outcomes])
    totals = await sums(ledger)
    assert (totals.hits, totals.misses, totals.hit_rate) == (2, 2, 0.5)


@pytest.mark.parametrize(
    ("by", "names"),
    [
        pytest.param("endpoint", ["dear", "cheap", ""], id="dearest endpoint first"),
        pytest.param("principal", ["ben", "ann"], id="by principal"),
        pytest.param("route", ["kontext", "proxy"], id="by route"),
        pytest.param(
            "hour",
            ["2027-01-14T11:00Z", "2027-01-15T12:00Z", "2027-01-15T13:00Z"],
            id="by hour, the oldest first",
        ),
        pytest.param("day", ["2027-01-14", "2027-01-15"], id="by day"),
    ],
)
async def test_totals_are_told_apart(ledger: Ledger, by: GroupBy, names: list[str]) -> None:
    await ledger.write(
        [
            entry(NOON, endpoint="cheap", principal="ann", settled=1),
            entry(NOON + HOUR - 0.001, endpoint="cheap", principal="ann", settled=1),
            entry(NOON + HOUR, endpoint="dear", principal="ben", route="kontext", settled=100),
            entry(NOON - DAY - 0.001, principal="ann"),
        ]
    )
    found = await ledger.totals(ALL, by)
    assert [name for name, _ in found] == names
    assert sum(totals.calls for _, totals in found) == 4
    assert sum(totals.spent for _, totals in found) == 102
    assert [name for name, _ in await ledger.totals(UsageQuery(limit=1), by)] == names[:1]


async def test_a_question_is_about_a_time_and_a_principal(ledger: Ledger) -> None:
    await ledger.write([entry(NOON + n, principal="ann") for n in range(5)])
    await ledger.write([entry(NOON + n, principal="ben") for n in range(5)])
    some = UsageQuery(since=NOON + 1, until=NOON + 3, principal="ann")
    assert (await sums(ledger, some)).calls == len(await ledger.latest(some)) == 2
    assert [each.at for each in await ledger.latest(some)] == [NOON + 2, NOON + 1]
    assert (await sums(ledger, UsageQuery(principal="nobody"))).calls == 0


async def test_what_is_old_is_forgotten(ledger: Ledger) -> None:
    await ledger.write([entry(NOON + n) for n in range(2500)])
    assert await ledger.delete_before(NOON + 2400) == 2400
    assert (await sums(ledger)).calls == 100
    assert await ledger.delete_before(NOON + 2400) == 0


async def test_finished_jobs_and_outcomes_are_forgotten_as_well(ledger: Ledger) -> None:
    running, done = await ledger.add_job(job(), ANN), await ledger.add_job(job(), ANN)
    await ledger.save_job(replace(done, status="failed"))
    await ledger.write([Outcome(request_id="r", status=200, settled=5)])
    await ledger.delete_before(time.time() + 60)
    assert await ledger.get_job(done.id, done.owner) is None
    assert await ledger.get_job(running.id, running.owner) is not None
    await ledger.write([entry(request_id="r")])
    assert (await ledger.latest(ALL))[0].settled is None


@pytest.mark.parametrize(("retention", "kept"), [(2 * DAY, 1), (None, 3)])
async def test_a_writer_deletes_records_older_than_the_retention(
    ledger: Ledger, other: Ledger, retention: float | None, kept: int
) -> None:
    now = time.time()
    await ledger.write([entry(now - 400 * DAY), entry(now - 2 * DAY - 60), entry(now - DAY)])
    writer = LedgerWriter(other, retention)
    await writer.open()
    writer.enqueue(entry(now))
    async with asyncio.timeout(10):
        while (await sums(ledger)).calls != kept + 1:
            await asyncio.sleep(0.01)
    await writer.close(5)
    assert {record.at for record in await ledger.latest(ALL)} >= {
        round(at, 3) for at in (now, now - DAY)
    }


ODD = [
    "",
    "a\0b",
    "\ud800",
    "'; DROP TABLE falproxy_entries; --",
    "$1 NOW ?",
    "ключ 🔑",
    "x" * 9000,
]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
async def test_any_text_is_written_in_its_place(ledger: Ledger, odd: str) -> None:
    await ledger.write([entry(principal=odd, user_id=odd, endpoint=odd, request_id=odd, error=odd)])
    await ledger.write([Outcome(request_id=odd, status=200, settled=7)])
    (known,) = await ledger.latest(UsageQuery(principal=odd))
    assert known.settled == 7
    assert known.endpoint is not None
    assert len(known.endpoint) <= 500
    ((_, totals),) = await ledger.totals(UsageQuery(principal=odd), "endpoint")
    assert totals.spent == 7


async def test_a_batch_with_a_row_that_does_not_fit_is_not_written(ledger: Ledger) -> None:
    with pytest.raises(InvalidRowError):
        await ledger.write([entry(), entry(status=2**70)])
    assert await ledger.latest(ALL) == []
    await ledger.write([entry()])
    assert (await sums(ledger)).calls == 1


def job(**given: object) -> JobRow:
    start = JobRow(owner="ann", model="flux-dev", endpoint="fal-ai/flux/dev", request_id="r")
    return replace(start, id=uuid4().hex, **given)  # type: ignore[arg-type]


async def test_a_job_comes_back_as_it_was(ledger: Ledger, other: Ledger) -> None:
    given = job(
        app="fal-ai/flux",
        key_mark="mark",
        user_id="user 7",
        status="running",
        images=(FalImage("https://a/1.png", 1024, 768), FalImage("https://a/ü.png")),
        error="code",
        error_message="It\n'failed'.",
        estimated=40_000,
        settled=41_000,
    )
    before = time.time()
    kept = await ledger.add_job(given, ANN)
    assert before - 0.1 <= kept.created_at == kept.updated_at <= time.time() + 0.1
    assert replace(kept, created_at=0.0, updated_at=0.0) == given
    assert await other.get_job(given.id, "ann") == kept


async def test_only_its_owner_gets_a_job(ledger: Ledger) -> None:
    kept = await ledger.add_job(job(), ANN)
    for owner in ("ben", "", "ANN", "ann "):
        assert await ledger.get_job(kept.id, owner) is None


async def test_a_job_that_is_added_again_is_the_one_that_is_there(
    ledger: Ledger, other: Ledger
) -> None:
    kept = await ledger.add_job(job(), ANN)
    again = await other.add_job(replace(kept, request_id="bought twice"), BEN)
    assert again == kept


async def test_a_job_changes_until_it_is_finished(ledger: Ledger, other: Ledger) -> None:
    kept = await ledger.add_job(job(request_id=None), ANN)
    accepted = await ledger.save_job(replace(kept, app="a", request_id="r", key_mark="m"))
    assert accepted is not None
    assert (accepted.request_id, accepted.finished_at) == ("r", None)
    running = await other.save_job(replace(accepted, status="running"))
    assert running is not None
    images = (FalImage("https://a/1.png", 1, 2),)
    done = await other.save_job(replace(running, status="completed", images=images, settled=5))
    assert done is not None
    assert done.finished_at == done.updated_at
    assert kept.created_at <= done.updated_at
    assert (done.images, done.settled) == (images, 5)
    assert await ledger.save_job(replace(running, status="failed")) is None
    assert await ledger.get_job(kept.id, "ann") == done


async def test_a_job_that_nobody_added_is_not_saved(ledger: Ledger) -> None:
    assert await ledger.save_job(job()) is None


async def test_a_job_is_followed_by_one(ledger: Ledger, other: Ledger) -> None:
    await ledger.add_job(job(), ANN)
    assert await other.claim_jobs(BEN) == []
    assert await ledger.claim_jobs(ANN) == []


async def test_an_abandoned_job_is_taken_over_once(ledger: Ledger, other: Ledger) -> None:
    kept = [await ledger.add_job(job(), Lease("ann", LEASE)) for _ in range(3)]
    await ledger.save_job(replace(kept[1], status="failed"))
    await asyncio.sleep(LEASE + 0.05)
    assert await other.claim_jobs(BEN, limit=1) == [kept[0]]
    assert await other.claim_jobs(BEN) == [kept[2]]
    assert await other.claim_jobs(BEN) == []
    assert await ledger.claim_jobs(ANN) == []


async def test_who_says_that_it_lives_keeps_its_jobs(ledger: Ledger, other: Ledger) -> None:
    await ledger.add_job(job(), Lease("ann", 0.4))
    for _ in range(4):
        await asyncio.sleep(0.15)
        assert await ledger.claim_jobs(Lease("ann", 0.4)) == []
        assert await other.claim_jobs(BEN) == []


async def test_of_many_who_claim_at_once_each_gets_others(processes: Processes) -> None:
    ledgers = [await processes.ledger() for _ in range(5)]
    for _ in range(5):
        added = [await ledgers[0].add_job(job(), Lease("gone", 0.0)) for _ in range(100)]
        claims = (each.claim_jobs(Lease(str(n), 30.0)) for n, each in enumerate(ledgers))
        claimed = [row.id for rows in await asyncio.gather(*claims) for row in rows]
        assert sorted(claimed) == sorted(row.id for row in added)


@pytest.mark.parametrize("name", ["owner", "request_id", "app"])
async def test_a_job_is_its_owner_s_to_the_letter_or_not_taken(ledger: Ledger, name: str) -> None:
    for odd in ODD:
        given = job(**{name: odd})
        try:
            kept = await ledger.add_job(given, ANN)
        except LedgerError:
            assert odd in ("a\0b", "\ud800")
            continue
        assert getattr(kept, name) == odd
        assert await ledger.get_job(given.id, kept.owner) == kept


async def test_several_start_at_once_on_nothing(processes: Processes) -> None:
    ledgers = [await processes.ledger() for _ in range(6)]
    await asyncio.gather(*(each.write([entry()]) for each in ledgers))
    assert (await sums(ledgers[0])).calls == 6


async def test_what_was_written_is_there_after_a_restart(processes: Processes) -> None:
    async with processes.make() as first:
        await first.write([FULL])
        kept = await first.add_job(job(), ANN)
    async with processes.make() as second:
        assert await second.latest(ALL) == [FULL]
        assert await second.get_job(kept.id, "ann") == kept


async def test_a_newer_ledger_is_left_alone(processes: Processes) -> None:
    async with processes.make() as newer:
        await newer.write([entry()])
        await newer._database.execute("UPDATE falproxy_ledger SET version = 1000")  # type: ignore[attr-defined]
    async with processes.make() as older:
        with pytest.raises(SchemaError, match=r"newer falproxy \(version 1000, .* Upgrade"):
            await older.probe()
        with pytest.raises(SchemaError):
            await older.latest(ALL)


async def test_who_is_cancelled_leaves_the_ledger_usable(ledger: Ledger) -> None:
    for n in range(30):
        task = asyncio.ensure_future(ledger.write([entry(), entry()]))
        for _ in range(n):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    written = (await sums(ledger)).calls
    assert written % 2 == 0
    await asyncio.gather(*(ledger.write([entry()]) for _ in range(30)))
    assert (await sums(ledger)).calls >= written + 30


def test_an_entry_has_no_place_for_what_was_said() -> None:
    names = {each.name for each in fields(CallRecord)}
    assert not names & {"prompt", "url", "path", "query", "headers", "body", "key", "image"}
