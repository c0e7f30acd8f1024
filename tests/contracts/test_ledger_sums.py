"""Totals from sums of periods, over SQLite and over PostgreSQL: they are those of the records.

`tests/stores/ledger/test_totals.py` compares them with sums in Python, over generated rows.
"""

import asyncio
from collections.abc import Sequence

import pytest

from falproxy.stores.ledger import (
    CallRecord,
    Ledger,
    LedgerError,
    Outcome,
    Totals,
    UsageQuery,
    UserTotals,
    database,
)
from falproxy.stores.ledger.schema import Schema
from falproxy.stores.ledger.statements import LEDGER_SCHEMA
from tests.support.ledger_processes import LedgerProcesses
from tests.support.ledger_schema import UNDO_CALL_TIMES
from tests.support.waiting import wait_until

HOUR, DAY = 3600.0, 86400.0
START = 1_800_000_000.0 // DAY * DAY
END = START + 100 * DAY
ALL = UsageQuery()


def record(at: float, request_id: str | None = None, user_id: str = "u") -> CallRecord:
    return CallRecord(
        at=at, route="proxy", status=200, request_id=request_id, settled=5, user_id=user_id
    )


async def sum_all(ledger: Ledger) -> int:
    """Compute all sums. Return the number of periods."""
    total = 0
    while count := await ledger.sum_periods(END, 1000):
        total += count
    return total


async def calls(ledger: Ledger, query: UsageQuery = ALL) -> int:
    ((_, totals),) = await ledger.totals(query)
    return totals.calls


async def execute(ledger: Ledger, statement: str) -> Sequence[Sequence[object]]:
    return await ledger._database.execute(statement)  # type: ignore[attr-defined,no-any-return]


async def test_sums_are_computed_once_for_each_hour_day_and_month(ledger: Ledger) -> None:
    await ledger.write([record(START + n * HOUR) for n in (0, 0.5, 1, 25)])
    assert await sum_all(ledger) == 3 + 2 + 1
    assert await sum_all(ledger) == 0
    assert await calls(ledger) == 4


async def test_totals_read_sums_instead_of_records(ledger: Ledger) -> None:
    await ledger.write([record(START), record(START + DAY)])
    await sum_all(ledger)
    await execute(ledger, "UPDATE falproxy_sums SET calls = 10")
    assert await calls(ledger) == 10
    assert await calls(ledger, UsageQuery(since=START + HOUR, until=START + 3 * DAY)) == 10
    assert await calls(ledger, UsageQuery(since=START + DAY + 1, until=START + 3 * DAY)) == 0
    assert await ledger.totals_by_user(ALL) == [
        UserTotals("", "u", Totals(calls=10, spent=10, seconds=0.0))
    ]


async def test_a_period_is_summed_after_its_end(ledger: Ledger) -> None:
    await ledger.write([record(START)])
    assert await ledger.sum_periods(START + HOUR - 1, 10) == 0
    assert await ledger.sum_periods(START + HOUR, 10) == 1
    assert await ledger.sum_periods(START + DAY, 10) == 1


async def test_a_day_is_not_summed_before_its_hours(ledger: Ledger) -> None:
    await ledger.write([record(START), record(START + HOUR)])
    assert await ledger.sum_periods(END, 1) == 1
    await execute(ledger, "DELETE FROM falproxy_open_periods WHERE length = 2592000000")
    assert await ledger.sum_periods(END, 1) == 1
    assert await ledger.sum_periods(END, 1) == 1
    assert await ledger.sum_periods(END, 1) == 0


@pytest.mark.parametrize("at", [START, START + 90 * 60, START + 20 * DAY])
async def test_a_late_record_counts_immediately(ledger: Ledger, at: float) -> None:
    await ledger.write([record(START), record(START + 10 * DAY)])
    await sum_all(ledger)
    await ledger.write([record(at)])
    assert await calls(ledger) == 3
    await sum_all(ledger)
    assert await calls(ledger) == 3


async def test_a_late_outcome_counts_immediately(ledger: Ledger) -> None:
    await ledger.write([record(START, "r"), record(START + HOUR, "s")])
    await sum_all(ledger)
    for outcome, errors, spent in (
        (Outcome(request_id="r", status=500), 1, 10),
        (Outcome(request_id="r", status=200, settled=7), 0, 12),
    ):
        await ledger.write([outcome])
        for _ in range(2):
            ((_, totals),) = await ledger.totals(ALL)
            assert (totals.calls, totals.errors, totals.spent) == (2, errors, spent)
            await sum_all(ledger)


async def test_an_unchanged_outcome_opens_no_period(ledger: Ledger) -> None:
    await ledger.write([record(START, "r"), Outcome(request_id="r", status=200)])
    await sum_all(ledger)
    await ledger.write([Outcome(request_id="r", status=500)])
    assert await sum_all(ledger) == 0


