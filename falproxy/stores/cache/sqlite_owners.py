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
from falproxy.stores.cache import OWNER_RETENTION, RequestOwner, StoreError
from falproxy.stores.operation_groups import Failure
from falproxy.stores.sqlite_file_store import SqliteFileStore

logger = logging.getLogger(__name__)

ReturnT = TypeVar("ReturnT")

OWNERS_FILE = "submissions.sqlite"
BUSY_TIMEOUT = 0.5  # seconds to wait for a lock of another worker
RETRY_INTERVAL = 1.0  # seconds without any access to a file that could not be opened
SCHEMA = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS submissions (
        request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, key_mark TEXT NOT NULL,
        submitted_at REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS submissions_by_age ON submissions (submitted_at);
"""


class SqliteOwnerStore(SqliteFileStore):
    """An `OwnerStore` in a file. A file that cannot be used is logged; one that cannot be opened is
    tried again after RETRY_INTERVAL.

    clock: seconds since 1970.
    """

    schema, tables, error_type, busy_timeout = SCHEMA, (), StoreError, BUSY_TIMEOUT

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__(file, clock=clock)
        self._breaker = CircuitBreaker(RETRY_INTERVAL, clock)
        self._is_failing = False  # since the last successful write

    def __repr__(self) -> str:
        return f"<SqliteOwnerStore {self._file}, {self._breaker!r}>"

    async def close(self) -> None:
        await self.__aexit__()

    async def put_owner(self, request_id: str, request_owner: RequestOwner) -> bool:
        is_new = await self._call(lambda: self._write(self._insert, request_id, request_owner))
        self._is_failing = False
        return is_new

    async def get_owner(self, request_id: str) -> RequestOwner | None:
        return await self._call(lambda: self._read(self._select, request_id))

    async def check_owners_writable(self) -> None:
        await self._call(lambda: self._write(self._write_probe))
        self._is_failing = False

    async def _call(self, start: Callable[[], "asyncio.Future[ReturnT]"]) -> ReturnT:
        if not self._breaker.allow_request():
            raise StoreError(f"{self._file.name} is not used for now")
        try:
            result = await start()
        except StoreError as error:
            if self._connection is None:
                self._breaker.trip()
            if not self._is_failing:
                logger.warning("%s: request owners are lost at a restart", error)
            self._is_failing = True
            raise
        self._breaker.reset()
        return result

    # The methods below run in the file's thread.

    def _on_error(self, error: Exception) -> Failure:
        if isinstance(error, ValueError):  # text that is not valid Unicode
            error = self._translate(type(error).__name__, error)
        return super()._on_error(error)

    def _connect(self) -> sqlite3.Connection:
        is_new = self._connection is None
        connection = super()._connect()
        if is_new:
            oldest = self._clock() - OWNER_RETENTION
            connection.execute("DELETE FROM submissions WHERE submitted_at < ?", (oldest,))
        return connection

    def _insert(
        self,
        connection: sqlite3.Connection,
        now: float,
        request_id: str,
        request_owner: RequestOwner,
    ) -> bool:
        row = (request_id, request_owner.owner, request_owner.key_mark, now)
        statement = "INSERT OR IGNORE INTO submissions VALUES (?, ?, ?, ?)"
        return connection.execute(statement, row).rowcount == 1

    def _write_probe(self, connection: sqlite3.Connection, now: float) -> None:
        row = ("", "", "", now)  # no request has this id
        connection.execute("INSERT OR REPLACE INTO submissions VALUES (?, ?, ?, ?)", row)

    def _select(
        self, connection: sqlite3.Connection, now: float, request_id: str
    ) -> RequestOwner | None:
        query = "SELECT owner, key_mark FROM submissions WHERE request_id = ?"
        row = connection.execute(query, (request_id,)).fetchone()
        return None if row is None else RequestOwner(*row)
