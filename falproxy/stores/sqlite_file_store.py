"""The base of stores in an SQLite file that all workers of a machine share."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

from falproxy.stores.file_schema import FileSchema, open_database
from falproxy.stores.operation_groups import Failure, OperationGroups
from falproxy.stores.sqlite_open import error_reason, is_busy, primary_code

Params = ParamSpec("Params")
ReturnT = TypeVar("ReturnT")

BUSY_TIMEOUT = 2.0  # seconds to wait for a lock of another worker
SWEEP_INTERVAL = 1.0  # seconds between deletions of expired rows
SWEEP_BATCH_SIZE = 20  # expired rows of each table that are deleted for one operation
# The file can still be read after these errors of a write.
WRITE_ERRORS = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)
VALUE_ERRORS = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)


@dataclass(frozen=True, slots=True, eq=False)
class FileOperation:
    """One operation on the file.

    work: gets the connection, the time of the transaction, and args.
    busy_count: of the store, when the operation was added.
    """

    work: Callable[..., Any]
    args: tuple[Any, ...]
    is_write: bool
    busy_count: int


class SqliteFileStore:
    """A store with one connection, in a thread of its own. The file is opened by the first
    operation, and again after a failure.

    Operations that wait at the same time are one transaction: all of them end when it is on the
    disk. An operation that fails does so alone. If another process holds the lock for too long, all
    writes that wait for it fail.

    clock: seconds since 1970.

    Subclasses define:
        schema: versions of the file and the statements that create its tables.
        tables: those whose rows expire at the time in their column `kept_until`.
        error_type: raised for all errors of SQLite.
        busy_timeout: seconds to wait for a lock of another worker.
    """

    schema: ClassVar[FileSchema]
    tables: ClassVar[tuple[str, ...]]
    error_type: ClassVar[type[Exception]]
    busy_timeout: ClassVar[float] = BUSY_TIMEOUT

    def __init__(self, file: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._groups: OperationGroups[FileOperation] = OperationGroups(self._start_group)
        self._executor = ThreadPoolExecutor(1, file.stem)
        self._has_thread = False  # the first operation starts it
        self._connection: sqlite3.Connection | None = None
        self._busy_count = 0  # groups that found the file locked
        self._swept_at = float("-inf")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._file}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._groups.wait_started()
        if self._has_thread:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown(wait=False)

    def _write(
        self,
        work: Callable[Concatenate[sqlite3.Connection, float, Params], ReturnT],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> "asyncio.Future[ReturnT]":
        """Return the result of `work`, which gets the time of its transaction. Raises:
        `error_type`."""
        assert not kwargs
        return self._groups.add(FileOperation(work, args, True, self._busy_count))

    def _read(
        self,
        work: Callable[Concatenate[sqlite3.Connection, float, Params], ReturnT],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> "asyncio.Future[ReturnT]":
        """Return the result of `work`, which changes nothing. Raises: `error_type`."""
        assert not kwargs
        return self._groups.add(FileOperation(work, args, False, self._busy_count))

    def _start_group(
        self, operations: Sequence[FileOperation]
    ) -> "asyncio.Future[Sequence[object]]":
        self._has_thread = True
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self._executor, self._run_group, operations)
        except RuntimeError as error:  # of an executor that has been shut down
            raise self._translate("it is closed", error) from error

    # The methods below run in the file's thread.

    def _run_group(self, operations: Sequence[FileOperation]) -> Sequence[object]:
        """Return the outcomes of operations. Reads see all writes of their group."""
        outcomes: dict[FileOperation, object] = {}
        writes = [one for one in operations if one.is_write]
        for one in writes:
            if one.busy_count != self._busy_count:  # while this operation was waiting
                outcomes[one] = Failure(self._translate("it is locked"))
        writes = [one for one in writes if one not in outcomes]
        outcomes.update(zip(writes, self._write_together(writes), strict=True))
        for one in operations:
            if not one.is_write:
                outcomes[one] = self._read_alone(one)
        return [outcomes[one] for one in operations]

    def _write_together(self, writes: Sequence[FileOperation]) -> list[object]:
        """Return the outcomes of operations in one transaction; if one of them fails, each in one
        of its own."""
        if not writes:
            return []
        try:
            connection = self._connect()
            with self._transaction(connection, len(writes)) as now:
                return self._run_writes(connection, now, writes)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and is_busy(error):
                self._busy_count += 1
            if len(writes) == 1 or concerns_all(error):
                return [self._on_error(error) for _ in writes]
        return [outcome for one in writes for outcome in self._write_together([one])]

    def _run_writes(
        self, connection: sqlite3.Connection, now: float, writes: Sequence[FileOperation]
    ) -> list[object]:
        """Return the results of operations, within their transaction."""
        return [one.work(connection, now, *one.args) for one in writes]

    def _read_alone(self, read: FileOperation) -> object:
        try:
            return read.work(self._connect(), self._clock(), *read.args)
        except Exception as error:
            return self._on_error(error)

    def _on_error(self, error: Exception) -> Failure:
        """Return the outcome of an operation. After an error of the file, it is opened again."""
        if not isinstance(error, sqlite3.Error | OSError):
            return Failure(error)
        if isinstance(error, OSError) or primary_code(error) not in WRITE_ERRORS:
            self._close()
        return Failure(self._translate(error_reason(error), error))

    def _translate(self, reason: str, error: Exception | None = None) -> Exception:
        translated = self.error_type(f"{self._file.name} cannot be used: {reason}")
        translated.__cause__ = error
        return translated

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = open_database(self._file, self.schema, self.busy_timeout)
        return self._connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # the file may be corrupt
                connection.close()

    @contextmanager
    def _transaction(self, connection: sqlite3.Connection, operations: int) -> Iterator[float]:
        """Context: a transaction that holds the write lock from its start. Yield its time."""
        with connection:  # commits, or rolls back
            connection.execute("BEGIN IMMEDIATE")
            now = self._clock()
            if not self._swept_at <= now < self._swept_at + SWEEP_INTERVAL:
                self._sweep(connection, now, SWEEP_BATCH_SIZE * operations)
            yield now

    def _sweep(self, connection: sqlite3.Connection, now: float, limit: int) -> None:
        """Delete expired rows, at most `limit` of each table. The next transaction goes on if there
        may be more."""
        self._swept_at = now
        for table in self.tables:
            statement = (
                f"DELETE FROM {table} WHERE rowid IN"
                f" (SELECT rowid FROM {table} WHERE kept_until <= ? LIMIT ?)"
            )
            if connection.execute(statement, (now, limit)).rowcount == limit:
                self._swept_at = float("-inf")


def concerns_all(error: Exception) -> bool:
    """Return whether an error is one of the file, and not of the values of one operation."""
    return isinstance(error, sqlite3.Error | OSError) and not isinstance(error, VALUE_ERRORS)
