"""The end of a ledger while operations are in progress: no connection stays open."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from falproxy.stores.ledger import LedgerError, sqlite
from falproxy.stores.ledger import database as ledger_database
from falproxy.stores.ledger.database import DbConnection, LedgerDatabase
from falproxy.stores.ledger.sqlite import sqlite_database
from falproxy.stores.sqlite_open import connect_file
from tests.support.waiting import wait_until

SHORT, ENDLESS = 200_000, 10**12  # rows to count
COUNT = """
    WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {})
    SELECT COUNT(*) FROM numbers
"""


async def read(database: LedgerDatabase, rows: int) -> None:
    await database.read(COUNT.format(rows))


async def write(database: LedgerDatabase, rows: int) -> None:
    await database.execute(COUNT.format(rows))


async def until_threads_ended(before: set[threading.Thread]) -> None:
    # A thread ends just after it has reported
    await wait_until(lambda: not set(threading.enumerate()) - before, seconds=30)


@pytest.mark.parametrize("operate", [read, write])
@pytest.mark.parametrize("is_connected", [True, False])
@pytest.mark.parametrize("turns", [0, 1, 3, 10, 100])
async def test_an_operation_in_progress_ends_or_is_an_error(
    tmp_path: Path,
    operate: Callable[[LedgerDatabase, int], Awaitable[None]],
    is_connected: bool,
    turns: int,
) -> None:
    before = set(threading.enumerate())
    database = sqlite_database(tmp_path / "ledger.sqlite")
    if is_connected:
        await operate(database, 1)
    running = [asyncio.ensure_future(operate(database, SHORT)) for _ in range(3)]
    for _ in range(turns):
        await asyncio.sleep(0)
    await database.close()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), LedgerError}
    await database.close()  # those that began later have opened connections
    await until_threads_ended(before)


@pytest.mark.parametrize("operate", [read, write])
async def test_the_end_interrupts_a_long_statement(
    tmp_path: Path, operate: Callable[[LedgerDatabase, int], Awaitable[None]]
) -> None:
    before = set(threading.enumerate())
    database = sqlite_database(tmp_path / "ledger.sqlite")
    await operate(database, 1)
    running = asyncio.ensure_future(operate(database, ENDLESS))
    await asyncio.sleep(0.3)
    await database.close()
    await until_threads_ended(before)
    with pytest.raises(LedgerError, match="interrupted"):
        await running


async def test_the_statement_of_a_caller_that_leaves_is_interrupted(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    database = sqlite_database(tmp_path / "ledger.sqlite")
    running = asyncio.ensure_future(read(database, ENDLESS))
    await asyncio.sleep(0.3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await read(database, 1)
    await database.close()
    await until_threads_ended(before)


async def test_a_ledger_is_usable_after_its_end(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    database = sqlite_database(tmp_path / "ledger.sqlite")
    for _ in range(2):
        await read(database, 1)
        await write(database, 1)
        await database.close()
    await until_threads_ended(before)


class SlowDisk:
    """Files that are opened when `release` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_opening, self.release = threading.Event(), threading.Event()
        monkeypatch.setattr(sqlite, "connect_file", self.connect)

    def connect(self, file: Path, timeout: float) -> sqlite3.Connection:
        self.is_opening.set()
        self.release.wait(30)
        return connect_file(file, timeout)

    async def until_opening(self) -> None:
        await wait_until(self.is_opening.is_set, seconds=30)


@pytest.mark.parametrize("operate", [read, write])
async def test_the_end_waits_for_a_connection_that_a_slow_disk_opens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operate: Callable[[LedgerDatabase, int], Awaitable[None]],
) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(ledger_database, "CLOSE_TIMEOUT", 0.05)
    disk = SlowDisk(monkeypatch)
    database = sqlite_database(tmp_path / "ledger.sqlite")
    running = asyncio.ensure_future(operate(database, 1))
    await disk.until_opening()
    closing = asyncio.ensure_future(database.close())
    with pytest.raises(LedgerError, match="is closed"):
        await running
    assert not closing.done()
    disk.release.set()
    await closing
    await until_threads_ended(before)


async def test_a_caller_that_leaves_a_slow_disk_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    database = sqlite_database(tmp_path / "ledger.sqlite")
    running = asyncio.ensure_future(write(database, 1))
    await disk.until_opening()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    disk.release.set()
    await write(database, 1)
    await database.close()


@pytest.mark.parametrize("operate", [read, write])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5])
async def test_a_caller_may_leave_when_its_connection_has_just_been_opened(
    tmp_path: Path, operate: Callable[[LedgerDatabase, int], Awaitable[None]], turns: int
) -> None:
    """turns: of the event loop, from then until the caller leaves."""
    before = set(threading.enumerate())
    database = sqlite_database(tmp_path / "ledger.sqlite")
    await write(database, 1)  # creates the schema
    await database.close()
    loop = asyncio.get_running_loop()
    running: asyncio.Future[None] = asyncio.ensure_future(operate(database, SHORT))
    slot = database._writer if operate is write else database._reader
    connect = slot._connect

    def leave(turns: int) -> None:
        if turns:
            loop.call_soon(leave, turns - 1)
        else:
            running.cancel()

    async def connect_and_leave() -> DbConnection:
        connection = await connect()
        loop.call_soon(leave, turns)
        return connection

    slot._connect = connect_and_leave
    with pytest.raises(asyncio.CancelledError):
        await running
    await database.close()
    await until_threads_ended(before)


async def test_the_end_waits_for_threads_in_spite_of_a_pause_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(sqlite, "TERMINATED_INTERVAL", 0.02)
    monkeypatch.setattr(sqlite, "TERMINATED_CHECKS", 20)
    disk = SlowDisk(monkeypatch)
    factory = sqlite.SqliteFactory(tmp_path / "ledger.sqlite")
    connecting = asyncio.ensure_future(factory.connect())
    await disk.until_opening()
    connecting.cancel()
    await asyncio.wait([connecting])
    closing = asyncio.ensure_future(factory.wait_terminated())
    await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251 - the process is paused for longer than the end waits
    await asyncio.sleep(0.03)
    assert not closing.done()
    disk.release.set()
    await closing
    await until_threads_ended(before)


@pytest.mark.parametrize("cancellations", [0, 1, 2, 3])
async def test_the_end_waits_for_a_connection_whose_close_was_cancelled(
    tmp_path: Path, cancellations: int
) -> None:
    before = set(threading.enumerate())
    database = sqlite_database(tmp_path / "ledger.sqlite")
    await write(database, 1)
    connection = database._writer._connection
    assert isinstance(connection, sqlite.SqliteConnection)
    ended: list[str] = []

    def run_long() -> None:
        time.sleep(0.3)
        ended.append("statement")

    file: Any = connection.file
    running = asyncio.ensure_future(file._execute(run_long))
    closing = asyncio.ensure_future(database.disconnect())
    for _ in range(cancellations):
        await asyncio.sleep(0.01)
        closing.cancel()
    await database.close()
    assert ended == ["statement"]
    await asyncio.wait([running, closing])
    await until_threads_ended(before)


@pytest.mark.timed
async def test_a_connection_that_is_terminated_twice_ends_once(tmp_path: Path) -> None:
    factory = sqlite.SqliteFactory(tmp_path / "ledger.sqlite")
    for _ in range(2):
        connection = await factory.connect()
        connection.terminate()
        connection.terminate()
        with suppress(LedgerError):
            await connection.close()
    started = time.monotonic()
    await factory.wait_terminated()
    assert time.monotonic() - started < 1
