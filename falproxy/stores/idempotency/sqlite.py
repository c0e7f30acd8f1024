"""Records of one machine: an SQLite file that all its workers share."""

import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from falproxy.stores.file_schema import FileSchema
from falproxy.stores.idempotency import (
    RECORD_BYTES,
    RETENTION,
    SMALL_OUTCOME_MAX,
    BeginReply,
    IdempotencyStoreError,
)
from falproxy.stores.sqlite_file_store import SqliteFileStore

MAX_SIZE = 2**30  # bytes of all records
# Every commit is on the disk before the call is sent: a call is not sent again after a power
# failure.
PRAGMAS = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
"""
TABLES_SCRIPT = """
    CREATE TABLE IF NOT EXISTS records (
        key TEXT PRIMARY KEY, digest TEXT NOT NULL, token TEXT NOT NULL,
        is_sent INTEGER NOT NULL, has_ended INTEGER NOT NULL, outcome BLOB,
        size INTEGER NOT NULL, lease_until REAL NOT NULL, kept_until REAL NOT NULL
    );
    CREATE INDEX IF NOT EXISTS records_by_expiry ON records (kept_until);
    CREATE INDEX IF NOT EXISTS records_by_size ON records (size, kept_until);
    CREATE TABLE IF NOT EXISTS total (size INTEGER NOT NULL);
    INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM total);
    CREATE TRIGGER IF NOT EXISTS count_added AFTER INSERT ON records BEGIN
        UPDATE total SET size = size + new.size;
    END;
    CREATE TRIGGER IF NOT EXISTS count_changed AFTER UPDATE OF size ON records BEGIN
        UPDATE total SET size = size + new.size - old.size;
    END;
    CREATE TRIGGER IF NOT EXISTS count_deleted AFTER DELETE ON records BEGIN
        UPDATE total SET size = size - old.size;
    END;
"""
SCHEMA = FileSchema(PRAGMAS, (TABLES_SCRIPT,))


class SqliteIdempotencyStore(SqliteFileStore):
    """An `IdempotencyStore` in a file.

    max_size: bytes of all records.
    clock: seconds since 1970.
    """

    schema, tables, error_type = SCHEMA, ("records",), IdempotencyStoreError

    def __init__(
        self, file: Path, *, max_size: int = MAX_SIZE, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(file, clock=clock)
        self._max_size = max_size

    async def begin(self, key: str, digest: str, token: str, lease: float) -> BeginReply:
        return await self._write(self._begin, key, digest, token, lease)

    async def mark_sent(self, key: str, token: str, lease: float) -> bool:
        return await self._write(self._mark_sent, key, token, lease)

    async def renew(
        self, calls: Sequence[tuple[str, str]], lease: float
    ) -> Sequence[tuple[str, str]]:
        return await self._write(self._renew, calls, lease)

    async def finish(self, key: str, token: str, outcome: bytes | None) -> bool:
        return await self._write(self._finish, key, token, outcome)

    async def release(self, key: str, token: str) -> bool:
        return await self._write(self._release, key, token)

    def _begin(
        self,
        connection: sqlite3.Connection,
        now: float,
        key: str,
        digest: str,
        token: str,
        lease: float,
    ) -> BeginReply:
        connection.execute("DELETE FROM records WHERE key = ? AND kept_until <= ?", (key, now))
        query = (
            "SELECT digest, token, is_sent, has_ended, outcome, lease_until"
            " FROM records WHERE key = ?"
        )
        row = connection.execute(query, (key,)).fetchone()
        if row is None:
            return self._add(connection, key, digest, token, (now + lease, now + RETENTION))
        reply = read_state(row, digest, token, now)
        if reply.state == "started":
            connection.execute(
                "UPDATE records SET token = ?, lease_until = ? WHERE key = ?",
                (token, now + lease, key),
            )
        return reply

    def _add(
        self,
        connection: sqlite3.Connection,
        key: str,
        digest: str,
        token: str,
        times: tuple[float, float],
    ) -> BeginReply:
        """Insert a record. times: ends of its lease and of its retention."""
        if not self._make_room(connection, RECORD_BYTES):
            return BeginReply("full")
        connection.execute(
            "INSERT INTO records (key, digest, token, is_sent, has_ended, size, lease_until,"
            " kept_until) VALUES (?, ?, ?, 0, 0, ?, ?, ?)",
            (key, digest, token, RECORD_BYTES, *times),
        )
        return BeginReply("started")

    def _mark_sent(
        self, connection: sqlite3.Connection, now: float, key: str, token: str, lease: float
    ) -> bool:
        updated = connection.execute(
            "UPDATE records SET is_sent = 1, lease_until = max(lease_until, ?)"
            " WHERE key = ? AND token = ? AND NOT has_ended",
            (now + lease, key, token),
        )
        return updated.rowcount == 1

    def _renew(
        self,
        connection: sqlite3.Connection,
        now: float,
        calls: Sequence[tuple[str, str]],
        lease: float,
    ) -> Sequence[tuple[str, str]]:
        query = (
            "UPDATE records SET lease_until = max(lease_until, ?)"
            " WHERE key = ? AND token = ? AND NOT has_ended"
        )
        return [
            call for call in calls if connection.execute(query, (now + lease, *call)).rowcount != 1
        ]

    def _finish(
        self,
        connection: sqlite3.Connection,
        now: float,
        key: str,
        token: str,
        outcome: bytes | None,
    ) -> bool:
        if outcome is not None and not self._make_room(connection, len(outcome)):
            outcome = None
        updated = connection.execute(
            "UPDATE records SET has_ended = 1, outcome = ?, size = ?, kept_until = ?"
            " WHERE key = ? AND token = ? AND NOT has_ended",
            (outcome, RECORD_BYTES + len(outcome or b""), now + RETENTION, key, token),
        )
        return updated.rowcount == 1

    def _release(self, connection: sqlite3.Connection, now: float, key: str, token: str) -> bool:
        deleted = connection.execute(
            "DELETE FROM records WHERE key = ? AND token = ? AND NOT has_ended", (key, token)
        )
        return deleted.rowcount == 1

    def _make_room(self, connection: sqlite3.Connection, size: int) -> bool:
        """Drop large outcomes until there is room for `size` bytes. False if there is none."""
        while True:
            (total,) = connection.execute("SELECT size FROM total").fetchone()
            if total + size <= self._max_size:
                return True
            dropped = connection.execute(
                "UPDATE records SET outcome = NULL, size = ? WHERE rowid ="
                " (SELECT rowid FROM records WHERE size > ? ORDER BY kept_until LIMIT 1)",
                (RECORD_BYTES, RECORD_BYTES + SMALL_OUTCOME_MAX),
            )
            if dropped.rowcount == 0:
                return False


def read_state(
    row: tuple[str, str, int, int, bytes | None, float], digest: str, token: str, now: float
) -> BeginReply:
    """Return the state of a record for a caller; `started` if the caller may have it.

    row: digest, token, is_sent, has_ended, outcome and lease_until.
    """
    known_digest, holder, is_sent, has_ended, outcome, lease_until = row
    if known_digest != digest:
        return BeginReply("mismatch")
    if has_ended:
        return BeginReply("dropped") if outcome is None else BeginReply("done", outcome)
    if holder != token and lease_until > now:
        return BeginReply("running")
    return BeginReply("lost" if holder != token and is_sent else "started")
