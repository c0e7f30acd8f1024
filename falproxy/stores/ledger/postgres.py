"""The ledger in PostgreSQL, which several machines share."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import asyncpg  # type: ignore[import-untyped]  # it comes without types

from falproxy.stores.ledger import LedgerError, UnfitError
from falproxy.stores.ledger.database import Database
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.sql_ledger import SqlLedger
from falproxy.stores.ledger.statements import TABLES

CONNECT_SECONDS = 3.0
URL = re.compile(r"postgres(?:ql)?://\S+")
# Of one statement, so that rows which it writes agree.
NOW = "CAST(extract(epoch FROM statement_timestamp()) * 1000 AS BIGINT)"
UNFIT = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, UnicodeError)
FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # and TimeoutError
)


class PostgresWire:
    """A `Wire` to a server. Transactions are begun and ended in words: asyncpg's own would wait
    for a server that does not answer, to say that it takes everything back."""

    begins = "BEGIN"
    # Any number that nobody else has: what is locked is the number.
    begins_alone: tuple[str, ...] = (begins, "SELECT pg_advisory_xact_lock(7065834219)")
    has_version = "SELECT 1 WHERE to_regclass('falproxy_ledger') IS NOT NULL"
    # Supabase lets everybody who has the public key of a project read its tables, unless this is
    # on. Who made them reads them all the same.
    keeps_private = tuple(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY" for table in TABLES)

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def fetch(self, statement: str, row: Row = ()) -> list[Row]:
        with translated():
            return [tuple(each) for each in await self._connection.fetch(spoken(statement), *row)]

    async def many(self, statement: str, rows: Sequence[Row]) -> None:
        with translated():
            await self._connection.executemany(spoken(statement), rows)

    async def close(self) -> None:
        with translated():
            await self._connection.close()

    def drop(self) -> None:
        self._connection.terminate()


class PostgresServer:
    """The `Opener` of a server."""

    where = "The ledger of DATABASE_URL"

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self) -> PostgresWire:
        with translated():
            # Poolers such as Supabase's give each transaction another connection, to which
            # statements that were prepared on the last one mean nothing.
            connect = asyncpg.connect(self._url, timeout=CONNECT_SECONDS, statement_cache_size=0)
            return PostgresWire(await connect)

    async def ended(self) -> None:
        """At once: they are hung up on."""


def postgres_ledger(url: str) -> SqlLedger:
    """Raises: ValueError, that is no URL of a PostgreSQL server."""
    if not URL.fullmatch(url):
        raise ValueError("must be a URL like postgresql://user:password@host/database")
    return SqlLedger(Database(PostgresServer(url)))


@cache
def spoken(statement: str) -> str:
    return re.sub(r"\bNOW\b", NOW, statement)


@contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except UNFIT as error:
        raise UnfitError(f"a row does not fit: {reason(error)}") from error
    except FAILURES as error:
        raise LedgerError(reason(error)) from error


def reason(error: Exception) -> str:
    """The server's sentence, without the details, which may quote a row."""
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    return str(error).partition("\n")[0]
