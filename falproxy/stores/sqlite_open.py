"""Opening of SQLite files that several processes share."""

import sqlite3
from pathlib import Path

from falproxy.stores.private_files import make_private_file


def connect_file(file: Path, busy_timeout: float) -> sqlite3.Connection:
    """Open a file that only its user can read; SQLite gives `-wal` and `-shm` the same mode. The
    connection is in autocommit mode. Blocks.

    busy_timeout: seconds to wait for a lock of another process.
    Raises: sqlite3.Error, OSError.
    """
    make_private_file(file)
    return sqlite3.connect(file, timeout=busy_timeout, isolation_level=None)


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
