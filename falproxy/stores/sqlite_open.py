"""Files of SQLite that several processes open at the same moment."""

import sqlite3
import time

AGAIN = 0.01  # seconds


def begin(connection: sqlite3.Connection, script: str, patience: float) -> None:
    """Runs what a file begins with. Of several processes that are the first, SQLite has one do so
    and tells the others at once that it is locked, however long they would wait. Blocks.

    patience: seconds. Raises: sqlite3.Error.
    """
    until = time.monotonic() + patience
    while True:
        try:
            connection.executescript(script)
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > until:
                raise
            time.sleep(AGAIN)
        else:
            return
