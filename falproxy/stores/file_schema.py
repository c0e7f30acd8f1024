"""Tables of an SQLite file, and their versions.

Processes of two versions use the same file while one is replaced by the other, and after a
roll-back. The rules are those of `ledger.schema`: a migration adds what older versions may leave
out, or raises `min_reader`. Statements name the columns they write, since there may be more.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from falproxy.stores.sqlite_open import connect_file, is_busy, primary_code

BUSY_RETRY_INTERVAL = 0.01  # seconds
VERSION_TABLE = "falproxy_version"
CREATE_VERSION_TABLE = f"""
    CREATE TABLE IF NOT EXISTS {VERSION_TABLE} (
        version INTEGER NOT NULL, min_reader INTEGER NOT NULL
    )
"""
SELECT_VERSION = f"SELECT version, min_reader FROM {VERSION_TABLE}"
DELETE_VERSION = f"DELETE FROM {VERSION_TABLE}"
INSERT_VERSION = f"INSERT INTO {VERSION_TABLE} (version, min_reader) VALUES (?, ?)"
NO_SPACE_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)


class IncompatibleFileError(sqlite3.DatabaseError):
    """This version cannot work with the tables of a file. The message has instructions."""


@dataclass(frozen=True, slots=True)
class FileSchema:
    """The tables of one kind of file.

    pragmas: script that runs whenever a connection is opened.
    migrations: scripts, each of which migrates a file by one version. Released ones are never
        changed. The first one creates what is missing: files of releases before the versions have
        the tables, but no version.
    min_reader: the oldest version that works with the newest one.
    convert: converts the tables of a file without a version, before the first migration.
    """

    pragmas: str
    migrations: tuple[str, ...]
    min_reader: int = 1
    convert: Callable[[sqlite3.Connection], None] | None = None

    @property
    def version(self) -> int:
        return len(self.migrations)


def open_database(file: Path, schema: FileSchema, busy_timeout: float) -> sqlite3.Connection:
    """Open a file, created with its folder if missing, and migrate it. Blocks.

    Parameters and errors as in `connect_file` and `prepare_file`.
    """
    connection = connect_file(file, busy_timeout)
    try:
        prepare_file(connection, schema, busy_timeout)
    except BaseException:
        connection.close()
        raise
    return connection


def prepare_file(connection: sqlite3.Connection, schema: FileSchema, busy_timeout: float) -> None:
    """Run the pragmas and the migrations that are missing. Blocks.

    Several processes may open a new file at once. SQLite then lets one switch to WAL and fails the
    others immediately, without regard to the connection's time-out: the pragmas are repeated.

    connection: in autocommit mode.
    busy_timeout: seconds.
    Raises: IncompatibleFileError, sqlite3.Error.
    """
    deadline = time.monotonic() + busy_timeout
    while True:
        try:
            connection.executescript(schema.pragmas)
            migrate(connection, schema)
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(BUSY_RETRY_INTERVAL)
        else:
            return


def migrate(connection: sqlite3.Connection, schema: FileSchema) -> None:
    version, min_reader = read_version(connection)
    if version > schema.version and min_reader > schema.version:
        raise IncompatibleFileError(
            f"it was written by a newer falproxy (version {version}, which works with version "
            f"{min_reader} or newer, this one supports {schema.version}); upgrade this one, or "
            "move the file away"
        )
    if version < schema.version:
        try:
            run_migrations(connection, schema)
        except sqlite3.OperationalError as error:
            if is_busy(error) or has_columns(connection, schema):
                # Files that cannot be written can still be read.
                if primary_code(error) not in NO_SPACE_CODES:
                    raise
                return
    if not has_columns(connection, schema):
        raise IncompatibleFileError(
            "its tables are not those of this version of falproxy; move the file away"
        )


def run_migrations(connection: sqlite3.Connection, schema: FileSchema) -> None:
    """Run the missing migrations in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Read again: another process may have been faster.
        version, _ = read_version(connection)
        if version == 0 and schema.convert is not None:
            schema.convert(connection)
        for script in schema.migrations[version:]:
            for statement in split_script(script):
                connection.execute(statement)
        if version < schema.version:
            connection.execute(CREATE_VERSION_TABLE)
            connection.execute(DELETE_VERSION)
            connection.execute(INSERT_VERSION, (schema.version, schema.min_reader))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def read_version(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the version of a file and its oldest reader, zeros for a file without a version."""
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    if connection.execute(query, (VERSION_TABLE,)).fetchone() is None:
        return 0, 0
    return connection.execute(SELECT_VERSION).fetchone() or (0, 0)


def split_script(script: str) -> Iterator[str]:
    """Yield the statements of a script. `executescript` would commit the transaction."""
    statement = ""
    for part in script.split(";")[:-1]:
        statement += f"{part};"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        raise ValueError("the last statement is not complete")


Columns = dict[str, dict[str, bool]]  # by table and name: whether inserts may leave it out


def columns_of(connection: sqlite3.Connection) -> Columns:
    tables = [
        name
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    return {
        table: {
            name: not is_required or default is not None
            for _, name, _, is_required, default, _ in connection.execute(
                f"PRAGMA table_info({table})"
            )
        }
        for table in tables
        if not table.startswith("sqlite_")
    }


@cache
def expected_columns(schema: FileSchema) -> Columns:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for script in schema.migrations:
            connection.executescript(script)
        return columns_of(connection)


def has_columns(connection: sqlite3.Connection, schema: FileSchema) -> bool:
    """Return whether the statements of this version work with the tables of a file: all columns
    exist, and others may be left out."""
    actual = columns_of(connection)
    return all(
        columns.keys() <= actual.get(table, {}).keys()
        and all(actual[table][name] for name in actual[table].keys() - columns.keys())
        for table, columns in expected_columns(schema).items()
    )