async def test_deleted_records_do_not_count(ledger: Ledger) -> None:
    await ledger.write([record(START + n * HOUR) for n in range(50)])
    await sum_all(ledger)
    await ledger.delete_before(START + 30 * HOUR)
    assert await calls(ledger) == 20
    await sum_all(ledger)
    assert await calls(ledger) == 20
    rows = await execute(ledger, "SELECT COUNT(*) FROM falproxy_sums WHERE number < 500008")
    assert await execute(ledger, "SELECT SUM(calls) FROM falproxy_sums WHERE kind = 'route'") == [
        (60,)
    ], rows


async def test_records_of_an_older_version_are_counted(ledger_processes: LedgerProcesses) -> None:
    """Nodes of both versions write while one is replaced by the other."""
    async with ledger_processes.make() as current:
        await current.probe()
        database_of = current._database  # type: ignore[attr-defined]
        older = database.LedgerDatabase(
            database_of._factory,
            Schema("falproxy_ledger", LEDGER_SCHEMA.migrations[:3], LEDGER_SCHEMA.tables[:4]),
        )
        await current.write([record(START, "r")])
        await sum_all(current)
        await older.execute(
            "INSERT INTO falproxy_entries (id, at, route, status, seconds, upstream_seconds) "
            f"VALUES ('old', {START * 1000:.0f}, 'proxy', 500, 1.0, 1.0)"
        )
        await older.execute(
            "INSERT INTO falproxy_outcomes (request_id, at, status) VALUES ('r', 1, 500)"
        )
        await older.close()
        for _ in range(2):
            ((_, totals),) = await current.totals(ALL)
            assert (totals.calls, totals.errors) == (2, 2)
            await sum_all(current)


async def test_records_from_before_the_migration_are_summed(
    ledger_processes: LedgerProcesses,
) -> None:
    async with ledger_processes.make() as first:
        await first.write([record(START), record(START + DAY)])
        for statement in (
            "DELETE FROM falproxy_open_periods",
            *UNDO_CALL_TIMES,
            "UPDATE falproxy_ledger SET version = 3",
        ):
            await execute(first, statement)
    async with ledger_processes.make() as second:
        assert await calls(second) == 2
        assert await sum_all(second) == 5
        assert await calls(second) == 2


async def test_operations_do_not_wait_for_a_long_migration(
    ledger_processes: LedgerProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on after the operation that started it has failed."""
    async with ledger_processes.make() as first:
        await first.write([record(START)])
        for statement in (*UNDO_CALL_TIMES, "UPDATE falproxy_ledger SET version = 3"):
            await execute(first, statement)
    async with ledger_processes.make() as second:
        slow = second._database  # type: ignore[attr-defined]
        slow._writer._timeout = 0.2
        apply, may_end = slow._apply_migrations, asyncio.Event()

        async def apply_slowly(connection: database.DbConnection) -> None:
            await may_end.wait()
            await apply(connection)

        monkeypatch.setattr(slow, "_apply_migrations", apply_slowly)
        for _ in range(2):
            with pytest.raises(LedgerError):
                await second.probe()
        may_end.set()
        await wait_until(lambda: not slow._migrations, seconds=5)
        assert await execute(second, "SELECT version FROM falproxy_ledger") == [
            (len(LEDGER_SCHEMA.migrations),)
        ]


async def test_processes_sum_while_others_write(ledger_processes: LedgerProcesses) -> None:
    """No record is lost between the sums of a period and the records after them."""
    writers = [await ledger_processes.store() for _ in range(3)]
    summing = [await ledger_processes.store() for _ in range(2)]
    is_done = False

    async def write(ledger: Ledger, writer: int) -> None:
        for n in range(30):
            await write_until_accepted(
                ledger, [record(START + (n % 3) * HOUR, f"{writer}-{n}"), record(START)]
            )
            await write_until_accepted(ledger, [Outcome(request_id=f"{writer}-{n}", status=500)])

    async def sum_forever(ledger: Ledger) -> None:
        while not is_done:
            await ledger.sum_periods(END, 3)

    tasks = [asyncio.create_task(sum_forever(each)) for each in summing]
    await asyncio.gather(*(write(each, n) for n, each in enumerate(writers)))
    is_done = True
    await asyncio.gather(*tasks, return_exceptions=True)
    await sum_all(writers[0])
    ((_, totals),) = await writers[1].totals(ALL)
    assert (totals.calls, totals.errors) == (180, 90)


async def write_until_accepted(ledger: Ledger, rows: Sequence[CallRecord | Outcome]) -> None:
    while True:
        try:
            return await ledger.write(rows)
        except LedgerError:  # such as a deadlock; the writer of the ledger tries again as well
            await asyncio.sleep(0.01)
