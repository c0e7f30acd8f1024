"""Starts of processes in the ledger, over SQLite and over PostgreSQL."""

import asyncio
from dataclasses import astuple

import pytest

from falproxy.stores.ledger import CallRecord, Ledger, LedgerError, ProcessStart, UsageQuery
from falproxy.stores.ledger.process_starts import STARTS_MAX, read_starts, this_start
from falproxy.stores.ledger.writer import LedgerWriter
from tests.support.ledger_processes import LedgerProcesses
from tests.support.ledger_schema import UNDO_STORED_SECONDS
from tests.support.virtual_time import run_in_virtual_time
from tests.support.waiting import SOON

NOON = 1_800_000_000.0
HOUR = 3600.0


async def add(ledger: Ledger, *starts: tuple[float, str, str]) -> None:
    """Add starts: seconds after noon, version, host."""
    for after, version, host in starts:
        await ledger.add_start(ProcessStart(version, host, NOON + after))


async def marks(ledger: Ledger, since: float = 0, until: float = HOUR) -> list[tuple[object, ...]]:
    found = await read_starts(ledger, NOON + since, NOON + until)
    return [(mark.at - NOON, *astuple(mark)[1:]) for mark in found]


async def test_no_starts_are_no_marks(ledger: Ledger) -> None:
    assert await marks(ledger) == []


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        pytest.param([(5, "1.0", "a")], [(5, "1.0", 1, 1, True)], id="the first start of all"),
        pytest.param(
            [(5, "1.0", "a"), (6, "1.0", "a"), (7, "1.0", "b")],
            [(5, "1.0", 3, 2, True)],
            id="several processes on two hosts",
        ),
        pytest.param(
            [(5, "1.0", "a"), (100, "1.0", "a")],
            [(5, "1.0", 1, 1, True), (100, "1.0", 1, 1, False)],
            id="a restart",
        ),
        pytest.param(
            [(5, "1.0", "a"), (6, "1.1", "a"), (7, "1.0", "b")],
            [(5, "1.0", 1, 1, True), (6, "1.1", 1, 1, True), (7, "1.0", 1, 1, True)],
            id="a deploy that is taken back at once",
        ),
        pytest.param(
            [(7, "1.0", "a"), (5, "1.0", "a")], [(5, "1.0", 2, 1, True)], id="written out of order"
        ),
        pytest.param(
            [(at, "1.0", "a") for at in range(0, 150, 10)],
            [(0, "1.0", 6, 1, True), (60, "1.0", 6, 1, False), (120, "1.0", 3, 1, False)],
            id="a process that keeps failing has a mark each minute",
        ),
        pytest.param(
            [(-10, "1.0", "a"), (5, "1.0", "a")],
            [(5, "1.0", 1, 1, False)],
            id="a restart whose start before is outside of the period",
        ),
        pytest.param(
            [(-3 * HOUR, "0.9", "a"), (-2 * HOUR, "1.0", "a"), (5, "1.1", "a")],
            [(5, "1.1", 1, 1, True)],
            id="a new version, whose start before is outside of the period",
        ),
        pytest.param(
            [(0, "1.0", "a"), (HOUR, "1.1", "a")],
            [(0, "1.0", 1, 1, True)],
            id="the end of the period is exclusive",
        ),
        pytest.param(
            [(5, "1\0.0", "h\ud800" * 400)], [(5, "1\ufffd.0", 1, 1, True)], id="unusual texts"
        ),
    ],
)
async def test_starts_are_marked_by_version_and_time(
    ledger: Ledger,
    starts: list[tuple[float, str, str]],
    expected: list[tuple[object, ...]],
) -> None:
    await add(ledger, *starts)
    assert await marks(ledger) == expected


async def test_a_start_that_is_written_again_is_one_start(ledger: Ledger) -> None:
    start = ProcessStart("1.0", "a", NOON)
    await ledger.add_start(start)
    await ledger.add_start(start)
    assert await marks(ledger) == [(0, "1.0", 1, 1, True)]


async def test_the_newest_starts_are_read(ledger: Ledger) -> None:
    await asyncio.gather(
        *(add(ledger, (number, "1.0", "a")) for number in range(-60, STARTS_MAX + 60))
    )
    found = await marks(ledger, since=-60, until=2 * HOUR)
    assert sum(mark[2] for mark in found if isinstance(mark[2], int)) == STARTS_MAX
    assert not any(mark[-1] for mark in found), "the start before the first one is unknown"


async def test_starts_are_deleted_with_the_records(ledger: Ledger) -> None:
    await add(ledger, (0, "1.0", "a"), (100, "1.0", "a"))
    await ledger.write([CallRecord(at=NOON, route="proxy", status=200)])
    assert await ledger.delete_before(NOON + 50) == 1
    assert await marks(ledger) == [(100, "1.0", 1, 1, True)]


async def test_a_process_is_recorded_once_however_often_its_application_is_created(
    ledger: Ledger, ledger_processes: LedgerProcesses
) -> None:
    start = this_start()
    assert start is this_start()
    for _ in range(2):
        writer = LedgerWriter(await ledger_processes.store(), start=start)
        await writer.open()
        async with asyncio.timeout(SOON):
            while not await read_starts(ledger, start.at - 1, start.at + 1):
                await asyncio.sleep(0.01)
        await writer.close(5.0)
    found = await read_starts(ledger, start.at - 1, start.at + 1)
    assert [(mark.version, mark.processes) for mark in found] == [(start.version, 1)]


async def test_a_ledger_of_a_version_before_gets_the_table(
    ledger_processes: LedgerProcesses,
) -> None:
    async with ledger_processes.make() as first:
        await first.probe()
        for statement in (
            *UNDO_STORED_SECONDS,
            "DROP TABLE falproxy_starts",
            "UPDATE falproxy_ledger SET version = 5",
        ):
            await first._database.execute(statement)  # type: ignore[attr-defined]
    async with ledger_processes.make() as second:
        await add(second, (5, "1.0", "a"))
        assert await marks(second) == [(5, "1.0", 1, 1, True)]
        assert await second.totals(UsageQuery())


class LedgerAway:
    """A ledger that fails a number of times before it records a start."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.starts: list[ProcessStart] = []

    async def probe(self) -> None: ...

    async def sum_periods(self, until: float, limit: int) -> int:
        return 0

    async def add_start(self, start: ProcessStart) -> None:
        if self.failures:
            self.failures -= 1
            raise LedgerError("away")
        self.starts.append(start)


def test_a_start_is_recorded_when_the_ledger_is_back() -> None:
    ledger = LedgerAway(failures=3)

    async def run_writer() -> None:
        writer = LedgerWriter(ledger, start=this_start())  # type: ignore[arg-type]
        await writer.open()
        await asyncio.sleep(10)
        await writer.close(1.0)

    run_in_virtual_time(run_writer())
    assert ledger.starts == [this_start()]
