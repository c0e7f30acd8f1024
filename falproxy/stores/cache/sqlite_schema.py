"""The file of the embedded store: its tables, its thread, what is done when it is broken."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar
from uuid import uuid4

from falproxy.stores.cache import GRACE_PERIOD, StoreError
from falproxy.stores.sqlite_open import run_schema

logger = logging.getLogger(__name__)

Params = ParamSpec("Params")
ReturnT = TypeVar("ReturnT")

BUSY_TIMEOUT = 1.0  # that another worker may hold the file
SWEEP_BATCH_SIZE = 20
CHANGE_LOG_SIZE = 1000
CORRUPTION_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

# The body comes last, so that reading what is before it does not read its pages.
SCHEMA = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS results (
        key TEXT PRIMARY KEY, content_type TEXT NOT NULL, stored_at REAL NOT NULL,
        expires_at REAL NOT NULL, used_at REAL NOT NULL, size INTEGER NOT NULL, body BLOB NOT NULL
    );
    CREATE INDEX IF NOT EXISTS results_by_expiry ON results (expires_at);
    CREATE INDEX IF NOT EXISTS results_by_use ON results (used_at);
    CREATE TABLE IF NOT EXISTS total (one INTEGER PRIMARY KEY CHECK (one = 1), size INTEGER);
    INSERT OR IGNORE INTO total VALUES (1, 0);
    CREATE TRIGGER IF NOT EXISTS result_added AFTER INSERT ON results
        BEGIN UPDATE total SET size = size + new.size; END;
    CREATE TRIGGER IF NOT EXISTS result_removed AFTER DELETE ON results
        BEGIN UPDATE total SET size = size - old.size; END;
    CREATE TABLE IF NOT EXISTS flights (
        key TEXT PRIMARY KEY, token TEXT NOT NULL, is_run INTEGER NOT NULL,
        leads_until REAL NOT NULL, kept_until REAL NOT NULL,
        job_id TEXT, job_app TEXT, job_key_mark TEXT
    );
    CREATE INDEX IF NOT EXISTS flights_by_expiry ON flights (kept_until);
    CREATE TABLE IF NOT EXISTS holders (
        key TEXT NOT NULL, holder TEXT NOT NULL, PRIMARY KEY (key, holder)
    ) WITHOUT ROWID;
    CREATE TRIGGER IF NOT EXISTS flight_ended AFTER DELETE ON flights
        BEGIN DELETE FROM holders WHERE key = old.key; END;
    CREATE TRIGGER IF NOT EXISTS job_changed AFTER UPDATE OF job_id ON flights
        WHEN old.job_id IS NOT new.job_id
        BEGIN DELETE FROM holders WHERE key = old.key; END;
    CREATE TABLE IF NOT EXISTS claims (
        request_id TEXT PRIMARY KEY, kept_until REAL NOT NULL, key TEXT NOT NULL,
        owner TEXT NOT NULL, app TEXT NOT NULL, is_cancelled INTEGER NOT NULL,
        job_id TEXT, job_app TEXT, job_key_mark TEXT,
        failure_status INTEGER, failure_type TEXT, failure_body BLOB
    );
    CREATE INDEX IF NOT EXISTS claims_by_expiry ON claims (kept_until);
    CREATE TABLE IF NOT EXISTS changes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, teller TEXT NOT NULL
    );
"""
# What is past its time, table by table: the column that says so, and seconds that are added to it.
EXPIRY_COLUMNS = (
    ("results", "expires_at", GRACE_PERIOD),
    ("flights", "kept_until", 0),
    ("claims", "kept_until", 0),
)


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's error number without its details; 0 where the error is not SQLite's own."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


