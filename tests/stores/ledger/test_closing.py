"""The end of a ledger while operations are in progress: no connection stays open."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from falproxy.stores.ledger import LedgerError
from falproxy.stores.ledger.database import LedgerDatabase
from falproxy.stores.ledger.sqlite import sqlite_database

SHORT, LONG = 200_000, 20_000_000  # rows to count
COUNT = """
    WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {})
    SELECT COUNT(*) FROM numbers
"""


async def read(database: LedgerDatabase, rows: int) -> None:
    await database.read(COUNT.format(rows))


async def write(database: LedgerDatabase, rows: int) -> None:
    await database.execute(COUNT.format(rows))


async def until_threads_ended(before: set[threading.Thread]) -> None:
    async with asyncio.timeout(30):  # a thread ends just after it has reported
        while set(threading.enumerate()) - before:
            await asyncio.sleep(0.01)


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


async def test_a_long_operation_ends_with_its_statement(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    database = sqlite_database(tmp_path / "ledger.sqlite")
    running = asyncio.ensure_future(read(database, LONG))
    await asyncio.sleep(0.3)
    await database.close()
    await until_threads_ended(before)
    with suppress(LedgerError):
        await running


async def test_a_ledger_is_usable_after_its_end(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    database = sqlite_database(tmp_path / "ledger.sqlite")
    for _ in range(2):
        await read(database, 1)
        await write(database, 1)
        await database.close()
    await until_threads_ended(before)
