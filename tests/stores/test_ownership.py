"""Owners of queued requests, in memory, in the local file, and in a store that others share."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from falproxy.errors import ProxyError
from falproxy.stores.cache import OWNER_RETENTION, RequestOwner, StoreError
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.sqlite_owners import RETRY_INTERVAL, SqliteOwnerStore
from falproxy.stores.ownership import (
    CACHE_MAX_BYTES,
    ENTRY_BYTES,
    UNWRITTEN_MAX,
    RequestOwnership,
)
from tests.support.fake_store import FakeStore

ANN = RequestOwner("ann", "mark")
BOB = RequestOwner("bob", "mark")
STORE_DOWN = StoreError("the store is down")


class FakeClock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


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
    clock = FakeClock()
    for age, expected in ((0, ANN), (OWNER_RETENTION - 1, ANN), (2, None)):
        clock.now += age
        store = SqliteOwnerStore(file, clock)
        if age == 0:
            await store.put_owner("1", ANN)
        assert await store.get_owner("1") == expected
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
    assert await ownership.get("2") is None
    await store.close()
    assert caplog.text.count("request owners are lost at a restart") == 1


async def test_a_file_that_cannot_be_used_at_first_is_used_later(tmp_path: Path) -> None:
    clock, folder = FakeClock(), tmp_path / "folder"
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


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.005)


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
    with pytest.raises(ProxyError) as error:
        await shared.get("2")
    assert (error.value.status, error.value.code) == (503, "store_unavailable")


async def test_an_owner_is_written_after_the_recovery_of_the_store(
    shared: RequestOwnership, store: FakeStore, breaker: StoreBreaker
) -> None:
    store.error = STORE_DOWN
    await shared.add("1", ANN)
    assert await shared.get("1") == ANN
    store.error = None
    await wait_until(lambda: not breaker.is_open)
    await wait_until(lambda: store.owners == {"1": ANN})


async def test_owners_in_memory_are_bounded(shared: RequestOwnership, store: FakeStore) -> None:
    store.error = STORE_DOWN
    for number in range(UNWRITTEN_MAX + 1):
        await shared.add(str(number), ANN)
    with pytest.raises(ProxyError):
        await shared.get("0")
    assert await shared.get(str(UNWRITTEN_MAX)) == ANN


async def test_long_owners_in_memory_are_bounded_by_their_bytes(
    shared: RequestOwnership, store: FakeStore
) -> None:
    owner = RequestOwner("a" * (CACHE_MAX_BYTES // 4 - ENTRY_BYTES), "mark")
    for number in range(5):
        await shared.add(str(number), owner)
    store.error = STORE_DOWN
    with pytest.raises(ProxyError):
        await shared.get("0")
    assert await shared.get("1") == owner
