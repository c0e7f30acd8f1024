"""Groups of operations on an SQLite file."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

import pytest

from falproxy.stores.file_schema import FileSchema
from falproxy.stores.operation_groups import GROUP_MAX
from falproxy.stores.sqlite_file_store import SqliteFileStore

PRAGMAS = "PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON"
TABLES = """
    CREATE TABLE IF NOT EXISTS parents (id TEXT PRIMARY KEY, kept_until REAL NOT NULL);
    CREATE TABLE IF NOT EXISTS rows (
        id TEXT PRIMARY KEY, kept_until REAL NOT NULL,
        parent TEXT REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED
    );
"""
SCHEMA = FileSchema(PRAGMAS, (TABLES,))
FOREVER = 1e12


class RowsError(Exception):
    pass


class Rows(SqliteFileStore):
    """clock: counts the transactions."""

    schema, tables, error_type = SCHEMA, ("rows",), RowsError
    busy_timeout = 0.5

    async def add(self, name: str, parent: str | None = None) -> float:
        """Return the time of the transaction."""
        return await self._write(self._add, name, parent)

    async def fail(self, error: Exception) -> None:
        await self._write(self._fail, error)

    async def names(self) -> set[str]:
        return await self._read(self._names)

    def _add(
        self, connection: sqlite3.Connection, now: float, name: str, parent: str | None
    ) -> float:
        connection.execute("INSERT INTO rows VALUES (?, ?, ?)", (name, FOREVER, parent))
        return now

    def _fail(self, connection: sqlite3.Connection, now: float, error: Exception) -> None:
        connection.execute("INSERT INTO rows VALUES ('failed', ?, NULL)", (FOREVER,))
        raise error

    def _names(self, connection: sqlite3.Connection, now: float) -> set[str]:
        return {name for (name,) in connection.execute("SELECT id FROM rows")}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.sqlite"


@pytest.fixture
async def store(file: Path) -> AsyncIterator[Rows]:
    numbers = count(1)
    async with Rows(file, clock=lambda: float(next(numbers))) as opened:
        await opened.add("first")
        yield opened


def written(file: Path) -> set[str]:
    """Return what another process reads."""
    with closing(sqlite3.connect(file)) as connection:
        return {name for (name,) in connection.execute("SELECT id FROM rows")}


@contextmanager
def locked(file: Path) -> Iterator[None]:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


async def test_operations_that_wait_are_one_transaction(store: Rows) -> None:
    times = await asyncio.gather(*(store.add(str(number)) for number in range(50)))
    assert len(set(times)) == 1


async def test_operations_that_come_meanwhile_are_the_next_transaction(store: Rows) -> None:
    first = asyncio.create_task(store.add("a"))
    for _ in range(3):
        await asyncio.sleep(0)
    times = await asyncio.gather(first, *(store.add(str(number)) for number in range(50)))
    assert len(set(times[1:])) == 1
    assert len(set(times)) == 2


async def test_a_large_number_of_operations_is_several_transactions(store: Rows) -> None:
    times = await asyncio.gather(*(store.add(str(number)) for number in range(2 * GROUP_MAX + 1)))
    assert len(set(times)) == 3
    assert times == sorted(times)


async def test_an_operation_has_ended_when_other_processes_see_it(store: Rows, file: Path) -> None:
    async def add(name: str) -> bool:
        await store.add(name)
        return name in written(file)

    assert all(await asyncio.gather(*(add(str(number)) for number in range(20))))


@pytest.mark.parametrize(
    "bad",
    [
        lambda store: store.add("first"),
        lambda store: store.add("child", "no parent"),  # fails when it is committed
        lambda store: store.add(object()),
        lambda store: store.fail(sqlite3.IntegrityError("bad row")),
        lambda store: store.fail(OverflowError("too large")),
        lambda store: store.fail(ValueError("a bug")),
    ],
    ids=["unique", "at commit", "type", "integrity", "overflow", "bug"],
)
@pytest.mark.parametrize("position", [0, 2, 4])
async def test_an_operation_fails_alone(store: Rows, file: Path, bad, position: int) -> None:  # type: ignore[no-untyped-def]
    operations = [store.add(str(number)) for number in range(4)]
    operations.insert(position, bad(store))
    outcomes = await asyncio.gather(*operations, return_exceptions=True)
    failed = [isinstance(outcome, Exception) for outcome in outcomes]
    assert failed == [number == position for number in range(5)]
    assert isinstance(outcomes[position], RowsError | OverflowError | ValueError)
    assert written(file) == await store.names() == {"first", *map(str, range(4))}


async def test_an_operation_that_fails_alone_is_rolled_back(store: Rows, file: Path) -> None:
    with pytest.raises(ValueError, match="a bug"):
        await store.fail(ValueError("a bug"))
    assert written(file) == {"first"}
    await store.add("next")
    assert written(file) == {"first", "next"}


async def test_the_cancellation_of_a_caller_loses_no_other_operation(store: Rows) -> None:
    callers = [asyncio.create_task(store.add(str(number))) for number in range(5)]
    await asyncio.sleep(0)
    callers[1].cancel()  # before the group has started
    await asyncio.gather(*callers, return_exceptions=True)
    running = [asyncio.create_task(store.add(str(number))) for number in range(5, 10)]
    for _ in range(2):
        await asyncio.sleep(0)
    running[1].cancel()
    outcomes = await asyncio.gather(*callers, *running, return_exceptions=True)
    cancelled = [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes]
    assert cancelled == [number in (1, 6) for number in range(10)]
    assert await store.names() == {"first", *map(str, range(10))} - {"1"}


async def test_a_store_closes_when_all_callers_are_cancelled(file: Path) -> None:
    async with asyncio.timeout(5), Rows(file) as store:
        tasks = [asyncio.create_task(store.add(str(number))) for number in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.add("later")
        assert await store.names() == {"later"}


async def test_operations_that_wait_are_written_when_the_store_closes(file: Path) -> None:
    async with Rows(file) as store:
        tasks = [asyncio.create_task(store.add(str(number))) for number in range(3)]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert written(file) == {"0", "1", "2"}


async def test_operations_on_a_closed_store_fail(file: Path) -> None:
    async with Rows(file) as store:
        await store.add("a")
    for _ in range(2):
        async with asyncio.timeout(5):
            late = store.add("b"), store.names()
            outcomes = await asyncio.gather(*late, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {RowsError}
        assert {str(outcome) for outcome in outcomes} == {
            "rows.sqlite cannot be used: it is closed"
        }


@pytest.mark.timed
async def test_all_operations_that_wait_for_a_lock_fail_together(store: Rows, file: Path) -> None:
    """Those that came later do not wait for the lock once more."""
    async with Rows(file) as other:
        assert await other.names() == {"first"}
        with locked(file):
            started = time.monotonic()
            tasks = []
            for number in range(4):
                tasks += [asyncio.create_task(other.add(f"{number}-{n}")) for n in range(5)]
                await asyncio.sleep(0.05)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert time.monotonic() - started < 0.9
            assert all(isinstance(outcome, RowsError) for outcome in outcomes)
        await other.add("later")
    assert written(file) == {"first", "later"}


async def test_a_file_that_is_locked_can_be_read(store: Rows, file: Path) -> None:
    async with Rows(file) as other:
        assert await other.names() == {"first"}
        with locked(file):
            assert await other.names() == {"first"}
            outcomes = await asyncio.gather(
                other.names(), other.add("a"), other.names(), return_exceptions=True
            )
    assert isinstance(outcomes[1], RowsError)
    assert outcomes[0] == outcomes[2] == {"first"}


async def test_a_group_on_a_broken_file_fails_and_the_next_one_opens_it_again(
    store: Rows, file: Path
) -> None:
    content = file.read_bytes()
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    file.write_bytes(b"not a database".ljust(len(content), b"."))
    async with Rows(file) as other:
        outcomes = await asyncio.gather(
            other.add("a"), other.names(), other.add("b"), return_exceptions=True
        )
        assert all(isinstance(outcome, RowsError) for outcome in outcomes)
        file.unlink()
        await asyncio.gather(other.add("a"), other.add("b"))
        assert written(file) == {"a", "b"}
