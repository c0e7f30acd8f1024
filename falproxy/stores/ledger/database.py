"""Connections to the database of a ledger: opened on demand, discarded after an error."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from falproxy.shared_tasks import SharedTasks
from falproxy.stores.ledger import InvalidRowError, LedgerError, SchemaError
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.schema import (
    CREATE_READERS_TABLE,
    DELETE_MIN_READER,
    INSERT_MIN_READER,
    READERS_TABLE,
    SELECT_MIN_READER,
    Schema,
    SqlDialect,
)
from falproxy.stores.ledger.statements import LEDGER_SCHEMA

ReturnT = TypeVar("ReturnT")
StatementRows = tuple[str, Sequence[Row]]

# Seconds for one operation, including the wait for the connection. Totals over a year of calls take
# longer than writes.
WRITE_TIMEOUT = 5.0
READ_TIMEOUT = 30.0
MIGRATION_TIMEOUT = 600.0
CLOSE_TIMEOUT = 1.0
NO_PARAMETERS: tuple[Row, ...] = ((),)


class DbConnection(Protocol):
    """One connection. Its methods raise LedgerError, after which the connection is discarded.

    dialect: of its SQL.
    begin_statement: begins a transaction that writes.
    begin_read: begin a transaction with one query, which may take long.
    begin_exclusive: begin a transaction that excludes schema changes by other processes.
    lock_sums_query: returns whether no other transaction changes records or computes sums until
        the end of this one. It does not wait.
    table_exists_query: returns a row if there is a table of this name.
    privacy_statement: restricts access to a new table, whose name replaces `{}`; None if that is
        not necessary.
    """

    dialect: SqlDialect
    begin_statement: str
    begin_read: tuple[str, ...]
    begin_exclusive: tuple[str, ...]
    lock_sums_query: str
    table_exists_query: str
    privacy_statement: str | None

    async def fetch(self, statement: str, row: Row = ()) -> list[Row]: ...

    async def execute_many(self, statement: str, rows: Sequence[Row]) -> None: ...

    async def close(self) -> None: ...

    def terminate(self) -> None:
        """Close the connection at once. A running statement is cancelled and rolled back."""


ConnectionT = TypeVar("ConnectionT", bound=DbConnection)


class ConnectionFactory(Protocol):
    """Opens connections to one database.

    display_name: name of the database in messages.
    """

    display_name: str

    async def connect(self) -> DbConnection:
        """Raises: LedgerError."""

    async def wait_terminated(self) -> None:
        """Wait until all terminated connections have released their resources."""


class ConnectionSlot:
    """One connection, which runs one operation at a time."""

    def __init__(self, connect: Callable[[], Awaitable[DbConnection]], timeout: float) -> None:
        self._connect = connect
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._connection: DbConnection | None = None
        self._openings: set[asyncio.Future[DbConnection]] = set()  # also of callers that have left
        self._running: DbConnection | None = None  # of the operation in progress
        self._closings = 0  # calls of `close`

    def __repr__(self) -> str:
        state = "closed" if self._connection is None else "open"
        return f"<ConnectionSlot {'busy' if self._lock.locked() else state}>"

    async def run(self, work: Callable[[DbConnection], Awaitable[ReturnT]]) -> ReturnT:
        """Return the result of `work`. Raises: LedgerError."""
        try:
            async with asyncio.timeout(self._timeout), self._lock:
                return await self._run(work)
        except TimeoutError as error:
            raise LedgerError("the ledger did not respond in time") from error

    async def _run(self, work: Callable[[DbConnection], Awaitable[ReturnT]]) -> ReturnT:
        closings = self._closings
        connection = self._connection or await self._open()
        if self._closings != closings:
            connection.terminate()
            raise LedgerError("the ledger is closed")
        # A connection is used again only after success: cancellation may interrupt a transaction.
        self._connection, self._running = None, connection
        try:
            result = await work(connection)
        except BaseException:
            connection.terminate()
            raise
        finally:
            self._running = None
        if self._closings == closings:
            self._connection = connection
        else:
            connection.terminate()
        return result

    async def _open(self) -> DbConnection:
        opening = asyncio.ensure_future(self._connect())
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)
        try:
            return await unless_closed(opening)
        except BaseException:
            # It may have been opened in the moment in which the caller has left.
            opening.add_done_callback(terminate_opened)
            raise

    def discard(self) -> None:
        """Close an idle connection: it may lead to a server that is not used any more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def close(self) -> None:
        """Close the connection. An operation in progress has `CLOSE_TIMEOUT` seconds to end."""
        self._closings += 1
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT), self._lock:
                pass
        if openings := (*self._openings,):
            for opening in openings:
                opening.cancel()
            await asyncio.wait(openings, timeout=CLOSE_TIMEOUT)
        if self._running is not None:
            self._running.terminate()
        await self.close_idle()

    async def close_idle(self) -> None:
        """Close the connection, unless an operation uses it."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await connection.close()
        except (LedgerError, TimeoutError):
            connection.terminate()


class LedgerDatabase:
    """One connection for short operations, and one for queries that may take long.

    After a LedgerError, a transaction was applied completely or not at all.
    """

    def __init__(self, factory: ConnectionFactory, schema: Schema = LEDGER_SCHEMA) -> None:
        self._factory = factory
        self._schema = schema
        self._writer = ConnectionSlot(self._connect_and_migrate, WRITE_TIMEOUT)
        self._reader = ConnectionSlot(factory.connect, READ_TIMEOUT)
        self._is_migrated = False
        self._migrations = SharedTasks[Schema, None]()

    def __repr__(self) -> str:
        slots = f"writer={self._writer}, reader={self._reader}"
        return f"<LedgerDatabase {self._factory.display_name}: {slots}>"

    async def run_transaction(self, statements: Sequence[StatementRows]) -> None:
        """Execute each statement with each of its rows, in one transaction."""

        async def execute_all(connection: DbConnection) -> None:
            await run_transaction(connection, (connection.begin_statement,), statements)

        await self.write(execute_all)

    async def execute(self, statement: str, row: Row = ()) -> list[Row]:
        return await self.write(lambda connection: connection.fetch(statement, row))

    async def write(self, work: Callable[[DbConnection], Awaitable[ReturnT]]) -> ReturnT:
        """Run an operation that writes. After a failure queries use a new connection as well:
        after a failover, the open one leads to the old server, which can still be read."""
        try:
            return await self._writer.run(work)
        except InvalidRowError:
            raise
        except LedgerError:
            self._reader.discard()
            raise

    async def read(self, statement: str, row: Row = ()) -> list[Row]:
        """Execute one query, which may take long and does not block writes."""

        async def fetch(connection: DbConnection) -> list[Row]:
            for each in connection.begin_read:
                await connection.fetch(each)
            rows = await connection.fetch(statement, row)
            await connection.fetch("COMMIT")
            return rows

        if not self._is_migrated:
            await self.execute(self._schema.select_version)
        return await self._reader.run(fetch)

    async def is_created(self) -> bool:
        """Return whether the schema exists. Other operations create it."""
        if self._is_migrated:
            return True
        exists = await self._reader.run(self._has_schema)
        await self._reader.close_idle()  # it is not needed for short operations
        return exists

    async def disconnect(self) -> None:
        """Close the connections that are not in use. A later operation opens them again."""
        await self._writer.close_idle()
        await self._reader.close_idle()

    async def close(self) -> None:
        """Close the connections, and cancel a migration. A later operation opens them again."""
        await self._migrations.close()
        await asyncio.gather(self._writer.close(), self._reader.close())
        await self._factory.wait_terminated()

    async def _connect_and_migrate(self) -> DbConnection:
        connection = await self._factory.connect()
        try:
            if not await self._is_current(connection):
                await self._run_migration()
        except BaseException:
            connection.terminate()
            raise
        self._is_migrated = True
        return connection

    async def _is_current(self, connection: DbConnection) -> bool:
        """Return whether no migration is pending. Requires no right to create tables."""
        return await self._has_schema(connection) and not await self._pending_migrations(connection)

    async def _run_migration(self) -> None:
        """Migrate the schema, together with others that wait for it."""
        await unless_closed(self._migrations.run(self._schema, self._migrate))

    async def _migrate(self) -> None:
        """Migrate the schema to the newest version, on a connection of its own: operations do not
        wait for long migrations, such as an index of many records."""
        connection = await self._factory.connect()
        try:
            async with asyncio.timeout(MIGRATION_TIMEOUT):
                await self._apply_migrations(connection)
        except TimeoutError as error:
            raise LedgerError("the ledger was not migrated in time") from error
        finally:
            connection.terminate()

    async def _apply_migrations(self, connection: DbConnection) -> None:
        for statement in connection.begin_exclusive:
            await connection.fetch(statement)
        await connection.fetch(self._schema.create_version_table)
        await connection.fetch(CREATE_READERS_TABLE)
        privacy = [
            (connection.privacy_statement.format(table), NO_PARAMETERS)
            for table in (*self._schema.tables, READERS_TABLE)
            if connection.privacy_statement is not None
        ]
        await run_transaction(
            connection, (), (*await self._pending_migrations(connection), *privacy)
        )

    async def _has_schema(self, connection: DbConnection) -> bool:
        return await self._has_table(connection, self._schema.version_table)

    async def _has_table(self, connection: DbConnection, table: str) -> bool:
        return bool(await connection.fetch(connection.table_exists_query, (table,)))

    async def _pending_migrations(self, connection: DbConnection) -> Sequence[StatementRows]:
        """Return the statements that migrate the schema. Raises: SchemaError, it is of a newer
        version that this one cannot work with."""
        rows = await connection.fetch(self._schema.select_version)
        version = rows[0][0] if rows else 0
        newest = len(self._schema.migrations)
        if version <= newest:
            return migration_statements(self._schema, version, connection.dialect)
        min_reader = await self._min_reader(connection, version)
        if min_reader <= newest:
            return ()
        raise SchemaError(
            f"{self._factory.display_name} was written by a newer falproxy (version {version}, "
            f"which works with version {min_reader} or newer, this one supports {newest}). "
            "Upgrade this one, or use another ledger for it."
        )

    async def _min_reader(self, connection: DbConnection, version: int) -> int:
        """Return the oldest version that works with a newer schema, which itself has `version`."""
        rows: list[Row] = []
        if await self._has_table(connection, READERS_TABLE):
            row = (self._schema.version_table, version)
            rows = await connection.fetch(SELECT_MIN_READER, row)
        return rows[0][0] if rows else version


def terminate_opened(opening: asyncio.Future[ConnectionT]) -> None:
    """Terminate the connection that has been opened, unless that has failed."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().terminate()