class CacheDatabase:
    """An SQLite file, opened when it is first asked, and again after it could not be used."""

    def __init__(self, file: Path, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._executor = ThreadPoolExecutor(1, "cache")
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self.open_count = 0  # how often; what was known of an earlier opening is void

    def run(
        self,
        work: Callable[Concatenate[sqlite3.Connection, Params], ReturnT],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> "asyncio.Future[ReturnT]":
        """What `work` returns, done in the file's own thread after what was asked before."""

        def attempt() -> ReturnT:
            try:
                return self._run_with_recovery(lambda connection: work(connection, *args, **kwargs))
            except (sqlite3.Error, OSError, ValueError) as error:
                raise StoreError(f"{self._file} cannot be used: {error}") from error

        return asyncio.get_running_loop().run_in_executor(self._executor, attempt)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown()

    @contextmanager
    def write_transaction(self, connection: sqlite3.Connection) -> Iterator[float]:
        """One transaction, which has the only right to write from its start. Its time."""
        with connection:  # commits, or rolls back
            connection.execute("BEGIN IMMEDIATE")
            now = self._clock()
            for table, column, kept in EXPIRY_COLUMNS:
                connection.execute(
                    f"DELETE FROM {table} WHERE rowid IN "
                    f"(SELECT rowid FROM {table} WHERE {column} <= ? LIMIT {SWEEP_BATCH_SIZE})",
                    (now - kept,),
                )
            yield now

    def _run_with_recovery(self, work: Callable[[sqlite3.Connection], ReturnT]) -> ReturnT:
        try:
            return work(self._connect())
        except sqlite3.DatabaseError as error:
            if primary_code(error) != sqlite3.SQLITE_BUSY:
                self._close()
            if primary_code(error) not in CORRUPTION_CODES:
                raise
        self._move_corrupt_file()
        return work(self._connect())

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._file, timeout=BUSY_TIMEOUT, isolation_level=None)
            try:
                self._file.chmod(0o600)  # it holds what people asked for; -wal and -shm do alike
                self._inode = self._file.stat().st_ino
                run_schema(connection, SCHEMA, BUSY_TIMEOUT)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            self.open_count += 1
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):  # of a file that is broken or gone
                self._connection.close()
            self._connection = None

    def _move_corrupt_file(self) -> None:
        """Makes room for a new file, unless another process did so already."""
        if not self._file.exists() or self._file.stat().st_ino != self._inode:
            return
        aside = self._file.with_name(f"{self._file.name}.broken")
        logger.warning("%s is broken: moved to %s, results are forgotten", self._file, aside.name)
        for ending in ("-wal", "-shm"):
            self._file.with_name(self._file.name + ending).unlink(missing_ok=True)
        self._file.replace(aside)


class ChangeLog:
    """What the processes tell each other through the file: under which keys a flight changed."""

    def __init__(self, database: CacheDatabase) -> None:
        self._database = database
        self._store_id = uuid4().hex  # of this store, which knows its own changes
        self._position = (0, 0, 0)  # opening of the file, SQLite's data_version, last change

    def append(self, connection: sqlite3.Connection, key: str) -> None:
        """Says it, as a part of the transaction that changes the flight."""
        row = (key, self._store_id)
        added = connection.execute("INSERT INTO changes (key, teller) VALUES (?, ?)", row)
        oldest = (added.lastrowid or 0) - CHANGE_LOG_SIZE
        connection.execute("DELETE FROM changes WHERE id <= ?", (oldest,))

    def read_new(self, connection: sqlite3.Connection) -> set[str] | None:
        """Keys that others told of since the last look; None: it cannot be known."""
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        opened, seen_version, seen = self._position
        is_known = opened == self._database.open_count
        if is_known and version == seen_version:
            return set()
        (newest,) = connection.execute("SELECT coalesce(max(id), 0) FROM changes").fetchone()
        self._position = (self._database.open_count, version, newest)
        if not is_known or newest - seen > CHANGE_LOG_SIZE:
            return None
        others = "SELECT key FROM changes WHERE id > ? AND teller != ?"
        return {key for (key,) in connection.execute(others, (seen, self._store_id))}
