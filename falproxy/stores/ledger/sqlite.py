"""The ledger in an SQLite file, which all workers of a machine share."""

import asyncio
import logging
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import aiosqlite

from falproxy.stores.ledger import InvalidRowError, LedgerError
from falproxy.stores.ledger.database import LedgerDatabase, terminate_opened
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.schema import Schema, SqlDialect
from falproxy.stores.ledger.sql_ledger import SqlLedger
from falproxy.stores.ledger.statements import LEDGER_SCHEMA
from falproxy.stores.sqlite_open import connect_file, error_reason, is_busy

BUSY_TIMEOUT = 1.0  # seconds to wait for locks of other processes
OPEN_RETRY_INTERVAL = 0.02  # seconds
# Seconds between checks whether the threads of terminated connections have ended, and how many
# there are: a pause of the process, such as of a virtual machine, uses up one check only.
TERMINATED_INTERVAL, TERMINATED_CHECKS = 0.1, 100
NOW = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
PLACEHOLDER = re.compile(r"\$(\d+)")
VALUES_PLACEHOLDERS = re.compile(r"(?<=VALUES )\([?, ]+\)")
ITER_CHUNK_SIZE = 64  # aiosqlite's default
# Rows of one INSERT. Their values stay below the parameter limit of every SQLite build.
ROWS_PER_STATEMENT = 50
NATURAL_ORDER = tuple(range(100))
OPEN_SCRIPT = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
"""

ClosingFutures = set["asyncio.Future[Any]"]


class SqliteConnection:
    dialect: SqlDialect = "sqlite"
    begin_statement = "BEGIN IMMEDIATE"
    begin_read: tuple[str, ...] = ("BEGIN",)
    begin_exclusive: tuple[str, ...] = (begin_statement,)
    lock_sums_query = "SELECT 1"  # BEGIN IMMEDIATE excludes others
    table_exists_query = "SELECT 1 FROM sqlite_master WHERE name = $1"
    privacy_statement: str | None = None  # the file mode restricts access

    def __init__(
        self, file: aiosqlite.Connection, opened: sqlite3.Connection, closing: ClosingFutures
    ) -> None:
        self.file = file
        self._opened = opened
        self._closing = closing
        self._end: asyncio.Future[Any] | None = None  # of its thread, after `close` or `terminate`

    async def fetch(self, statement: str, row: Row = ()) -> list[Row]:
        sql, order = to_sqlite(statement)
        with map_errors():
            return list(await self.file.execute_fetchall(sql, reorder(order, row)))

    async def execute_many(self, statement: str, rows: Sequence[Row]) -> None:
        """Execute a statement with each row. Inserts are combined into statements of many rows:
        the thread of the connection and the event loop exchange the GIL after each statement,
        which takes longer than the write of a row."""
        sql, order = to_sqlite(statement)
        rows = [reorder(order, row) for row in rows]
        written = 0
        with map_errors():
            if len(rows) >= ROWS_PER_STATEMENT and (multi_row_sql := multi_row_insert(sql)):
                written = len(rows) - len(rows) % ROWS_PER_STATEMENT
                groups = (
                    rows[at : at + ROWS_PER_STATEMENT]
                    for at in range(0, written, ROWS_PER_STATEMENT)
                )
                cursor = await self.file.executemany(multi_row_sql, map(flatten_rows, groups))
                await cursor.close()
            cursor = await self.file.executemany(sql, rows[written:])
            await cursor.close()

    async def close(self) -> None:
        """Close the connection. If the caller is cancelled, it is closed nevertheless."""
        end = self._end or asyncio.ensure_future(self.file.close())
        self._end_with(end)
        with map_errors():
            await asyncio.shield(end)

    def terminate(self) -> None:
        """Interrupt the statement in progress, and close the connection."""
        if self._end is not None:  # its thread would not respond to a second end
            return
        with suppress(sqlite3.Error):
            self._opened.interrupt()
        if (end := self.file.stop()) is not None:
            self._end_with(end)

    def _end_with(self, end: "asyncio.Future[Any]") -> None:
        self._end = end
        self._closing.add(end)
        end.add_done_callback(self._on_closed)

    def _on_closed(self, future: "asyncio.Future[Any]") -> None:
        self._closing.discard(future)
        if not future.cancelled():
            future.exception()  # retrieved so that asyncio does not log it; callers had an error


class SqliteFactory:
    def __init__(self, file: Path) -> None:
        self.display_name = f"{file.name} in FALPROXY_DATA_DIR"
        self._file = file
        self._closing: ClosingFutures = set()

    async def connect(self) -> SqliteConnection:
        failures: list[OSError | sqlite3.Error] = []

        def open_file() -> sqlite3.Connection:
            """Runs in the thread of the connection. After an exception here, aiosqlite would end
            the thread later than `wait_terminated` waits for it."""
            try:
                return connect_file(self._file, BUSY_TIMEOUT)
            except (OSError, sqlite3.Error) as error:
                failures.append(error)
                return sqlite3.connect(":memory:")

        with map_errors():
            connection = await self._start(open_file)
            file = connection.file
            try:
                await run_open_script(file, failures)
            except OSError as error:
                connection.terminate()
                reason = error_reason(error)
                raise LedgerError(f"{self.display_name} cannot be used: {reason}") from error
            except BaseException:
                connection.terminate()
                raise
            return connection

    async def _start(self, open_file: Callable[[], sqlite3.Connection]) -> "SqliteConnection":
        """Open a connection. It is terminated later if the caller is cancelled meanwhile: aiosqlite
        would end its thread at a time that `wait_terminated` does not know."""

        async def start() -> SqliteConnection:
            opened: list[sqlite3.Connection] = []

            def open_and_keep() -> sqlite3.Connection:
                opened.append(open_file())
                return opened[0]

            file = await aiosqlite.Connection(open_and_keep, ITER_CHUNK_SIZE)
            return SqliteConnection(file, opened[0], self._closing)

        def discard(ended: asyncio.Future[SqliteConnection]) -> None:
            self._closing.discard(ended)
            terminate_opened(ended)

        starting = asyncio.ensure_future(start())
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._closing.add(starting)
            starting.add_done_callback(discard)
            raise

    async def wait_terminated(self) -> None:
        for _ in range(TERMINATED_CHECKS):
            if not self._closing:
                return
            await asyncio.wait(self._closing, timeout=TERMINATED_INTERVAL)
            await asyncio.sleep(0)  # a connection that was being opened is terminated now


def sqlite_ledger(file: Path) -> SqlLedger:
    return SqlLedger(sqlite_database(file))


def sqlite_database(file: Path, schema: Schema = LEDGER_SCHEMA) -> LedgerDatabase:
    # Its debug log has the values of every row: names of users and URLs of their images.
    logger = logging.getLogger("aiosqlite")
    if logger.level != logging.INFO:
        logger.setLevel(logging.INFO)
    return LedgerDatabase(SqliteFactory(file), schema)


async def run_open_script(
    file: aiosqlite.Connection, failures: Sequence[OSError | sqlite3.Error]
) -> None:
    """Switch the file to WAL. If several processes open a new file at once, SQLite lets one do so
    and fails the others immediately, without regard to the connection's timeout.

    failures: of opening the file; the first one is raised.

    The event loop's counterpart of `file_schema.prepare_file`: the caller's timeout cancels it.
    """
    for failure in failures:
        raise failure
    while True:
        try:
            await file.executescript(OPEN_SCRIPT)
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            await asyncio.sleep(OPEN_RETRY_INTERVAL)
        else:
            return


@cache
def to_sqlite(statement: str) -> tuple[str, tuple[int, ...]]:
    """Return the statement with `?` for each `$n`, and the index of the value for each. sqlite3
    deprecates numbered placeholders with sequences since Python 3.12."""
    order = tuple(int(number) - 1 for number in PLACEHOLDER.findall(statement))
    return re.sub(r"\bNOW\b", NOW, PLACEHOLDER.sub("?", statement)), order


@cache
def multi_row_insert(statement: str) -> str | None:
    """Return the statement for ROWS_PER_STATEMENT rows; None if its VALUES are no placeholders."""
    match = VALUES_PLACEHOLDERS.search(statement)
    if match is None:
        return None
    values = ", ".join([match[0]] * ROWS_PER_STATEMENT)
    return statement[: match.start()] + values + statement[match.end() :]


def flatten_rows(rows: Sequence[Row]) -> Row:
    return [*chain.from_iterable(rows)]


def reorder(order: tuple[int, ...], row: Row) -> Row:
    return row if order == NATURAL_ORDER[: len(row)] else [row[index] for index in order]


@contextmanager
def map_errors() -> Iterator[None]:
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError) as error:
        raise InvalidRowError(f"a row does not fit: {error}") from error
    # aiosqlite raises ValueError if the connection is closed.
    except (sqlite3.Error, OSError, ValueError) as error:
        raise LedgerError(error_reason(error)) from error