async def unless_closed(work: Awaitable[ReturnT]) -> ReturnT:
    """Return the result. Raises: LedgerError, the work was cancelled, and not the current task."""
    try:
        return await work
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise LedgerError("the ledger is closed") from error


async def run_transaction(
    connection: DbConnection, begin_statements: Sequence[str], statements: Sequence[StatementRows]
) -> None:
    """Execute statements and commit. On an error the caller terminates the connection, which rolls
    the transaction back."""
    for statement in begin_statements:
        await connection.fetch(statement)
    for statement, rows in statements:
        if rows is NO_PARAMETERS:
            await connection.fetch(statement)
        else:
            await connection.execute_many(statement, rows)
    await connection.fetch("COMMIT")


def migration_statements(
    schema: Schema, version: int, dialect: SqlDialect
) -> Sequence[StatementRows]:
    """Return the statements that migrate a schema of this version to the newest."""
    newest = len(schema.migrations)
    if version == newest:
        return ()
    changes = schema.migrations_after(version, dialect)
    return (
        *((statement, NO_PARAMETERS) for statement in changes),
        (schema.delete_version, NO_PARAMETERS),
        (schema.insert_version, ((newest,),)),
        (DELETE_MIN_READER, ((schema.version_table,),)),
        (INSERT_MIN_READER, ((schema.version_table, newest, schema.min_reader),)),
    )
