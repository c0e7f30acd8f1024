"""The ledger in PostgreSQL, for several machines."""

import errno
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import asyncpg  # type: ignore[import-untyped]  # has no type information

from falproxy.parsers import parse_postgres_url
from falproxy.spans import client_span
from falproxy.stores.ledger import InvalidRowError, LedgerError
from falproxy.stores.ledger.database import LedgerDatabase
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.schema import Schema, SqlDialect
from falproxy.stores.ledger.sql_ledger import SqlLedger
from falproxy.stores.ledger.statements import LEDGER_SCHEMA

SYSTEM = "postgresql"  # in traces
CONNECT_TIMEOUT = 3.0  # seconds
# Queries of the ledger read ranges of indexes, and look up the outcome of each record. PostgreSQL
# cannot estimate the rows of a range whose limits are computed: without these settings it reads
# whole tables, and compiles queries for longer than they run. They end with the transaction, since
# poolers give the connection to other clients then. Servers without a setting have no row of it.
PLAN_INDEX_SCANS = """
    SELECT set_config(name, 'off', true) FROM pg_settings WHERE name IN (
        'jit', 'enable_bitmapscan', 'enable_hashjoin', 'enable_material', 'enable_mergejoin'
    )
"""
# The time of the statement, the same for all rows that it writes.
NOW = "CAST(extract(epoch FROM statement_timestamp()) * 1000 AS BIGINT)"
INVALID_ROW_ERRORS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, UnicodeError)
# Errors of a connection attempt → their message. Those of the server quote parts of the URL.
CONNECT_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (TimeoutError, "it did not respond in time"),
    (socket.gaierror, "the host of DATABASE_URL is not known"),
    (asyncpg.InvalidPasswordError, "the server refuses user and password of DATABASE_URL"),
    (
        asyncpg.InvalidAuthorizationSpecificationError,
        "the server refuses the user of DATABASE_URL",
    ),
    (asyncpg.InvalidCatalogNameError, "the server has no database of the name in DATABASE_URL"),
    (FileNotFoundError, "there is no socket or certificate at the path in DATABASE_URL"),
)
DATABASE_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # includes TimeoutError
)


class PostgresConnection:
    """`DbConnection` to a PostgreSQL server.

    Transactions are SQL statements. Those of asyncpg would wait for the response to a ROLLBACK when
    the server does not respond.
    """

    dialect: SqlDialect = "postgres"
    begin_statement = "BEGIN"
    begin_read: tuple[str, ...] = ("BEGIN READ ONLY", PLAN_INDEX_SCANS)
    # The number of the advisory lock is arbitrary; other applications should not use the same.
    begin_exclusive: tuple[str, ...] = (begin_statement, "SELECT pg_advisory_xact_lock(7065834219)")
    # The lock of the triggers in `period_sums`.
    lock_sums_query = "SELECT pg_try_advisory_xact_lock(7065834220)"
    table_exists_query = "SELECT 1 WHERE to_regclass(CAST($1 AS TEXT)) IS NOT NULL"
    # Without row level security, Supabase gives everyone with the public key of a project access to
    # its tables. The owner of the tables keeps access.
    privacy_statement: str | None = "ALTER TABLE {} ENABLE ROW LEVEL SECURITY"

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def fetch(self, statement: str, row: Row = ()) -> list[Row]:
        with client_span(SYSTEM, first_word(statement)), map_errors():
            records = await self._connection.fetch(to_postgres(statement), *row)
            return [tuple(record) for record in records]

    async def execute_many(self, statement: str, rows: Sequence[Row]) -> None:
        with client_span(SYSTEM, first_word(statement)), map_errors():
            await self._connection.executemany(to_postgres(statement), rows)

    async def close(self) -> None:
        with map_errors():
            await self._connection.close()

    def terminate(self) -> None:
        self._connection.terminate()


class PostgresFactory:
    display_name = "The ledger of DATABASE_URL"

    def __init__(self, url: str) -> None:
        self._url = without_channel_binding(url)

    async def connect(self) -> PostgresConnection:
        try:
            # Poolers such as Supabase's may run each transaction on another connection, where the
            # statements prepared before do not exist.
            connection = await asyncpg.connect(
                self._url, timeout=CONNECT_TIMEOUT, statement_cache_size=0
            )
        except (*DATABASE_ERRORS, ValueError) as error:
            message = connect_error_message(error)
        else:
            return PostgresConnection(connection)
        # Without the cause, whose text may have parts of the URL.
        raise LedgerError(message)

    async def wait_terminated(self) -> None:
        """Return immediately: `terminate` closes the socket."""


def postgres_ledger(url: str) -> SqlLedger:
    """Return the ledger at a URL. Raises: ValueError, not the URL of a PostgreSQL server."""
    return SqlLedger(postgres_database(url))


def postgres_database(url: str, schema: Schema = LEDGER_SCHEMA) -> LedgerDatabase:
    """Raises: ValueError, not the URL of a PostgreSQL server."""
    parse_postgres_url(url)
    return LedgerDatabase(PostgresFactory(url), schema)


def without_channel_binding(url: str) -> str:
    """Return a URL without the option `channel_binding`, which Neon's URLs have. asyncpg has no
    channel binding: it sends the option to the server, which refuses the connection."""
    address, _, query = url.partition("?")
    options = [each for each in query.split("&") if not each.startswith("channel_binding=")]
    return "?".join(filter(None, (address, "&".join(options))))


def first_word(statement: str) -> str:
    return statement.split(None, 1)[0]


@cache
def to_postgres(statement: str) -> str:
    return re.sub(r"\bNOW\b", NOW, statement)


@contextmanager
def map_errors() -> Iterator[None]:
    try:
        yield
    except INVALID_ROW_ERRORS as error:
        raise InvalidRowError(f"a row does not fit: {error_message(error)}") from error
    except DATABASE_ERRORS as error:
        raise LedgerError(error_message(error)) from error


def connect_error_message(error: Exception) -> str:
    """Return why a connection cannot be opened, without any part of the URL."""
    message = next((text for kind, text in CONNECT_ERRORS if isinstance(error, kind)), None)
    if message is not None:
        return message
    if isinstance(error, asyncpg.PostgresError):
        return f"the server refuses the connection (SQLSTATE {error.sqlstate})"
    if isinstance(error, OSError):
        return f"it cannot be reached ({describe_error(error)})"
    return f"DATABASE_URL cannot be used ({type(error).__name__}): check its options"


def describe_error(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def error_message(error: Exception) -> str:
    """Return the first line of the server's message. The details below it may quote a row."""
    if isinstance(error, TimeoutError):
        return "it did not respond in time"
    return str(error).partition("\n")[0]
