"""Owners of queued requests, in memory, in the local file, and in a store that others share."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from falproxy.errors import TemporaryError
from falproxy.stores.cache import OWNER_RETENTION, RequestOwner, StoreContent, StoreError
from falproxy.stores.cache.circuit_breaker import SETTLE_SECONDS, StoreBreaker
from falproxy.stores.cache.sqlite_owners import (
    BUSY_TIMEOUT,
    RETRY_INTERVAL,
    SCHEMA,
    SWEEP_BATCH_SIZE,
    SqliteOwnerStore,
)
from falproxy.stores.file_schema import open_database
from falproxy.stores.ownership import (
    CACHE_MAX_BYTES,
    ENTRY_BYTES,
    LAST_WRITE_TIMEOUT,
    UNWRITTEN_MAX,
    RequestOwnership,
)
from tests.support.fake_clock import FakeClock
from tests.support.fake_store import FakeStore
from tests.support.waiting import wait_until

TIMEOUT = 5.0  # seconds; of `wait_until`

ANN = RequestOwner("ann", "mark")
BOB = RequestOwner("bob", "mark")
STORE_DOWN = StoreError("the store is down")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "submissions.sqlite"


@pytest.fixture
async def open_local(file: Path) -> AsyncIterator[Callable[[], RequestOwnership]]:
    """Open the ownership of one more process."""
    stores: list[SqliteOwnerStore] = []

    def open_local() -> RequestOwnership:
        stores.append(SqliteOwnerStore(file))
        return RequestOwnership(stores[-1])

    yield open_local
    for store in stores:
        await store.close()


OpenLocal = Callable[[], RequestOwnership]


async def assert_unavailable(ownership: RequestOwnership, request_id: str) -> None:
    with pytest.raises(TemporaryError) as error:
        await ownership.get(request_id, wait_for_store=False)
    assert (error.value.status, error.value.code) == (503, "store_unavailable")
    assert error.value.headers == {"Retry-After": "1"}


# --- The local file ---


async def test_an_added_owner_is_found(open_local: OpenLocal) -> None:
    ownership = open_local()
    await ownership.add("1", ANN)
    assert await ownership.get("1") == ANN
    assert await ownership.get("2") is None


async def test_another_process_finds_an_owner_at_once(open_local: OpenLocal) -> None:
    ownership, other = open_local(), open_local()
    await ownership.add("1", ANN)
    assert await other.get("1") == ANN


async def test_an_owner_is_in_the_file_before_add_returns(
    open_local: OpenLocal, file: Path
) -> None:
    await open_local().add("1", ANN)
    with closing(sqlite3.connect(file)) as connection:
        rows = connection.execute("SELECT request_id, owner, key_mark FROM submissions").fetchall()
    assert rows == [("1", "ann", "mark")]


async def test_the_first_owner_stays(open_local: OpenLocal) -> None:
    ownership, other = open_local(), open_local()
    await ownership.add("1", ANN)
    for process in (ownership, other):
        await process.add("1", BOB)
        assert await process.get("1") == ANN
    assert await open_local().get("1") == await ownership.get("1") == ANN


async def test_concurrent_processes_lose_no_owner(open_local: OpenLocal) -> None:
    processes = (open_local(), open_local())
    await asyncio.gather(*(processes[n % 2].add(str(n), ANN) for n in range(200)))
    assert [await processes[(n + 1) % 2].get(str(n)) for n in range(200)] == [ANN] * 200


async def test_an_owner_is_read_from_the_file_once(open_local: OpenLocal, file: Path) -> None:
    await open_local().add("1", ANN)
    ownership = open_local()
    await ownership.get("1")
    file.write_bytes(b"")
    assert [await ownership.get("1") for _ in range(3)] == [ANN] * 3


async def test_owners_of_an_earlier_version_are_found(open_local: OpenLocal, file: Path) -> None:
    file.parent.mkdir()
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.executescript("""
            PRAGMA journal_mode = WAL;
            CREATE TABLE submissions (
                request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, key_mark TEXT NOT NULL,
                submitted_at REAL NOT NULL
            ) WITHOUT ROWID;
            INSERT INTO submissions VALUES ('1', 'ann', 'mark', unixepoch());
        """)
    assert await open_local().get("1") == ANN


async def test_an_owner_is_deleted_when_fal_has_deleted_the_request(file: Path) -> None:
    clock = FakeClock(1e9)
    for age, expected in ((0, ANN), (OWNER_RETENTION - 1, ANN), (2, None)):
        clock.now += age
        store = SqliteOwnerStore(file, clock)
        if age == 0:
            await store.put_owner("1", ANN)
        assert await store.get_owner("1") == expected
        await store.close()


def count_owners(file: Path) -> int:
    with closing(sqlite3.connect(file)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM submissions").fetchone()
    return int(count)


async def test_expired_owners_are_deleted_while_the_file_is_open(file: Path) -> None:
    clock = FakeClock(1e9)
    store = SqliteOwnerStore(file, clock, retention=100.0)
    with closing(open_database(file, SCHEMA, 1.0)) as connection:
        rows = [(str(number), "ann", "", 1e9) for number in range(2 * SWEEP_BATCH_SIZE + 5)]
        connection.executemany("INSERT INTO submissions VALUES (?, ?, ?, ?)", rows)
    await store.put_owner("a", ANN)
    assert count_owners(file) == len(rows) + 1
    clock.now += 101.0
    for number, left in enumerate((SWEEP_BATCH_SIZE + 6, 6, 0)):
        await store.put_owner(f"later {number}", ANN)
        async with asyncio.timeout(TIMEOUT):  # it is deleted after the owner was stored
            while count_owners(file) != left + number + 1:
                await asyncio.sleep(0.01)
    assert await store.get_owner("a") is None
    await store.close()


async def test_an_expired_owner_is_replaced(file: Path) -> None:
    clock = FakeClock(1e9)
    store = SqliteOwnerStore(file, clock, retention=100.0)
    await store.put_owner("1", ANN)
    clock.now += 50
    await store.put_owner("1", RequestOwner("bob", ""))
    assert await store.get_owner("1") == ANN
    clock.now += 51
    assert await store.get_owner("1") is None
    await store.put_owner("1", RequestOwner("bob", ""))
    assert await store.get_owner("1") == RequestOwner("bob", "")
    await store.close()


@pytest.mark.parametrize("content", [b"no database" * 100, None], ids=["another file", "a folder"])
async def test_a_file_that_cannot_be_used_is_logged_and_skipped(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "s.sqlite"
    file.write_bytes(content) if content else file.mkdir()
    store = SqliteOwnerStore(file)
    ownership = RequestOwnership(store)
    await ownership.add("1", ANN)
    assert await ownership.get("1") == ANN
    await assert_unavailable(ownership, "2")
    await ownership.close()
    await store.close()
    assert caplog.text.count("request owners are lost at a restart") == 1


async def test_a_file_that_cannot_be_used_at_first_is_used_later(tmp_path: Path) -> None:
    clock, folder = FakeClock(1e9), tmp_path / "folder"
    folder.touch()  # a file in place of the folder
    store = SqliteOwnerStore(folder / "s.sqlite", clock)
    with pytest.raises(StoreError, match="cannot be used"):
        await store.get_owner("1")
    folder.unlink()
    with pytest.raises(StoreError, match="not used for now"):
        await store.get_owner("1")
    clock.now += RETRY_INTERVAL
    await RequestOwnership(store).add("1", ANN)
    await store.close()
    other = SqliteOwnerStore(folder / "s.sqlite", clock)
    assert await other.get_owner("1") == ANN
    await other.close()


async def test_only_its_user_can_read_the_file(open_local: OpenLocal, file: Path) -> None:
    await open_local().add("1", ANN)
    modes = {path.stat().st_mode & 0o777 for path in file.parent.iterdir()}
    assert modes == {0o600}


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Context: another process holds the write lock of the file."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


async def test_owners_are_written_after_a_lock_and_found_by_other_processes(
    open_local: OpenLocal, file: Path
) -> None:
    ownership, other = open_local(), open_local()
    await ownership.check()
    with locked(file):
        started = time.monotonic()
        await asyncio.gather(*(ownership.add(str(n), ANN) for n in range(20)))
        assert time.monotonic() - started < 2 * BUSY_TIMEOUT + 0.5, (
            "they wait for the lock together"
        )
        await assert_unavailable(other, "1")
        waiting = asyncio.create_task(other.get("2"))
        await asyncio.sleep(1.0)
    assert await waiting == ANN
    assert [await other.get(str(n)) for n in range(20)] == [ANN] * 20
    assert await other.get("unknown") is None
    await ownership.close()


async def test_owners_held_in_memory_are_written_at_the_stop(
    open_local: OpenLocal, file: Path
) -> None:
    ownership = open_local()
    await ownership.check()
    with locked(file):
        await ownership.add("1", ANN)
    await ownership.close()
    assert await open_local().get("1") == ANN


async def test_the_stop_does_not_wait_for_a_lock_for_ever(
    open_local: OpenLocal, file: Path
) -> None:
    ownership = open_local()
    await ownership.check()
    with locked(file):
        await ownership.add("1", ANN)
        async with asyncio.timeout(LAST_WRITE_TIMEOUT + 2):
            await ownership.close()


async def test_owners_that_a_full_disk_could_not_store_are_stored_later(
    open_local: OpenLocal, file: Path
) -> None:
    ownership, other = open_local(), open_local()
    await ownership.add("0", ANN)
    for process in (ownership, other):
        await process.get("0")
        limit_pages(process, 1)  # the smallest possible is the current size
    names = [f"{number:0300}" for number in range(100)]
    for name in names:
        await ownership.add(name, ANN)
    assert "cached, 0 unwritten" not in repr(ownership)
    await other.add("also full", BOB)
    assert await other.get("0") == ANN, "reads go on"
    for process in (ownership, other):
        limit_pages(process, 2**30)
    assert [await other.get(name) for name in names] == [ANN] * 100
    await ownership.close()
    await other.close()


def limit_pages(ownership: RequestOwnership, pages: int) -> None:
    store = ownership._store
    assert isinstance(store, SqliteOwnerStore)
    assert store._connection is not None
    execute = store._connection.execute
    future = store._executor.submit(execute, f"PRAGMA max_page_count = {pages}")
    future.result()


# --- A shared store ---


@pytest.fixture
def store() -> FakeStore:
    return FakeStore(is_remote=True)


@pytest.fixture
async def breaker(store: FakeStore) -> AsyncIterator[StoreBreaker]:
    async with StoreBreaker(store) as breaker:
        yield breaker


@pytest.fixture
def shared(breaker: StoreBreaker, store: FakeStore) -> RequestOwnership:
    return RequestOwnership(store, breaker)


async def test_an_owner_is_in_the_shared_store_before_add_returns(
    shared: RequestOwnership, store: FakeStore
) -> None:
    await shared.add("1", ANN)
    assert store.owners == {"1": ANN}


async def test_the_owner_in_the_shared_store_stays(
    shared: RequestOwnership, store: FakeStore
) -> None:
    store.owners["1"] = BOB
    await shared.add("1", ANN)
    assert await shared.get("1") == BOB
    assert store.owners == {"1": BOB}


async def test_an_owner_is_read_from_the_shared_store_once(
    shared: RequestOwnership, store: FakeStore
) -> None:
    store.owners["1"] = ANN
    assert [await shared.get("1") for _ in range(3)] == [ANN] * 3
    assert store.operations.count("get_owner") == 1


async def test_an_unknown_owner_is_a_503_while_the_store_is_down(
    shared: RequestOwnership, store: FakeStore
) -> None:
    await shared.add("1", ANN)
    store.error = STORE_DOWN
    assert await shared.get("1") == ANN
    await assert_unavailable(shared, "2")


async def test_an_owner_is_written_after_the_recovery_of_the_store(
    shared: RequestOwnership, store: FakeStore, breaker: StoreBreaker
) -> None:
    store.error = STORE_DOWN
    await shared.add("1", ANN)
    assert await shared.get("1") == ANN
    store.error = None
    await wait_until(lambda: not breaker.is_open, seconds=TIMEOUT)
    await wait_until(lambda: store.owners == {"1": ANN}, seconds=TIMEOUT)


async def test_owners_in_memory_are_bounded(shared: RequestOwnership, store: FakeStore) -> None:
    store.error = STORE_DOWN
    for number in range(UNWRITTEN_MAX + 1):
        await shared.add(str(number), ANN)
    await assert_unavailable(shared, "0")
    assert await shared.get(str(UNWRITTEN_MAX)) == ANN


async def test_long_owners_in_memory_are_bounded_by_their_bytes(
    shared: RequestOwnership, store: FakeStore
) -> None:
    owner = RequestOwner("a" * (CACHE_MAX_BYTES // 4 - ENTRY_BYTES), "mark")
    for number in range(5):
        await shared.add(str(number), owner)
    store.error = STORE_DOWN
    await assert_unavailable(shared, "0")
    assert await shared.get("1") == owner


async def test_an_owner_that_another_process_writes_late_is_found(
    shared: RequestOwnership, store: FakeStore
) -> None:
    waiting = asyncio.create_task(shared.get("1"))
    await wait_until(lambda: store.operations.count("get_owner") > 1, seconds=TIMEOUT)
    store.owners["1"] = ANN
    assert await waiting == ANN


async def test_a_lookup_waits_for_the_recovery_of_the_store(
    shared: RequestOwnership, store: FakeStore, breaker: StoreBreaker
) -> None:
    store.owners["1"] = ANN
    store.error = STORE_DOWN
    waiting = asyncio.create_task(shared.get("1"))
    await wait_until(lambda: breaker.is_open, seconds=TIMEOUT)
    await asyncio.sleep(0.5)
    assert not waiting.done()
    store.error = None
    assert await waiting == ANN


@pytest.mark.slow(seconds=4)
async def test_no_request_is_unknown_right_after_a_recovery(
    shared: RequestOwnership, store: FakeStore, breaker: StoreBreaker
) -> None:
    store.error = STORE_DOWN
    await shared.add("1", ANN)
    store.error = None
    await wait_until(lambda: not breaker.is_open, seconds=TIMEOUT)
    started = time.monotonic()
    assert await shared.get("2") is None
    assert time.monotonic() - started > SETTLE_SECONDS


async def test_the_owners_in_memory_are_restored_when_the_store_was_emptied(
    shared: RequestOwnership, store: FakeStore
) -> None:
    store.content = StoreContent("first", is_new=False)
    await wait_until(lambda: store.operations.count("probe") > 1, seconds=TIMEOUT)
    store.owners["2"] = BOB
    assert await shared.get("2") == BOB
    await shared.add("1", ANN)
    store.owners.clear()
    store.content = StoreContent("second", is_new=True)
    await wait_until(lambda: store.owners == {"1": ANN, "2": BOB}, seconds=TIMEOUT)
