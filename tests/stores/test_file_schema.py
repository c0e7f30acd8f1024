"""Versions of SQLite files: files of older and of newer releases."""

import re
import sqlite3
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

import falproxy
from falproxy.stores.cache import (
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    RequestOwner,
    SharedOutcome,
    StoreError,
    VirtualRequest,
)
from falproxy.stores.cache.sqlite import SqliteStore
from falproxy.stores.cache.sqlite_owners import SCHEMA as OWNERS_SCHEMA
from falproxy.stores.cache.sqlite_owners import SqliteOwnerStore
from falproxy.stores.cache.sqlite_schema import SCHEMA as RESULTS_SCHEMA
from falproxy.stores.file_schema import (
    FileSchema,
    IncompatibleFileError,
    open_database,
    read_version,
    split_script,
)
from falproxy.stores.idempotency import BeginReply, IdempotencyStoreError
from falproxy.stores.idempotency.sqlite import SCHEMA as IDEMPOTENCY_SCHEMA
from falproxy.stores.idempotency.sqlite import SqliteIdempotencyStore
from falproxy.stores.limits import Limit, LimitsError, ReserveRequest
from falproxy.stores.limits.sqlite import SCHEMA as LIMITS_SCHEMA
from falproxy.stores.limits.sqlite import SqliteLimitsStore
from falproxy.windows import WINDOWS

SCHEMA = FileSchema(
    "PRAGMA journal_mode = WAL;", ("CREATE TABLE IF NOT EXISTS numbers (number INTEGER NOT NULL);",)
)
OLD_NUMBERS = "CREATE TABLE numbers (number INTEGER NOT NULL); INSERT INTO numbers VALUES (1)"
NEWER = replace(
    SCHEMA,
    migrations=(
        *SCHEMA.migrations,
        """
        ALTER TABLE numbers ADD COLUMN name TEXT NOT NULL DEFAULT 'a;b';
        CREATE TABLE names (name TEXT PRIMARY KEY);
        CREATE TRIGGER named AFTER INSERT ON numbers
            BEGIN INSERT OR IGNORE INTO names (name) VALUES (new.name); END;
        INSERT INTO names (name) SELECT name FROM numbers;
        """,
    ),
)
INCOMPATIBLE = replace(NEWER, min_reader=2)
# The tables of results before the headers of failures and the outcomes of shared calls.
OLD_RESULTS = """
    CREATE TABLE results (
        key TEXT PRIMARY KEY, content_type TEXT NOT NULL, stored_at REAL NOT NULL,
        expires_at REAL NOT NULL, used_at REAL NOT NULL, size INTEGER NOT NULL, body BLOB NOT NULL
    );
    CREATE INDEX results_by_expiry ON results (expires_at);
    CREATE INDEX results_by_use ON results (used_at);
    CREATE TABLE total (one INTEGER PRIMARY KEY CHECK (one = 1), size INTEGER);
    INSERT INTO total VALUES (1, 0);
    CREATE TRIGGER result_added AFTER INSERT ON results
        BEGIN UPDATE total SET size = size + new.size; END;
    CREATE TRIGGER result_removed AFTER DELETE ON results
        BEGIN UPDATE total SET size = size - old.size; END;
    CREATE TABLE flights (
        key TEXT PRIMARY KEY, token TEXT NOT NULL, is_run INTEGER NOT NULL,
        leads_until REAL NOT NULL, kept_until REAL NOT NULL,
        job_id TEXT, job_app TEXT, job_key_mark TEXT
    );
    CREATE TABLE holders (
        key TEXT NOT NULL, holder TEXT NOT NULL, PRIMARY KEY (key, holder)
    ) WITHOUT ROWID;
    CREATE TABLE claims (
        request_id TEXT PRIMARY KEY, kept_until REAL NOT NULL, key TEXT NOT NULL,
        owner TEXT NOT NULL, app TEXT NOT NULL, is_cancelled INTEGER NOT NULL,
        job_id TEXT, job_app TEXT, job_key_mark TEXT,
        failure_status INTEGER, failure_type TEXT, failure_body BLOB
    );
    CREATE TABLE changes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, teller TEXT NOT NULL
    );
    INSERT INTO results VALUES ('old', 'application/json', 1e9, 1e11, 1e9, 2, '{}');
    INSERT INTO claims (request_id, kept_until, key, owner, app, is_cancelled)
        VALUES ('id', 1e11, 'old', 'ann', 'fal-ai/flux', 0);
"""
OLD_OWNERS = """
    CREATE TABLE submissions (
        request_id TEXT PRIMARY KEY, {owner} TEXT NOT NULL, key_mark TEXT NOT NULL,
        submitted_at REAL NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO submissions VALUES ('id', 'ann', 'mark', unixepoch());
"""
LIMIT = Limit("concurrency", "principal:ann", 5)
RESULT = CachedResult(b"{}", "application/json", 1e9, 1e11)
OWNER = RequestOwner("ann", "mark")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "results.sqlite"


