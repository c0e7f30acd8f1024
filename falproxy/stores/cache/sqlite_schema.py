"""The file of the SQLite store: its tables, its thread, and the replacement of an unusable file."""

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
from falproxy.stores.file_schema import FileSchema, IncompatibleFileError, prepare_file
from falproxy.stores.sqlite_open import connect_file, error_reason, primary_code

logger = logging.getLogger(__name__)

Params = ParamSpec("Params")
ReturnT = TypeVar("ReturnT")

BUSY_TIMEOUT = 1.0  # seconds to wait for a lock of another worker
SWEEP_BATCH_SIZE = 20  # expired rows of each table that one transaction deletes
CHANGE_LOG_SIZE = 1000
CORRUPTION_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

# The body is the last column, so that SQLite reads its pages only when the body is selected.
# Workers of several versions share the file, so the names of tables and columns do not change:
# flights: shared calls; claims: virtual requests; key_mark: fingerprint of a fal key;
# teller: id of the store that made the change; claim_headers: headers of the failures in claims.
PRAGMAS = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
"""
TABLES_SCRIPT = """
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
    CREATE TABLE IF NOT EXISTS claim_headers (
        request_id TEXT PRIMARY KEY, headers TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TRIGGER IF NOT EXISTS claim_deleted AFTER DELETE ON claims
        BEGIN DELETE FROM claim_headers WHERE request_id = old.request_id; END;
    CREATE TABLE IF NOT EXISTS outcomes (
        token TEXT PRIMARY KEY, key TEXT NOT NULL, ended_at REAL NOT NULL, kept_until REAL NOT NULL,
        content BLOB NOT NULL
    );
    CREATE INDEX IF NOT EXISTS outcomes_by_expiry ON outcomes (kept_until);
    CREATE INDEX IF NOT EXISTS outcomes_by_key ON outcomes (key);
    CREATE TABLE IF NOT EXISTS changes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, teller TEXT NOT NULL
    );
"""
SCHEMA = FileSchema(PRAGMAS, (TABLES_SCRIPT,))
# Table, column with the time of expiry, seconds from then until the deletion.
EXPIRY_COLUMNS = (
    ("results", "expires_at", GRACE_PERIOD),
    ("flights", "kept_until", 0),
    ("claims", "kept_until", 0),
    ("outcomes", "kept_until", 0),
)


class CacheDatabase:
    """An SQLite file, opened by the first operation, and again by the next one after an error."""

    def __init__(self, file: Path, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._executor = ThreadPoolExecutor(1, "cache")
        self._has_thread = False  # the first operation starts it
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self.open_count = 0

    def run(
        self,
        work: Callable[Concatenate[sqlite3.Connection, Params], ReturnT],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> "asyncio.Future[ReturnT]":
        """Return the result of `work`, which runs in the file's thread after earlier work.

        Raises: StoreError.
        """

        def attempt() -> ReturnT:
            try:
                return self._run_with_recovery(lambda connection: work(connection, *args, **kwargs))
            except (sqlite3.Error, OSError, ValueError) as error:
                raise StoreError(
                    f"{self._file.name} in FALPROXY_DATA_DIR cannot be used: {error_reason(error)}"
                ) from error

        self._has_thread = True
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self._executor, attempt)
        except RuntimeError as error:  # of an executor that has been shut down
            raise StoreError(f"{self._file.name} in FALPROXY_DATA_DIR is closed") from error

    async def close(self) -> None:
        if self._has_thread:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown(wait=False)

    def __repr__(self) -> str:
        return f"<CacheDatabase {self._file}, opened {self.open_count} times>"

    @contextmanager
    def write_transaction(self, connection: sqlite3.Connection) -> Iterator[float]:
        """Context: a transaction that holds the write lock from its start. Yield its time."""
        with connection:  # commits, or rolls back
            connection.execute("BEGIN IMMEDIATE")
            now = self._clock()
            for table, column, grace_period in EXPIRY_COLUMNS:
                connection.execute(
                    f"DELETE FROM {table} WHERE rowid IN "
                    f"(SELECT rowid FROM {table} WHERE {column} <= ? LIMIT {SWEEP_BATCH_SIZE})",
                    (now - grace_period,),
                )
            yield now

    def _run_with_recovery(self, work: Callable[[sqlite3.Connection], ReturnT]) -> ReturnT:
        try:
            return work(self._connect())
        except IncompatibleFileError:
            self._replace_file("is of another version of falproxy", "old")
        except sqlite3.DatabaseError as error:
            if primary_code(error) != sqlite3.SQLITE_BUSY:
                self._close()
            if primary_code(error) not in CORRUPTION_CODES:
                raise
            self._replace_file("is corrupt", "broken")
        return work(self._connect())

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = connect_file(self._file, BUSY_TIMEOUT)
            try:
                # Before the schema, which may find the file corrupt.
                self._inode = self._file.stat().st_ino
                prepare_file(connection, SCHEMA, BUSY_TIMEOUT)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            self.open_count += 1
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):  # the file may be corrupt or deleted
                self._connection.close()
            self._connection = None

    def _replace_file(self, reason: str, suffix: str) -> None:
        """Rename the file, so that a new one is created, unless another process did so already."""
        if not self._file.exists() or self._file.stat().st_ino != self._inode:
            return
        renamed = self._file.with_name(f"{self._file.name}.{suffix}")
        logger.warning(
            "%s %s: renamed to %s, results are lost", self._file.name, reason, renamed.name
        )
        for extra in ("-wal", "-shm"):
            self._file.with_name(self._file.name + extra).unlink(missing_ok=True)
        self._file.replace(renamed)


class ChangeLog:
    """Table of the keys whose shared call changed, by which the processes notify each other."""

    def __init__(self, database: CacheDatabase) -> None:
        self._database = database
        self._store_id = uuid4().hex  # to skip this store's own changes
        self._position = (0, 0, 0)  # open_count, SQLite's data_version, id of the last change read

    def append(self, connection: sqlite3.Connection, key: str) -> None:
        """Add a key, in the transaction that changes its shared call."""
        row = (key, self._store_id)
        added = connection.execute("INSERT INTO changes (key, teller) VALUES (?, ?)", row)
        oldest = (added.lastrowid or 0) - CHANGE_LOG_SIZE
        connection.execute("DELETE FROM changes WHERE id <= ?", (oldest,))

    def read_new(self, connection: sqlite3.Connection) -> set[str] | None:
        """Return the keys that other stores added since the previous read; None if unknown, because
        the file was reopened or has dropped some of them."""
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        last_open, last_version, last_id = self._position
        is_same_file = last_open == self._database.open_count
        if is_same_file and version == last_version:
            return set()
        (newest,) = connection.execute("SELECT coalesce(max(id), 0) FROM changes").fetchone()
        self._position = (self._database.open_count, version, newest)
        if not is_same_file or newest - last_id > CHANGE_LOG_SIZE:
            return None
        query = "SELECT key FROM changes WHERE id > ? AND teller != ?"
        return {key for (key,) in connection.execute(query, (last_id, self._store_id))}
