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
from pathlib import Path
from typing import TypeVar

from falproxy.circuit_breaker import CircuitBreaker
from falproxy.state_log import StateLog
from falproxy.stores.cache import OWNER_RETENTION, RequestOwner, StoreError
from falproxy.stores.file_schema import FileSchema
from falproxy.stores.operation_groups import Failure
from falproxy.stores.sqlite_file_store import SqliteFileStore

logger = logging.getLogger(__name__)

ReturnT = TypeVar("ReturnT")

OWNERS_FILE = "submissions.sqlite"
BUSY_TIMEOUT = 0.5  # seconds to wait for a lock of another worker
SWEEP_INTERVAL = 60.0  # seconds between deletions of expired owners
SWEEP_BATCH_SIZE = 1000  # of one deletion, during which submits wait
RETRY_INTERVAL = 1.0  # seconds without any access to a file that could not be opened
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


class SqliteOwnerStore(SqliteFileStore):
    """An `OwnerStore` in a file. A file that cannot be used is logged; one that cannot be opened is
    tried again after RETRY_INTERVAL.

    clock: seconds since 1970.
    retention: seconds for which an owner is stored.
    """

    schema, tables, error_type, busy_timeout = SCHEMA, (), StoreError, BUSY_TIMEOUT

    def __init__(
        self,
        file: Path,
        clock: Callable[[], float] = time.time,
        *,
        retention: float = OWNER_RETENTION,
    ) -> None:
        super().__init__(file, clock=clock)
        self._retention = retention
        self._sweep_at = float("-inf")  # by the clock
        self._breaker = CircuitBreaker(RETRY_INTERVAL, clock)
        self._state_log = StateLog(logger)
        self._is_failing = False  # since the last successful write

    def __repr__(self) -> str:
        return f"<SqliteOwnerStore {self._file}, {self._breaker!r}>"

    async def close(self) -> None:
        await self.__aexit__()

    async def put_owner(self, request_id: str, request_owner: RequestOwner) -> bool:
        is_new = await self._call(lambda: self._write(self._insert, request_id, request_owner))
        self._is_failing = False
        self._delete_if_due()
        return is_new

    async def get_owner(self, request_id: str) -> RequestOwner | None:
        return await self._call(lambda: self._read(self._select, request_id))

    async def check_owners_writable(self) -> None:
        await self._call(lambda: self._write(self._write_probe))
        self._is_failing = False

    async def delete_before(self, before: float, *, delete: bool = True) -> int:
        """Return the number of owners that were stored before a time, in seconds since 1970.

        delete: delete them; otherwise they are only counted.
        """
        count = await self._call(lambda: self._read(self._count_before, before))
        if not delete:
            return count
        while await self._call(lambda: self._write(self._delete_batch, before)) > 0:
            pass
        return count

    def _delete_if_due(self) -> None:
        """Delete one batch of expired owners, in a transaction of its own; the next one follows
        with the next owner if there are more."""
        now = self._clock()
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_INTERVAL
            deletion = self._write(self._delete_batch, now - self._retention)
            deletion.add_done_callback(self._on_deleted)

    def _on_deleted(self, deletion: "asyncio.Future[int]") -> None:
        has_failed = deletion.cancelled() or deletion.exception() is not None  # tried again later
        if not has_failed and deletion.result() == SWEEP_BATCH_SIZE:
            self._sweep_at = float("-inf")

    async def _call(self, start: Callable[[], "asyncio.Future[ReturnT]"]) -> ReturnT:
        if not self._breaker.allow_request():
            raise StoreError(f"{self._file.name} is not used for now")
        try:
            result = await start()
        except StoreError as error:
            if self._connection is None:
                self._breaker.trip()
            if not self._is_failing:
                self._state_log.warning("%s: request owners are lost at a restart", error)
            self._is_failing = True
            raise
        self._breaker.reset()
        return result

    # The methods below run in the file's thread.

    def _on_error(self, error: Exception) -> Failure:
        if isinstance(error, ValueError):  # text that is not valid Unicode
            error = self._translate(type(error).__name__, error)
        return super()._on_error(error)

    def _insert(
        self,
        connection: sqlite3.Connection,
        now: float,
        request_id: str,
        request_owner: RequestOwner,
    ) -> bool:
        row = (request_id, request_owner.owner, request_owner.key_mark, now, now - self._retention)
        return connection.execute(INSERT_OWNER, row).rowcount == 1

    def _count_before(self, connection: sqlite3.Connection, now: float, before: float) -> int:
        query = "SELECT count(*) FROM submissions WHERE submitted_at < ?"
        return int(connection.execute(query, (before,)).fetchone()[0])

    def _delete_batch(self, connection: sqlite3.Connection, now: float, before: float) -> int:
        return connection.execute(DELETE_EXPIRED, (before,)).rowcount

    def _write_probe(self, connection: sqlite3.Connection, now: float) -> None:
        row = ("", "", "", now, float("inf"))  # no request has this id
        connection.execute(INSERT_OWNER, row)

    def _select(
        self, connection: sqlite3.Connection, now: float, request_id: str
    ) -> RequestOwner | None:
        found = connection.execute(SELECT_OWNER, (request_id, now - self._retention)).fetchone()
        return None if found is None else RequestOwner(*found)
