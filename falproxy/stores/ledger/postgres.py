"""The ledger in PostgreSQL, which several machines share."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import asyncpg  # type: ignore[import-untyped]  # it comes without types

from falproxy.stores.ledger import InvalidRowError, LedgerError
from falproxy.stores.ledger.database import LedgerDatabase
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.sql_ledger import SqlLedger
from falproxy.stores.ledger.statements import TABLES

CONNECT_SECONDS = 3.0
URL = re.compile(r"postgres(?:ql)?://\S+")
# Of one statement, so that rows which it writes agree.
NOW = "CAST(extract(epoch FROM statement_timestamp()) * 1000 AS BIGINT)"
INVALID_ROW_ERRORS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, UnicodeError)
DATABASE_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # and TimeoutError
)


class PostgresConnection:
    """A `Wire` to a server. Transactions are begun and ended in words: asyncpg's own would wait
    for a server that does not answer, to say that it takes everything back."""

    begin_statement = "BEGIN"
    # Any number that nobody else has: what is locked is the number.
    begin_exclusive: tuple[str, ...] = (begin_statement, "SELECT pg_advisory_xact_lock(7065834219)")
    schema_exists_query = "SELECT 1 WHERE to_regclass('falproxy_ledger') IS NOT NULL"
    # Supabase lets everybody who has the public key of a project read its tables, unless this is
    # on. Who made them reads them all the same.
    privacy_statements = tuple(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY" for table in TABLES)

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def fetch(self, statement: str, row: Row = ()) -> list[Row]:
        with map_errors():
            return [
                tuple(each) for each in await self._connection.fetch(to_postgres(statement), *row)
            ]

    async def execute_many(self, statement: str, rows: Sequence[Row]) -> None:
        with map_errors():
            await self._connection.executemany(to_postgres(statement), rows)

    async def close(self) -> None:
        with map_errors():
            await self._connection.close()

    def terminate(self) -> None:
        self._connection.terminate()


class PostgresFactory:
    """The `Opener` of a server."""

    display_name = "The ledger of DATABASE_URL"

    def __init__(self, url: str) -> None:
        self._url = url

    async def connect(self) -> PostgresConnection:
        with map_errors():
            # Poolers such as Supabase's give each transaction another connection, to which
            # statements that were prepared on the last one mean nothing.
            connect = asyncpg.connect(self._url, timeout=CONNECT_SECONDS, statement_cache_size=0)
            return PostgresConnection(await connect)

    async def wait_terminated(self) -> None:
        """At once: they are hung up on."""


def postgres_ledger(url: str) -> SqlLedger:
    """Raises: ValueError, that is no URL of a PostgreSQL server."""
    if not URL.fullmatch(url):
        raise ValueError("must be a URL like postgresql://user:password@host/database")
    return SqlLedger(LedgerDatabase(PostgresFactory(url)))


@cache
def to_postgres(statement: str) -> str:
    return re.sub(r"\bNOW\b", NOW, statement)


@contextmanager
def map_errors() -> Iterator[None]:
    try:
        yield
    except INVALID_ROW_ERRORS as error:
        raise InvalidRowError(f"a row does not fit: {reason(error)}") from error
    except DATABASE_ERRORS as error:
        raise LedgerError(reason(error)) from error


def reason(error: Exception) -> str:
    """The server's sentence, without the details, which may quote a row."""
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    return str(error).partition("\n")[0]
