"""Opening of SQLite files that several processes share."""

import sqlite3
import time
from pathlib import Path

from falproxy.stores.private_files import make_private_file

BUSY_RETRY_INTERVAL = 0.01  # seconds


def open_database(file: Path, schema: str, busy_timeout: float) -> sqlite3.Connection:
    """Open a file, created with its folder if missing, and run its schema. Blocks.

    Parameters and errors as in `connect_file` and `run_schema`.
    """
    connection = connect_file(file, busy_timeout)
    try:
        run_schema(connection, schema, busy_timeout)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_file(file: Path, busy_timeout: float) -> sqlite3.Connection:
    """Open a file that only its user can read; SQLite gives `-wal` and `-shm` the same mode. The
    connection is in autocommit mode. Blocks.

    busy_timeout: seconds to wait for a lock of another process.
    Raises: sqlite3.Error, OSError.
    """
    make_private_file(file)
    return sqlite3.connect(file, timeout=busy_timeout, isolation_level=None)


def run_schema(connection: sqlite3.Connection, script: str, busy_timeout: float) -> None:
    """Run the script that creates the tables. Blocks.

    Several processes may open a new file at once. SQLite then lets one switch to WAL and fails the
    others immediately, without regard to the connection's time-out: the script is repeated.

    busy_timeout: seconds.
    Raises: sqlite3.Error.
    """
    deadline = time.monotonic() + busy_timeout
    while True:
        try:
            connection.executescript(script)
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(BUSY_RETRY_INTERVAL)
        else:
            return


def error_reason(error: Exception) -> str:
    """Return why a file cannot be used, without its path."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code, which is the lowest byte of an extended one; 0 for an
    error that SQLite did not report."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def is_busy(error: sqlite3.Error) -> bool:
    """Return True if another process holds a lock."""
    return primary_code(error) == sqlite3.SQLITE_BUSY
