"""Limits of one machine: an SQLite file that all its workers share."""

import json
import sqlite3
from collections.abc import Sequence

from falproxy.stores.file_schema import FileSchema
from falproxy.stores.limits import (
    BUDGET_GRACE,
    CONCURRENCY_RETRY,
    RATE_PARTS,
    RESERVATION_RETENTION,
    Admission,
    Limit,
    LimitsError,
    LimitState,
    Reservation,
    ReserveRequest,
    admitted_state,
    budget_name,
    part_length,
    rate_name,
    rate_state,
    running_name,
    share,
)
from falproxy.stores.sqlite_file_store import SqliteFileStore

# Every commit is on the disk before the call is sent: after a power failure the budgets still hold.
PRAGMAS = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
"""
TABLES_SCRIPT = """
    CREATE TABLE IF NOT EXISTS requests (
        name TEXT NOT NULL, part INTEGER NOT NULL, count INTEGER NOT NULL, kept_until REAL NOT NULL,
        PRIMARY KEY (name, part)
    );
    CREATE INDEX IF NOT EXISTS requests_by_expiry ON requests (kept_until);
    CREATE TABLE IF NOT EXISTS running (
        name TEXT NOT NULL, token TEXT NOT NULL, kept_until REAL NOT NULL,
        PRIMARY KEY (name, token)
    );
    CREATE INDEX IF NOT EXISTS running_by_token ON running (token);
    CREATE INDEX IF NOT EXISTS running_by_expiry ON running (kept_until);
    CREATE TABLE IF NOT EXISTS budgets (
        name TEXT PRIMARY KEY, used INTEGER NOT NULL, kept_until REAL NOT NULL
    );
    CREATE INDEX IF NOT EXISTS budgets_by_expiry ON budgets (kept_until);
    CREATE TABLE IF NOT EXISTS reservations (
        token TEXT PRIMARY KEY, amount INTEGER NOT NULL, budgets TEXT NOT NULL,
        request_id TEXT UNIQUE, details TEXT NOT NULL,
        created_at REAL NOT NULL, due_at REAL NOT NULL, kept_until REAL NOT NULL
    );
    CREATE INDEX IF NOT EXISTS reservations_by_due ON reservations (due_at);
    CREATE INDEX IF NOT EXISTS reservations_by_expiry ON reservations (kept_until);
