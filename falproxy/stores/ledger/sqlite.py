"""The ledger in a file, which all workers of a machine share."""

import asyncio
import logging
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path

import aiosqlite

from falproxy.stores.ledger import InvalidRowError, LedgerError
from falproxy.stores.ledger.database import LedgerDatabase
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.sql_ledger import SqlLedger

BUSY_TIMEOUT = 2.0  # that another worker may hold the file
START_RETRY_INTERVAL = 0.02
PRIMARY_CODE_MASK = 0xFF  # the bits of SQLite's error codes that say what kind it is
NOW = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
PLACEHOLDER = re.compile(r"\$(\d+)")
VALUES_PLACEHOLDERS = re.compile(r"(?<=VALUES )\([?, ]+\)")
ROWS_PER_STATEMENT = 50  # rows of one statement, which may have so many values in all SQLites
NATURAL_ORDER = tuple(range(100))
OPEN_SCRIPT = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
"""

ClosingFutures = set["asyncio.Future[object]"]


class SqliteConnection:
    """A `Wire` to a file."""

    begin_statement = "BEGIN IMMEDIATE"
    begin_exclusive: tuple[str, ...] = (begin_statement,)
    schema_exists_query = "SELECT 1 FROM sqlite_master WHERE name = 'falproxy_ledger'"
    privacy_statements: tuple[str, ...] = ()  # the file's mode does

    def __init__(self, file: aiosqlite.Connection, closing: ClosingFutures) -> None:
        self._file = file
        self._closing = closing

    async def fetch(self, statement: str, row: Row = ()) -> list[Row]:
        words, order = to_sqlite(statement)
        with map_errors():
            return list(await self._file.execute_fetchall(words, reorder(order, row)))

    async def execute_many(self, statement: str, rows: Sequence[Row]) -> None:
        """Many rows by one statement: after each statement the event loop and the file's thread
        ask each other for the interpreter, which takes longer than to write a row."""
        words, order = to_sqlite(statement)
        rows = [reorder(order, row) for row in rows]
        written = 0
        with map_errors():
            if len(rows) >= ROWS_PER_STATEMENT and (many := multi_row_insert(words)) is not None:
                written = len(rows) - len(rows) % ROWS_PER_STATEMENT
                groups = (
                    rows[at : at + ROWS_PER_STATEMENT]
                    for at in range(0, written, ROWS_PER_STATEMENT)
                )
                cursor = await self._file.executemany(many, map(flatten_rows, groups))
                await cursor.close()
            cursor = await self._file.executemany(words, rows[written:])
            await cursor.close()

    async def close(self) -> None:
        with map_errors():
            await self._file.close()

    def terminate(self) -> None:
        # Its thread has still to end what it does.
        if (ending := self._file.stop()) is not None:
            self._closing.add(ending)
            ending.add_done_callback(self._on_closed)

    def _on_closed(self, future: "asyncio.Future[object]") -> None:
        self._closing.discard(future)
        future.exception()  # of a file that is broken; whoever used it has heard


class SqliteFactory:
    """The `Opener` of a file."""

    def __init__(self, file: Path) -> None:
        self.display_name = str(file)
        self._file = file
        self._closing: ClosingFutures = set()

    async def connect(self) -> SqliteConnection:
        with map_errors():
            await asyncio.to_thread(create_file, self._file)
            file = await aiosqlite.connect(self._file, timeout=BUSY_TIMEOUT, isolation_level=None)
            wire = SqliteConnection(file, self._closing)
            try:
                await run_open_script(file)
            except BaseException:
                wire.terminate()
                raise
            return wire

    async def wait_terminated(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing, timeout=BUSY_TIMEOUT + 1)


def sqlite_ledger(file: Path) -> SqlLedger:
    # It would log every row that is written: names of people, and where their pictures are.
    logging.getLogger("aiosqlite").setLevel(logging.INFO)
    return SqlLedger(LedgerDatabase(SqliteFactory(file)))


async def run_open_script(file: aiosqlite.Connection) -> None:
    """Of several processes that are the first, SQLite has one start and tells the others at once
    that the file is locked, however long they would wait."""
    while True:
        try:
            await file.executescript(OPEN_SCRIPT)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & PRIMARY_CODE_MASK != sqlite3.SQLITE_BUSY:
                raise
            await asyncio.sleep(START_RETRY_INTERVAL)
        else:
            return


def create_file(file: Path) -> None:
    """Only its owner can read it, nor what SQLite puts beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)


@cache
def to_sqlite(statement: str) -> tuple[str, tuple[int, ...]]:
    """The statement with holes that have no numbers, which Python 3.12 warns of, and the number
    of each."""
    order = tuple(int(number) - 1 for number in PLACEHOLDER.findall(statement))
    return re.sub(r"\bNOW\b", NOW, PLACEHOLDER.sub("?", statement)), order


@cache
def multi_row_insert(statement: str) -> str | None:
    """A statement that inserts so many rows at once. None: it does more than that."""
    holes = VALUES_PLACEHOLDERS.search(statement)
    if holes is None:
        return None
    return (
        statement[: holes.start()]
        + ", ".join([holes[0]] * ROWS_PER_STATEMENT)
        + statement[holes.end() :]
    )


def flatten_rows(rows: Sequence[Row]) -> Row:
    return [*chain.from_iterable(rows)]


def reorder(order: tuple[int, ...], row: Row) -> Row:
    return row if order == NATURAL_ORDER[: len(row)] else [row[number] for number in order]


@contextmanager
def map_errors() -> Iterator[None]:
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError) as error:
        raise InvalidRowError(f"a row does not fit: {error}") from error
    # ValueError: aiosqlite's for a connection that is closed.
    except (sqlite3.Error, OSError, ValueError) as error:
        raise LedgerError(str(error)) from error
