"""The base of stores in an SQLite file that all workers of a machine share."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Concatenate, ParamSpec, Self, TypeVar

from falproxy.stores.sqlite_open import open_database

Params = ParamSpec("Params")
ReturnT = TypeVar("ReturnT")

BUSY_TIMEOUT = 2.0  # seconds to wait for a lock of another worker
SWEEP_BATCH_SIZE = 20  # expired rows of each table that one transaction deletes


class SqliteFileStore:
    """A store with one connection, in a thread of its own. The file is opened by the first
    operation, and again after a failure.

    clock: seconds since 1970.

    Subclasses define:
        schema: statements that create the missing tables.
        tables: those whose rows expire at the time in their column `kept_until`.
        error_type: raised for all errors of SQLite.
    """

    schema: ClassVar[str]
    tables: ClassVar[tuple[str, ...]]
    error_type: ClassVar[type[Exception]]

    def __init__(self, file: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._executor = ThreadPoolExecutor(1, file.stem)
        self._connection: sqlite3.Connection | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._file}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown()

    def _run(
        self,
        work: Callable[Concatenate[sqlite3.Connection, Params], ReturnT],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> "asyncio.Future[ReturnT]":
        """Return the result of `work`, which runs in the file's thread after earlier work. Raises:
        `error_type`."""

        def attempt() -> ReturnT:
            try:
                if self._connection is None:
                    self._connection = open_database(self._file, self.schema, BUSY_TIMEOUT)
                return work(self._connection, *args, **kwargs)
            except (sqlite3.Error, OSError) as error:
                self._close()
                raise self.error_type(f"{self._file} cannot be used: {error}") from error

        return asyncio.get_running_loop().run_in_executor(self._executor, attempt)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    @contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[float]:
        """Context: a transaction that holds the write lock from its start. Yield its time."""
        with connection:  # commits, or rolls back
            connection.execute("BEGIN IMMEDIATE")
            now = self._clock()
            for table in self.tables:
                connection.execute(
                    f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table}"
                    f" WHERE kept_until <= ? LIMIT {SWEEP_BATCH_SIZE})",
                    (now,),
                )
            yield now