def write_script(file: Path, script: str) -> None:
    file.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.executescript(f"PRAGMA journal_mode = WAL; {script}")


def read_rows(file: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(query).fetchall()


def tables_of(file: Path) -> list[str]:
    rows = read_rows(file, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    return [str(name) for (name,) in rows]


# Migrations


def test_a_file_without_a_version_gets_one_and_keeps_its_rows(file: Path) -> None:
    write_script(
        file, "CREATE TABLE numbers (number INTEGER NOT NULL); INSERT INTO numbers VALUES (1)"
    )
    with closing(open_database(file, SCHEMA, 1.0)) as connection:
        assert read_version(connection) == (1, 1)
        assert connection.execute("SELECT number FROM numbers").fetchall() == [(1,)]


def test_a_file_is_migrated_step_by_step_and_once(file: Path) -> None:
    with closing(open_database(file, SCHEMA, 1.0)) as connection:
        connection.execute("INSERT INTO numbers (number) VALUES (1)")
    for _ in range(2):
        with closing(open_database(file, NEWER, 1.0)) as connection:
            assert read_version(connection) == (2, 1)
            assert connection.execute("SELECT * FROM numbers").fetchall() == [(1, "a;b")]
            assert connection.execute("SELECT * FROM names").fetchall() == [("a;b",)]


def test_processes_that_open_an_old_file_at_once_migrate_it_once(file: Path) -> None:
    open_database(file, SCHEMA, 1.0).close()

    def open_and_insert(number: int) -> None:
        with closing(open_database(file, NEWER, 10.0)) as connection:
            connection.execute("INSERT INTO numbers (number) VALUES (?)", (number,))

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(open_and_insert, range(8)))
    assert read_rows(file, "SELECT count(*) FROM numbers") == [(8,)]


def test_a_migration_that_fails_changes_nothing(file: Path) -> None:
    open_database(file, SCHEMA, 1.0).close()
    failing = replace(NEWER, migrations=(*NEWER.migrations, "CREATE TABLE t (a); SELECT nonsense;"))
    with pytest.raises(sqlite3.OperationalError, match="nonsense"):
        open_database(file, failing, 1.0)
    assert tables_of(file) == ["falproxy_version", "numbers"]
    assert read_rows(file, "SELECT * FROM falproxy_version") == [(1, 1)]


def test_an_older_version_works_with_a_newer_file_and_leaves_its_version(file: Path) -> None:
    with closing(open_database(file, NEWER, 1.0)) as newer:
        with closing(open_database(file, SCHEMA, 1.0)) as older:
            older.execute("INSERT INTO numbers (number) VALUES (1)")
        assert newer.execute("SELECT number, name FROM numbers").fetchall() == [(1, "a;b")]
        assert read_version(newer) == (2, 1)


def test_a_newer_file_that_an_older_version_cannot_use_is_an_error(file: Path) -> None:
    open_database(file, INCOMPATIBLE, 1.0).close()
    with pytest.raises(IncompatibleFileError, match=r"newer falproxy \(version 2, .* upgrade"):
        open_database(file, SCHEMA, 1.0)
    open_database(file, INCOMPATIBLE, 1.0).close()


@pytest.mark.parametrize(
    "columns",
    ["other INTEGER", "number INTEGER, name TEXT NOT NULL", "Number INTEGER, number2 INTEGER"],
    ids=["missing", "required", "another name"],
)
@pytest.mark.parametrize("version", ["", "1, 1", "2, 1"])
def test_tables_with_other_columns_are_an_error_at_once(
    file: Path, columns: str, version: str
) -> None:
    write_script(file, f"CREATE TABLE numbers ({columns})")
    if version:
        write_script(
            file,
            "CREATE TABLE falproxy_version (version INTEGER NOT NULL, min_reader INTEGER NOT NULL);"
            f"INSERT INTO falproxy_version VALUES ({version})",
        )
    started_at = time.monotonic()
    with pytest.raises(IncompatibleFileError, match="move the file away"):
        open_database(file, SCHEMA, 60.0)
    assert time.monotonic() - started_at < 10
    assert "numbers" in tables_of(file)


def test_an_old_file_that_cannot_be_written_can_be_read(file: Path) -> None:
    write_script(
        file, "CREATE TABLE numbers (number INTEGER NOT NULL); INSERT INTO numbers VALUES (1)"
    )
    read_only = replace(SCHEMA, pragmas="PRAGMA query_only = 1;")
    with closing(open_database(file, read_only, 1.0)) as connection:
        assert connection.execute("SELECT number FROM numbers").fetchall() == [(1,)]


def test_a_script_is_split_between_statements_only() -> None:
    script = NEWER.migrations[1]
    statements = [statement.split()[0] for statement in split_script(script)]
    assert statements == ["ALTER", "CREATE", "CREATE", "INSERT"]
    with pytest.raises(ValueError, match="not complete"):
        list(split_script("CREATE TRIGGER a AFTER INSERT ON b BEGIN SELECT 1;"))


# Files of older releases


async def test_results_of_an_older_release_are_used(file: Path) -> None:
    write_script(file, OLD_RESULTS)
    async with SqliteStore(file, max_size=10**6) as store:
        assert (await store.get("old")).result is not None
        assert await store.get_virtual_request("id") == VirtualRequest("old", "ann", "fal-ai/flux")
        await store.finish("k", "a", RESULT, SharedOutcome(b"{}"))
        assert await store.get("k") == Lookup(RESULT)
    assert read_rows(file, "SELECT size FROM total") == [(4,)]


@pytest.mark.parametrize("owner", ["owner", "principal"])
async def test_owners_of_an_older_release_are_used(file: Path, owner: str) -> None:
    write_script(file, OLD_OWNERS.format(owner=owner))
    store = SqliteOwnerStore(file)
    await store.put_owner("new", OWNER)
    assert [await store.get_owner(name) for name in ("id", "new")] == [OWNER, OWNER]
    await store.close()


# Files of newer releases


async def use_results(file: Path) -> None:
    async with SqliteStore(file, max_size=10**6) as store:
        await store.probe()
        key = uuid4().hex
        await store.acquire(key, AcquireRequest("a", 10.0, is_run=False))
        assert await store.record_job(key, "a", Job("job", "fal-ai/flux"))
        await store.finish(key, "a", RESULT)
        assert await store.get(key) == Lookup(RESULT)
        await store.acquire("run", AcquireRequest("a", 10.0, is_run=True))
        await store.finish("run", "a", None, SharedOutcome(b"{}"))
        request = VirtualRequest(key, "ann", "fal-ai/flux")
        await store.put_virtual_request("id", request)
        assert await store.get_virtual_request("id") == request


async def use_owners(file: Path) -> None:
    store = SqliteOwnerStore(file)
    try:
        await store.check_owners_writable()
        await store.put_owner("id", OWNER)
        assert await store.get_owner("id") == OWNER
    finally:
        await store.close()


async def use_idempotency(file: Path) -> None:
    key = uuid4().hex
    async with SqliteIdempotencyStore(file) as store:
        assert await store.begin(key, "digest", "token", 60.0) == BeginReply("started")
        assert await store.mark_sent(key, "token", 60.0)
        assert await store.finish(key, "token", b"outcome")
        assert await store.begin(key, "digest", "b", 60.0) == BeginReply("done", b"outcome")


async def use_limits(file: Path) -> None:
    limits = [
        LIMIT,
        Limit("rate", "principal:ann", 50, WINDOWS["minute"]),
        Limit("budget", "principal:ann", 5000, WINDOWS["day"]),
    ]
    async with SqliteLimitsStore(file) as store:
        token = uuid4().hex
        admission = await store.reserve(ReserveRequest(token, limits, 10, 60.0))
        assert admission.refused is None
        assert await store.attach(token, "id", "{}", 60.0)
        assert await store.settle(token, 5)


USES = {
    "results": (RESULTS_SCHEMA, use_results, StoreError),
    "owners": (OWNERS_SCHEMA, use_owners, StoreError),
    "idempotency": (IDEMPOTENCY_SCHEMA, use_idempotency, IdempotencyStoreError),
    "limits": (LIMITS_SCHEMA, use_limits, LimitsError),
}
Use = Callable[[Path], Awaitable[None]]


def newer_than(schema: FileSchema) -> FileSchema:
    """Return a schema whose tables have one more column each, in two ways, and one more table."""
    with closing(sqlite3.connect(":memory:")) as connection:
        for script in schema.migrations:
            connection.executescript(script)
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        tables = [name for (name,) in connection.execute(query)]
    changes = [
        f"ALTER TABLE {table} ADD COLUMN later TEXT;"
        f"ALTER TABLE {table} ADD COLUMN latest INTEGER NOT NULL DEFAULT 1;"
        for table in tables
    ]
    migration = "\n".join([*changes, "CREATE TABLE later (name TEXT PRIMARY KEY);"])
    return replace(schema, migrations=(*schema.migrations, migration))


@pytest.mark.parametrize("name", USES)
async def test_a_store_works_with_the_file_of_a_newer_release(file: Path, name: str) -> None:
    schema, use, _ = USES[name]
    await use(file)
    with closing(open_database(file, newer_than(schema), 1.0)) as newer:
        await use(file)
        assert read_version(newer) == (schema.version + 1, schema.min_reader)


async def test_a_newer_results_file_that_cannot_be_used_is_replaced(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = replace(newer_than(RESULTS_SCHEMA), min_reader=RESULTS_SCHEMA.version + 1)
    open_database(file, newer, 1.0).close()
    await use_results(file)
    await use_results(file)
    assert file.with_name("results.sqlite.old").exists()
    assert caplog.text.count("is of another version of falproxy") == 1


@pytest.mark.parametrize("columns", ["key TEXT PRIMARY KEY", "key TEXT PRIMARY KEY, other TEXT"])
async def test_a_results_file_with_other_columns_is_replaced(file: Path, columns: str) -> None:
    write_script(file, f"CREATE TABLE results ({columns})")
    await use_results(file)
    assert file.with_name("results.sqlite.old").exists()


@pytest.mark.parametrize("name", ["owners", "idempotency", "limits"])
async def test_a_newer_file_that_must_not_be_lost_is_not_touched(file: Path, name: str) -> None:
    schema, use, error_type = USES[name]
    newer = replace(newer_than(schema), min_reader=schema.version + 1)
    open_database(file, newer, 1.0).close()
    before = tables_of(file)
    with pytest.raises(error_type, match=r"newer falproxy .* upgrade this one, or move the file"):
        await use(file)
    assert tables_of(file) == before
    assert [path.name for path in file.parent.iterdir() if path.suffix == ".old"] == []


def test_statements_name_the_columns_that_they_write() -> None:
    """Otherwise they fail when a newer version has added a column."""
    for module in (Path(falproxy.__file__).parent / "stores").rglob("*.py"):
        inserts = re.findall(
            r"INTO (?!total\b)\w+\s+(?:VALUES|SELECT).*", module.read_text("utf-8")
        )
        assert inserts == [], module
