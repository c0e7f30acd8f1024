"""Files of SQLite that several processes open at the same moment."""

import sqlite3
import time

BUSY_RETRY_INTERVAL = 0.01  # seconds


def run_schema(connection: sqlite3.Connection, script: str, timeout: float) -> None:
    """Runs what a file begins with. Of several processes that are the first, SQLite has one do so
    and tells the others at once that it is locked, however long they would wait. Blocks.

    patience: seconds. Raises: sqlite3.Error.
    """
    until = time.monotonic() + timeout
    while True:
        try:
            connection.executescript(script)
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > until:
                raise
            time.sleep(BUSY_RETRY_INTERVAL)
        else:
            return
