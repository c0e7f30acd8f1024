"""Connections to a ledger's database: opened as they are needed, dropped when they fail."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from falproxy.stores.ledger import LedgerError, SchemaError
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.statements import (
    CREATE_VERSION_TABLE,
    DELETE_VERSION,
    INSERT_VERSION,
    MIGRATIONS,
    SELECT_VERSION,
)

ReturnT = TypeVar("ReturnT")
StatementRows = tuple[str, Sequence[Row]]

# Seconds that something may take, with waiting for its turn and for a connection. Who asks for
# sums over a year of calls waits longer.
WRITE_TIMEOUT = 5.0
READ_TIMEOUT = 30.0
CLOSE_TIMEOUT = 1.0
NO_PARAMETERS: tuple[Row, ...] = ((),)


class DbConnection(Protocol):
    """One connection. Its methods raise LedgerError; one that did is dropped.

    begins: starts a transaction that writes. begins_alone: starts one that no other process may
    change tables beside. has_version: a query with a row where there is a ledger already.
    keeps_private: what is said of new tables, so that nobody else reads them.
    """

    begin_statement: str
    begin_exclusive: tuple[str, ...]
    schema_exists_query: str
    privacy_statements: tuple[str, ...]

    async def fetch(self, statement: str, row: Row = ()) -> list[Row]: ...

    async def execute_many(self, statement: str, rows: Sequence[Row]) -> None: ...

    async def close(self) -> None: ...

    def terminate(self) -> None:
        """Ends it at once, with whatever is under way. Nothing is left half done."""


class ConnectionFactory(Protocol):
    """The way to one database. where: its name for a person."""

    display_name: str

    async def connect(self) -> DbConnection:
        """Raises: LedgerError."""

    async def wait_terminated(self) -> None:
        """Returns when nothing is left of the wires that were dropped."""


class ConnectionSlot:
    """One connection that is used by one at a time."""

    def __init__(self, connect: Callable[[], Awaitable[DbConnection]], timeout: float) -> None:
        self._connect = connect
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._connection: DbConnection | None = None

    async def run(self, work: Callable[[DbConnection], Awaitable[ReturnT]]) -> ReturnT:
        """What `work` returns. Raises: LedgerError."""
        try:
            async with asyncio.timeout(self._timeout), self._lock:
                return await self._run(work)
        except TimeoutError as error:
            raise LedgerError("the ledger does not answer in time") from error

    async def _run(self, work: Callable[[DbConnection], Awaitable[ReturnT]]) -> ReturnT:
        wire = self._connection or await self._connect()
        self._connection = None  # unless all goes well; whoever is cancelled leaves it half used
        try:
            answer = await work(wire)
        except BaseException:
            wire.terminate()
            raise
        self._connection = wire
        return answer

    async def close(self) -> None:
        wire, self._connection = self._connection, None
        if wire is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await wire.close()
        except (LedgerError, TimeoutError):
            wire.terminate()


class LedgerDatabase:
    """A lane for what is quick, and one for what may take long.

    A LedgerError may come after all of a change was made, and never after a part of it.
    """

    def __init__(self, factory: ConnectionFactory) -> None:
        self._factory = factory
        self._writer = ConnectionSlot(self._connect_and_migrate, WRITE_TIMEOUT)
        self._reader = ConnectionSlot(factory.connect, READ_TIMEOUT)
        self._is_migrated = False

    async def run_transaction(self, statements: Sequence[StatementRows]) -> None:
        """One transaction: each statement with each of its rows."""

        async def work(wire: DbConnection) -> None:
            await run_transaction(wire, (wire.begin_statement,), statements)

        await self._writer.run(work)

    async def execute(self, statement: str, row: Row = ()) -> list[Row]:
        """One statement that may change something."""
        return await self._writer.run(lambda wire: wire.fetch(statement, row))

    async def read(self, statement: str, row: Row = ()) -> list[Row]:
        """One that changes nothing and may take long; nobody who writes waits for it."""
        if not self._is_migrated:
            await self.execute(SELECT_VERSION)
        return await self._reader.run(lambda wire: wire.fetch(statement, row))

    async def close(self) -> None:
        await self._writer.close()
        await self._reader.close()
        await self._factory.wait_terminated()

    async def _connect_and_migrate(self) -> DbConnection:
        wire = await self._factory.connect()
        try:
            await self._migrate(wire)
        except BaseException:
            wire.terminate()
            raise
        self._is_migrated = True
        return wire

    async def _migrate(self, connection: DbConnection) -> None:
        """Brings the tables to the newest version. Whoever may not make any can still use them."""
        if await connection.fetch(
            connection.schema_exists_query
        ) and not await self._pending_migrations(connection):
            return
        for statement in connection.begin_exclusive:
            await connection.fetch(statement)
        await connection.fetch(CREATE_VERSION_TABLE)
        private = ((statement, NO_PARAMETERS) for statement in connection.privacy_statements)
        await run_transaction(
            connection, (), (*await self._pending_migrations(connection), *private)
        )

    async def _pending_migrations(self, connection: DbConnection) -> Sequence[StatementRows]:
        rows = await connection.fetch(SELECT_VERSION)
        return migration_statements(rows[0][0] if rows else 0, self._factory.display_name)


async def run_transaction(
    connection: DbConnection, begin_statements: Sequence[str], statements: Sequence[StatementRows]
) -> None:
    """A wire that fails before the end is dropped, which undoes the rest."""
    for statement in begin_statements:
        await connection.fetch(statement)
    for statement, rows in statements:
        await connection.execute_many(statement, rows)
    await connection.fetch("COMMIT")


def migration_statements(version: int, display_name: str) -> Sequence[StatementRows]:
    """What brings a ledger of this version to the newest. Raises: SchemaError."""
    newest = len(MIGRATIONS)
    if version > newest:
        raise SchemaError(
            f"{display_name} was written by a newer falproxy (version {version}, this one knows "
            f"{newest})."
            " Upgrade this one, or give it a ledger of its own."
        )
    if version == newest:
        return ()
    changes = [(each, NO_PARAMETERS) for part in MIGRATIONS[version:] for each in part]
    return (*changes, (DELETE_VERSION, NO_PARAMETERS), (INSERT_VERSION, ((newest,),)))
