"""Request owners in an SQLite file that all workers of a machine share.

They have a file of their own, apart from the results. Results can be generated again for money, so
a corrupt file of results is replaced by an empty one; a lost owner locks a client out of a paid
request. Owners are also needed when the result cache is off. And a submit, which waits until its
owner is written, does not queue behind reads and writes of large results.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from falproxy.circuit_breaker import CircuitBreaker
from falproxy.state_log import StateLog
from falproxy.stores.cache import OWNER_RETENTION, RequestOwner, StoreError
from falproxy.stores.file_schema import FileSchema, open_database
from falproxy.stores.sqlite_open import error_reason, primary_code

logger = logging.getLogger(__name__)

Args = TypeVarTuple("Args")
ReturnT = TypeVar("ReturnT")

OWNERS_FILE = "submissions.sqlite"
BUSY_TIMEOUT = 0.5  # seconds to wait for a lock of another worker
SWEEP_INTERVAL = 60.0  # seconds between deletions of expired owners
SWEEP_BATCH_SIZE = 1000  # of one deletion, during which submits wait
RETRY_INTERVAL = 1.0  # seconds without any access to a file that could not be opened
# The file can still be read after these errors of a write.
WRITE_ERRORS = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)
PRAGMAS = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
"""
TABLES_SCRIPT = """
    CREATE TABLE IF NOT EXISTS submissions (
        request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, key_mark TEXT NOT NULL,
        submitted_at REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS submissions_by_age ON submissions (submitted_at);
"""
INSERT_OWNER = """
    INSERT INTO submissions (request_id, owner, key_mark, submitted_at) VALUES (?, ?, ?, ?)
    ON CONFLICT (request_id) DO UPDATE SET owner = excluded.owner, key_mark = excluded.key_mark,
        submitted_at = excluded.submitted_at
    WHERE submitted_at < ?
"""
SELECT_OWNER = """
    SELECT owner, key_mark FROM submissions WHERE request_id = ? AND submitted_at >= ?
"""
DELETE_EXPIRED = f"""
    DELETE FROM submissions WHERE request_id IN (
        SELECT request_id FROM submissions WHERE submitted_at < ? LIMIT {SWEEP_BATCH_SIZE}
    )
"""


def convert_owners(connection: sqlite3.Connection) -> None:
    """Rename the column that releases before the versions had for the owner."""
    columns = {row[1] for row in connection.execute("PRAGMA table_info(submissions)")}
    if "principal" in columns and "owner" not in columns:
        connection.execute("ALTER TABLE submissions RENAME COLUMN principal TO owner")


SCHEMA = FileSchema(PRAGMAS, (TABLES_SCRIPT,), convert=convert_owners)


class SqliteOwnerStore:
    """An `OwnerStore` in a file, opened by the first operation, and again by the next one after an
    error. A file that cannot be used is logged; one that cannot be opened is tried again after
    RETRY_INTERVAL.

    clock: seconds since 1970.
    retention: seconds for which an owner is stored.
    """

    def __init__(
        self,
        file: Path,
        clock: Callable[[], float] = time.time,
        *,
        retention: float = OWNER_RETENTION,
    ) -> None:
        self._file = file
        self._clock = clock
        self._retention = retention
        self._sweep_at = float("-inf")  # by the clock
        self._executor = ThreadPoolExecutor(1, "owners")
        self._connection: sqlite3.Connection | None = None
        self._breaker = CircuitBreaker(RETRY_INTERVAL, clock)
        self._state_log = StateLog(logger)
        self._is_failing = False  # since the last successful write
        self._busy_count = 0  # operations that found the file locked

    def __repr__(self) -> str:
        return f"<SqliteOwnerStore {self._file}, {self._breaker!r}>"

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown(wait=False)

    async def put_owner(self, request_id: str, request_owner: RequestOwner) -> None:
        await self._run(self._insert, request_id, request_owner)
        self._is_failing = False

    async def get_owner(self, request_id: str) -> RequestOwner | None:
        return await self._run(self._select, request_id)

    async def check_owners_writable(self) -> None:
        await self._run(self._write_probe)
        self._is_failing = False

    async def delete_before(self, before: float, *, delete: bool = True) -> int:
        """Return the number of owners that were stored before a time, in seconds since 1970.

        delete: delete them; otherwise they are only counted.
        """
        return await self._run(lambda: self._delete_expired(before, delete=delete))

    async def _run(self, work: Callable[[*Args], ReturnT], *args: *Args) -> ReturnT:
        if not self._breaker.allow_request():
            raise StoreError(f"{self._file.name} is not used for now")
        busy_count = self._busy_count

        def attempt() -> ReturnT:
            if self._busy_count != busy_count:  # while this operation was queued
                raise StoreError(f"{self._file.name} is locked")
            try:
                return work(*args)
            except sqlite3.Error as error:
                self._on_error(error)
                raise

        try:
            result = await asyncio.get_running_loop().run_in_executor(self._executor, attempt)
        except (sqlite3.Error, OSError, ValueError) as error:
            reason = error_reason(error)
            if self._connection is None:
                self._breaker.trip()
            if not self._is_failing:
                self._state_log.warning(
                    "%s cannot be used (%s): request owners are lost at a restart",
                    self._file.name,
                    reason,
                )
            self._is_failing = True
            raise StoreError(f"{self._file.name} cannot be used: {reason}") from error
        self._breaker.reset()
        return result

    # The methods below run in the file's thread.

    def _on_error(self, error: sqlite3.Error) -> None:
        code = primary_code(error)
        self._busy_count += code == sqlite3.SQLITE_BUSY
        if code not in WRITE_ERRORS:
            self._close()

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = open_database(self._file, SCHEMA, BUSY_TIMEOUT)
        return self._connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # the file may be corrupt
                connection.close()

    def _insert(self, request_id: str, request_owner: RequestOwner) -> None:
        now = self._clock()
        row = (request_id, request_owner.owner, request_owner.key_mark, now, now - self._retention)
        connection = self._connect()
        connection.execute(INSERT_OWNER, row)
        if now >= self._sweep_at:
            self._sweep(connection, now)

    def _sweep(self, connection: sqlite3.Connection, now: float) -> None:
        """Delete one batch of expired owners; the next one follows soon if there are more."""
        self._sweep_at = now + SWEEP_INTERVAL
        with suppress(sqlite3.Error):  # the owner has been stored; a later sweep deletes them
            deleted = connection.execute(DELETE_EXPIRED, (now - self._retention,))
            if deleted.rowcount == SWEEP_BATCH_SIZE:
                self._sweep_at = now

    def _delete_expired(self, before: float, *, delete: bool) -> int:
        """Return the number of owners that were stored before a time, and delete them."""
        connection = self._connect()
        query = "SELECT count(*) FROM submissions WHERE submitted_at < ?"
        (count,) = connection.execute(query, (before,)).fetchone()
        while delete and connection.execute(DELETE_EXPIRED, (before,)).rowcount:
            pass
        return int(count)

    def _write_probe(self) -> None:
        row = ("", "", "", self._clock(), float("inf"))  # no request has this id
        self._connect().execute(INSERT_OWNER, row)

    def _select(self, request_id: str) -> RequestOwner | None:
        row = (request_id, self._clock() - self._retention)
        found = self._connect().execute(SELECT_OWNER, row).fetchone()
        return None if found is None else RequestOwner(*found)
