"""Opening of SQLite files by several processes."""

import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from falproxy.stores.sqlite_open import open_database

SCHEMA = """
    PRAGMA journal_mode = WAL;
    CREATE TABLE IF NOT EXISTS numbers (number INTEGER);
"""


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
        open_database(file, "CREATE nonsense", 60.0)


def test_a_file_that_is_not_a_database_is_an_error(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_database(file, SCHEMA, 60.0)