"""
SCHEMA = FileSchema(PRAGMAS, (TABLES_SCRIPT,))
TABLES = ("requests", "running", "budgets", "reservations")
COLUMNS = "token, amount, request_id, details, ? - created_at"


class SqliteLimitsStore(SqliteFileStore):
    """A `LimitsStore` in a file.

    clock: seconds since 1970.
    """

    schema, tables, error_type = SCHEMA, TABLES, LimitsError

    async def reserve(self, request: ReserveRequest) -> Admission:
        return await self._write(self._reserve, request)

    async def attach(self, token: str, request_id: str, details: str, lease: float) -> bool:
        return await self._write(self._attach, token, request_id, details, lease)

    async def renew(self, token: str, lease: float) -> bool:
        return await self._write(self._renew, token, lease)

    async def find(self, request_id: str) -> Reservation | None:
        return await self._read(self._find, request_id)

    async def settle(self, token: str, amount: int) -> bool:
        return await self._write(self._settle, token, amount)

    async def release(self, token: str) -> bool:
        return await self.settle(token, 0)

    async def claim_due(self, limit: int, lease: float) -> list[Reservation]:
        return await self._write(self._claim_due, limit, lease)

    async def count(self, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        return await self._read(self._count, limits)

    def _reserve(
        self, connection: sqlite3.Connection, now: float, request: ReserveRequest
    ) -> Admission:
        states = tuple(read_state(connection, limit, now) for limit in request.limits)
        for index, (limit, state) in enumerate(zip(request.limits, states, strict=True)):
            if state.used + share(limit, request.amount) > limit.maximum:
                return Admission(index, states)
        budgets, is_running = [], False
        for limit in request.limits:
            match limit.kind:
                case "rate":
                    add_request(connection, limit, now)
                case "concurrency":
                    add_running(connection, limit, request.token, now + request.lease)
                    is_running = True
                case "budget":
                    budgets.append(add_amount(connection, limit, request.amount, now))
        if budgets or is_running:
            row = (
                request.token,
                request.amount,
                json.dumps(budgets),
                now,
                now + request.lease,
                now + RESERVATION_RETENTION,
            )
            connection.execute(
                "INSERT INTO reservations (token, amount, budgets, details,"
                " created_at, due_at, kept_until) VALUES (?, ?, ?, '', ?, ?, ?)",
                row,
            )
        admitted = (
            admitted_state(limit, state, request.amount, now)
            for limit, state in zip(request.limits, states, strict=True)
        )
        return Admission(None, tuple(admitted))

    def _attach(
        self,
        connection: sqlite3.Connection,
        now: float,
        token: str,
        request_id: str,
        details: str,
        lease: float,
    ) -> bool:
        connection.execute(
            "UPDATE reservations SET request_id = NULL WHERE request_id = ? AND token != ?",
            (request_id, token),
        )
        updated = connection.execute(
            "UPDATE reservations SET request_id = ?, details = ?, due_at = ? WHERE token = ?",
            (request_id, details, now + lease, token),
        )
        connection.execute(
            "UPDATE running SET kept_until = ? WHERE token = ?",
            (now + RESERVATION_RETENTION, token),
        )
        return updated.rowcount == 1

    def _renew(self, connection: sqlite3.Connection, now: float, token: str, lease: float) -> bool:
        updated = connection.execute(
            "UPDATE reservations SET due_at = ? WHERE token = ?", (now + lease, token)
        )
        connection.execute(
            "UPDATE running SET kept_until = max(kept_until, ?) WHERE token = ?",
            (now + lease, token),
        )
        return updated.rowcount == 1

    def _find(
        self, connection: sqlite3.Connection, now: float, request_id: str
    ) -> Reservation | None:
        query = f"SELECT {COLUMNS} FROM reservations WHERE request_id = ?"
        row = connection.execute(query, (now, request_id)).fetchone()
        return None if row is None else Reservation(*row)

    def _settle(self, connection: sqlite3.Connection, now: float, token: str, amount: int) -> bool:
        row = connection.execute(
            "DELETE FROM reservations WHERE token = ? RETURNING amount, budgets", (token,)
        ).fetchone()
        if row is None:
            return False
        connection.executemany(
            "UPDATE budgets SET used = used + ? WHERE name = ?",
            [(amount - row[0], name) for name in json.loads(row[1])],
        )
        connection.execute("DELETE FROM running WHERE token = ?", (token,))
        return True

    def _claim_due(
        self, connection: sqlite3.Connection, now: float, limit: int, lease: float
    ) -> list[Reservation]:
        query = f"SELECT {COLUMNS} FROM reservations WHERE due_at <= ? ORDER BY due_at LIMIT ?"
        due = [Reservation(*row) for row in connection.execute(query, (now, now, limit))]
        connection.executemany(
            "UPDATE reservations SET due_at = ? WHERE token = ?",
            [(now + lease, reservation.token) for reservation in due],
        )
        return due

    def _count(
        self, connection: sqlite3.Connection, now: float, limits: Sequence[Limit]
    ) -> tuple[LimitState, ...]:
        return tuple(read_state(connection, limit, now) for limit in limits)


def read_state(connection: sqlite3.Connection, limit: Limit, now: float) -> LimitState:
    match limit.kind:
        case "rate":
            query = "SELECT part, count FROM requests WHERE name = ?"
            rows = connection.execute(query, (rate_name(limit),)).fetchall()
            return rate_state(limit, rows, now)
        case "concurrency":
            query = "SELECT count(*) FROM running WHERE name = ? AND kept_until > ?"
            (used,) = connection.execute(query, (running_name(limit), now)).fetchone()
            return LimitState(used, CONCURRENCY_RETRY)
        case "budget":
            assert limit.window is not None
            start, end = limit.window.bounds(now)
            query = "SELECT used FROM budgets WHERE name = ?"
            row = connection.execute(query, (budget_name(limit, start),)).fetchone()
            return LimitState(row[0] if row else 0, end - now)


def add_request(connection: sqlite3.Connection, limit: Limit, now: float) -> None:
    assert limit.window is not None
    part = part_length(limit.window)
    connection.execute(
        "INSERT INTO requests (name, part, count, kept_until) VALUES (?, ?, 1, ?)"
        " ON CONFLICT (name, part) DO UPDATE SET count = count + 1",
        (rate_name(limit), int(now // part), now + (RATE_PARTS + 1) * part),
    )


def add_running(connection: sqlite3.Connection, limit: Limit, token: str, until: float) -> None:
    row = (running_name(limit), token, until)
    connection.execute("INSERT INTO running (name, token, kept_until) VALUES (?, ?, ?)", row)


def add_amount(connection: sqlite3.Connection, limit: Limit, amount: int, now: float) -> str:
    """Reserve an amount, and return the name of the budget's counter."""
    assert limit.window is not None
    start, end = limit.window.bounds(now)
    name = budget_name(limit, start)
    connection.execute(
        "INSERT INTO budgets (name, used, kept_until) VALUES (?, ?, ?)"
        " ON CONFLICT (name) DO UPDATE SET used = used + ?",
        (name, amount, end + BUDGET_GRACE, amount),
    )
    return name
