"""Opening of SQLite files by several processes."""

import os
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from falproxy.stores.file_schema import FileSchema, open_database
from falproxy.stores.private_files import make_private_file
from falproxy.stores.sqlite_open import error_reason

SCHEMA = FileSchema(
    "PRAGMA journal_mode = WAL;", ("CREATE TABLE IF NOT EXISTS numbers (number INTEGER);",)
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "file.sqlite"


def test_a_missing_file_is_created_with_its_folder(file: Path) -> None:
    with closing(open_database(file, SCHEMA, 1.0)) as connection:
        connection.execute("INSERT INTO numbers VALUES (1)")
    with closing(open_database(file, SCHEMA, 1.0)) as connection:
        assert connection.execute("SELECT number FROM numbers").fetchall() == [(1,)]


def test_only_its_user_can_read_the_file(file: Path) -> None:
    with closing(open_database(file, SCHEMA, 1.0)) as connection:
        connection.execute("INSERT INTO numbers VALUES (1)")
        modes = {path.name: path.stat().st_mode & 0o777 for path in file.parent.iterdir()}
    assert modes == {file.name + suffix: 0o600 for suffix in ("", "-wal", "-shm")}


def test_concurrent_first_opens_all_succeed(file: Path) -> None:
    def open_and_insert(number: int) -> None:
        with closing(open_database(file, SCHEMA, 10.0)) as connection:
            connection.execute("INSERT INTO numbers VALUES (?)", (number,))

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(open_and_insert, range(8)))
    with closing(open_database(file, SCHEMA, 1.0)) as connection:
        assert connection.execute("SELECT count(*) FROM numbers").fetchone() == (8,)


def test_a_file_that_stays_locked_is_an_error_after_the_timeout(file: Path) -> None:
    file.parent.mkdir()
    with closing(sqlite3.connect(file, isolation_level=None)) as locker:
        locker.execute("BEGIN EXCLUSIVE")
        started_at = time.monotonic()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            open_database(file, SCHEMA, 0.1)
        assert time.monotonic() - started_at >= 0.1


def test_an_error_in_the_schema_is_not_repeated(file: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="syntax error"):
        open_database(file, FileSchema("", ("CREATE nonsense;",)), 60.0)


def test_a_file_that_is_not_a_database_is_an_error(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_database(file, SCHEMA, 60.0)


def test_a_file_is_never_readable_for_others_not_even_with_a_lax_umask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        file = tmp_path / "data" / "a.sqlite"
        make_private_file(file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        file.chmod(0o644)  # written by an older release
        make_private_file(file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    finally:
        os.umask(previous)


def test_a_second_connection_keeps_the_locks_of_the_first(file: Path) -> None:
    """Otherwise another process takes itself for the last user of the file, and deletes its WAL."""
    other = f"""
import sqlite3
connection = sqlite3.connect({str(file)!r})
connection.execute("INSERT INTO numbers VALUES (2)")
connection.commit()
connection.close()
"""
    with closing(open_database(file, SCHEMA, 1.0)) as connection:
        connection.execute("INSERT INTO numbers VALUES (1)")
        open_database(file, SCHEMA, 1.0).close()
        subprocess.run([sys.executable, "-c", other], check=True)
        assert file.with_name(f"{file.name}-wal").exists()
        connection.execute("INSERT INTO numbers VALUES (3)")
        with closing(open_database(file, SCHEMA, 1.0)) as second:
            rows = second.execute("SELECT number FROM numbers ORDER BY number").fetchall()
    assert rows == [(1,), (2,), (3,)]


def test_the_reason_of_an_error_has_no_path(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as error:
        make_private_file(tmp_path)
    assert error_reason(error.value) == "Is a directory"
