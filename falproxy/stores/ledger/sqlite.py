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

from falproxy.stores.ledger import LedgerError, UnfitError
from falproxy.stores.ledger.database import Database
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.sql_ledger import SqlLedger

BUSY_SECONDS = 2.0  # that another worker may hold the file
START_EVERY = 0.02
PRIMARY = 0xFF  # the bits of SQLite's error codes that say what kind it is
NOW = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
HOLE = re.compile(r"\$(\d+)")
HOLES = re.compile(r"(?<=VALUES )\([?, ]+\)")
TOGETHER = 50  # rows of one statement, which may have so many values in all SQLites
IN_ORDER = tuple(range(100))
START = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
"""

Ending = set["asyncio.Future[object]"]


class SqliteWire:
    """A `Wire` to a file."""

    begins = "BEGIN IMMEDIATE"
    begins_alone: tuple[str, ...] = (begins,)
    has_version = "SELECT 1 FROM sqlite_master WHERE name = 'falproxy_ledger'"
    keeps_private: tuple[str, ...] = ()  # the file's mode does

    def __init__(self, file: aiosqlite.Connection, ending: Ending) -> None:
        self._file = file
        self._ending = ending

    async def fetch(self, statement: str, row: Row = ()) -> list[Row]:
        words, order = spoken(statement)
        with translated():
            return list(await self._file.execute_fetchall(words, ordered(order, row)))

    async def many(self, statement: str, rows: Sequence[Row]) -> None:
        """Many rows by one statement: after each statement the event loop and the file's thread
        ask each other for the interpreter, which takes longer than to write a row."""
        words, order = spoken(statement)
        rows = [ordered(order, row) for row in rows]
        written = 0
        with translated():
            if len(rows) >= TOGETHER and (many := repeated(words)) is not None:
                written = len(rows) - len(rows) % TOGETHER
                groups = (rows[at : at + TOGETHER] for at in range(0, written, TOGETHER))
                cursor = await self._file.executemany(many, map(chained, groups))
                await cursor.close()
            cursor = await self._file.executemany(words, rows[written:])
            await cursor.close()

    async def close(self) -> None:
        with translated():
            await self._file.close()

    def drop(self) -> None:
        # Its thread has still to end what it does.
        if (ending := self._file.stop()) is not None:
            self._ending.add(ending)
            ending.add_done_callback(self._end)

    def _end(self, ending: "asyncio.Future[object]") -> None:
        self._ending.discard(ending)
        ending.exception()  # of a file that is broken; whoever used it has heard


class SqliteFile:
    """The `Opener` of a file."""

    def __init__(self, file: Path) -> None:
        self.where = str(file)
        self._file = file
        self._ending: Ending = set()

    async def open(self) -> SqliteWire:
        with translated():
            await asyncio.to_thread(prepare, self._file)
            file = await aiosqlite.connect(self._file, timeout=BUSY_SECONDS, isolation_level=None)
            wire = SqliteWire(file, self._ending)
            try:
                await start(file)
            except BaseException:
                wire.drop()
                raise
            return wire

    async def ended(self) -> None:
        if self._ending:
            await asyncio.wait(self._ending, timeout=BUSY_SECONDS + 1)


def sqlite_ledger(file: Path) -> SqlLedger:
    # It would log every row that is written: names of people, and where their pictures are.
    logging.getLogger("aiosqlite").setLevel(logging.INFO)
    return SqlLedger(Database(SqliteFile(file)))


async def start(file: aiosqlite.Connection) -> None:
    """Of several processes that are the first, SQLite has one start and tells the others at once
    that the file is locked, however long they would wait."""
    while True:
        try:
            await file.executescript(START)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & PRIMARY != sqlite3.SQLITE_BUSY:
                raise
            await asyncio.sleep(START_EVERY)
        else:
            return


def prepare(file: Path) -> None:
    """Only its owner can read it, nor what SQLite puts beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)


@cache
def spoken(statement: str) -> tuple[str, tuple[int, ...]]:
    """The statement with holes that have no numbers, which Python 3.12 warns of, and the number
    of each."""
    order = tuple(int(number) - 1 for number in HOLE.findall(statement))
    return re.sub(r"\bNOW\b", NOW, HOLE.sub("?", statement)), order


@cache
def repeated(words: str) -> str | None:
    """A statement that inserts so many rows at once. None: it does more than that."""
    holes = HOLES.search(words)
    if holes is None:
        return None
    return words[: holes.start()] + ", ".join([holes[0]] * TOGETHER) + words[holes.end() :]


def chained(rows: Sequence[Row]) -> Row:
    return [*chain.from_iterable(rows)]


def ordered(order: tuple[int, ...], row: Row) -> Row:
    return row if order == IN_ORDER[: len(row)] else [row[number] for number in order]


@contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError) as error:
        raise UnfitError(f"a row does not fit: {error}") from error
    # ValueError: aiosqlite's for a connection that is closed.
    except (sqlite3.Error, OSError, ValueError) as error:
        raise LedgerError(str(error)) from error
