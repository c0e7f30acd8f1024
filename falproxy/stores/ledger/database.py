"""Connections to a ledger's database: opened as they are needed, dropped when they fail."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from falproxy.stores.ledger import LedgerError, SchemaError
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.statements import (
    MIGRATIONS,
    VERSION,
    VERSION_GONE,
    VERSION_NEW,
    VERSION_TABLE,
)

Answer = TypeVar("Answer")
Step = tuple[str, Sequence[Row]]

# Seconds that something may take, with waiting for its turn and for a connection. Who asks for
# sums over a year of calls waits longer.
WRITE_PATIENCE = 5.0
READ_PATIENCE = 30.0
CLOSE_PATIENCE = 1.0
ONCE: tuple[Row, ...] = ((),)


class Wire(Protocol):
    """One connection. Its methods raise LedgerError; one that did is dropped.

    begins: starts a transaction that writes. begins_alone: starts one that no other process may
    change tables beside. has_version: a query with a row where there is a ledger already.
    keeps_private: what is said of new tables, so that nobody else reads them.
    """

    begins: str
    begins_alone: tuple[str, ...]
    has_version: str
    keeps_private: tuple[str, ...]

    async def fetch(self, statement: str, row: Row = ()) -> list[Row]: ...

    async def many(self, statement: str, rows: Sequence[Row]) -> None: ...

    async def close(self) -> None: ...

    def drop(self) -> None:
        """Ends it at once, with whatever is under way. Nothing is left half done."""


class Opener(Protocol):
    """The way to one database. where: its name for a person."""

    where: str

    async def open(self) -> Wire:
        """Raises: LedgerError."""

    async def ended(self) -> None:
        """Returns when nothing is left of the wires that were dropped."""


class Lane:
    """One connection that is used by one at a time."""

    def __init__(self, open_wire: Callable[[], Awaitable[Wire]], patience: float) -> None:
        self._open = open_wire
        self._patience = patience
        self._turn = asyncio.Lock()
        self._wire: Wire | None = None

    async def use(self, work: Callable[[Wire], Awaitable[Answer]]) -> Answer:
        """What `work` returns. Raises: LedgerError."""
        try:
            async with asyncio.timeout(self._patience), self._turn:
                return await self._use(work)
        except TimeoutError as error:
            raise LedgerError("the ledger does not answer in time") from error

    async def _use(self, work: Callable[[Wire], Awaitable[Answer]]) -> Answer:
        wire = self._wire or await self._open()
        self._wire = None  # unless all goes well; whoever is cancelled leaves it half used
        try:
            answer = await work(wire)
        except BaseException:
            wire.drop()
            raise
        self._wire = wire
        return answer

    async def close(self) -> None:
        wire, self._wire = self._wire, None
        if wire is None:
            return
        try:
            async with asyncio.timeout(CLOSE_PATIENCE):
                await wire.close()
        except (LedgerError, TimeoutError):
            wire.drop()


class Database:
    """A lane for what is quick, and one for what may take long.

    A LedgerError may come after all of a change was made, and never after a part of it.
    """

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._writer = Lane(self._open_newest, WRITE_PATIENCE)
        self._reader = Lane(opener.open, READ_PATIENCE)
        self._is_newest = False

    async def change(self, steps: Sequence[Step]) -> None:
        """One transaction: each statement with each of its rows."""

        async def work(wire: Wire) -> None:
            await transact(wire, (wire.begins,), steps)

        await self._writer.use(work)

    async def ask(self, statement: str, row: Row = ()) -> list[Row]:
        """One statement that may change something."""
        return await self._writer.use(lambda wire: wire.fetch(statement, row))

    async def read(self, statement: str, row: Row = ()) -> list[Row]:
        """One that changes nothing and may take long; nobody who writes waits for it."""
        if not self._is_newest:
            await self.ask(VERSION)
        return await self._reader.use(lambda wire: wire.fetch(statement, row))

    async def close(self) -> None:
        await self._writer.close()
        await self._reader.close()
        await self._opener.ended()

    async def _open_newest(self) -> Wire:
        wire = await self._opener.open()
        try:
            await self._migrate(wire)
        except BaseException:
            wire.drop()
            raise
        self._is_newest = True
        return wire

    async def _migrate(self, wire: Wire) -> None:
        """Brings the tables to the newest version. Whoever may not make any can still use them."""
        if await wire.fetch(wire.has_version) and not await self._steps(wire):
            return
        for statement in wire.begins_alone:
            await wire.fetch(statement)
        await wire.fetch(VERSION_TABLE)
        private = ((statement, ONCE) for statement in wire.keeps_private)
        await transact(wire, (), (*await self._steps(wire), *private))

    async def _steps(self, wire: Wire) -> Sequence[Step]:
        rows = await wire.fetch(VERSION)
        return steps_from(rows[0][0] if rows else 0, self._opener.where)


async def transact(wire: Wire, begins: Sequence[str], steps: Sequence[Step]) -> None:
    """A wire that fails before the end is dropped, which undoes the rest."""
    for statement in begins:
        await wire.fetch(statement)
    for statement, rows in steps:
        await wire.many(statement, rows)
    await wire.fetch("COMMIT")


def steps_from(version: int, where: str) -> Sequence[Step]:
    """What brings a ledger of this version to the newest. Raises: SchemaError."""
    newest = len(MIGRATIONS)
    if version > newest:
        raise SchemaError(
            f"{where} was written by a newer falproxy (version {version}, this one knows {newest})."
            " Upgrade this one, or give it a ledger of its own."
        )
    if version == newest:
        return ()
    changes = [(each, ONCE) for part in MIGRATIONS[version:] for each in part]
    return (*changes, (VERSION_GONE, ONCE), (VERSION_NEW, ((newest,),)))
