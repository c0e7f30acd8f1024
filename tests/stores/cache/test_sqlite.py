"""SQLite store: several processes, the size limit, corrupt files."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from falproxy.stores.cache import (
    GRACE_PERIOD,
    JOB_RETENTION,
    VIRTUAL_ID_RETENTION,
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    RequestOwner,
    StoreError,
    VirtualRequest,
)
from falproxy.stores.cache.sqlite import TOUCH_INTERVAL, SqliteStore
from falproxy.stores.cache.sqlite_owners import OWNERS_FILE
from falproxy.stores.cache.sqlite_schema import SWEEP_BATCH_SIZE
from tests.support.fake_clock import FakeClock

JOB = Job("job-1", "fal-ai/flux")
LEADER = AcquireRequest("a", 10.0, is_run=False)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1e9)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "cache.sqlite"


def result(body: bytes = b"{}", stored_at: float = 1e9, ttl: float = 3600.0) -> CachedResult:
    return CachedResult(body, "application/json", stored_at, stored_at + ttl)


async def keys_of(store: SqliteStore, *keys: str) -> str:
    """Return the keys that have a result, joined."""
    lookups = [await store.get(key) for key in keys]
    return "".join(key for key, lookup in zip(keys, lookups, strict=True) if lookup.result)


async def test_a_restart_loses_nothing(file: Path, clock: FakeClock) -> None:
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        await store.finish("k", "a", result())
        await store.put_virtual_request("id", VirtualRequest("k", "ann", "app"))
        await store.put_owner("id", RequestOwner("ann", "mark"))
        await store.acquire("l", LEADER)
        await store.record_job("l", "a", JOB)
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        assert await store.get("k") == Lookup(result())
        assert await store.get_virtual_request("id") == VirtualRequest("k", "ann", "app")
        assert await store.get_owner("id") == RequestOwner("ann", "mark")
        lookup = await store.acquire("l", AcquireRequest("b", 10, is_run=False))
        assert lookup.shared_call is not None
        assert lookup.shared_call.job == JOB


async def test_only_its_user_can_read_the_file(file: Path) -> None:
    async with SqliteStore(file, max_size=1000) as store:
        await store.finish("k", "a", result())
        files = list(file.parent.iterdir())
        assert len(files) == 3
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


async def test_the_least_recently_used_result_is_deleted_first(
    file: Path, clock: FakeClock
) -> None:
    async with SqliteStore(file, max_size=30, clock=clock) as store:
        for key in "abc":
            await store.finish(key, "t", result(b"x" * 10))
            clock.now += TOUCH_INTERVAL + 1
        assert (await store.acquire("a", LEADER)).result is not None
        await store.finish("d", "t", result(b"x" * 10))
        assert await keys_of(store, *"abcd") == "acd"
        await store.finish("e", "t", result(b"x" * 15))
        assert await keys_of(store, *"abcde") == "de"
        assert (await store.stats()).size == 25


async def test_the_total_size_stays_within_the_limit(file: Path, clock: FakeClock) -> None:
    async with SqliteStore(file, max_size=100, clock=clock) as store:
        for n in range(100):
            await store.finish(f"k{n % 30}", "t", result(b"x" * (n % 40)))
            assert (await store.stats()).size <= 100


async def test_a_result_above_the_limit_is_not_stored(file: Path, clock: FakeClock) -> None:
    async with SqliteStore(file, max_size=100, clock=clock) as store:
        await store.finish("a", "t", result(b"x" * 100))
        await store.finish("b", "t", result(b"x" * 101))
        assert await keys_of(store, "a", "b") == "a"


async def test_a_lower_limit_applies_from_the_next_result_on(file: Path, clock: FakeClock) -> None:
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        for key in "abcde":
            await store.finish(key, "t", result(b"x" * 100))
    async with SqliteStore(file, max_size=250, clock=clock) as store:
        await store.finish("f", "t", result(b"x" * 100))
        assert await keys_of(store, *"abcdef") == "ef"


async def test_a_hit_writes_to_the_file_once_a_minute_at_most(file: Path, clock: FakeClock) -> None:
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        await store.finish("k", "t", result())
        reader = sqlite3.connect(file)
        for seconds, is_written in ((0, False), (TOUCH_INTERVAL - 1, False), (2, True), (1, False)):
            clock.now += seconds
            before = reader.execute("PRAGMA data_version").fetchone()
            assert (await store.acquire("k", LEADER)).result is not None
            after = reader.execute("PRAGMA data_version").fetchone()
            assert (before != after) is is_written
        reader.close()


async def test_expired_rows_are_deleted_in_batches(file: Path, clock: FakeClock) -> None:
    async with SqliteStore(file, max_size=10**6, clock=clock) as store:
        for n in range(2 * SWEEP_BATCH_SIZE + 5):
            await store.finish(f"k{n}", "t", result(b"x"))
            await store.put_virtual_request(f"id{n}", VirtualRequest("k", "ann", "app"))
            await store.acquire(f"f{n}", LEADER)
        clock.now += max(VIRTUAL_ID_RETENTION, 3600 + GRACE_PERIOD, JOB_RETENTION) + 1
        results_left = []
        for _ in range(3):
            await store.probe()
            results_left.append((await store.stats()).results)
    assert results_left == [SWEEP_BATCH_SIZE + 5, 5, 0]
    reader = sqlite3.connect(file)
    for table in ("results", "claims", "flights", "holders"):
        assert reader.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table
    reader.close()


async def test_a_job_and_its_virtual_requests_expire(file: Path, clock: FakeClock) -> None:
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        await store.acquire("k", LEADER)
        await store.record_job("k", "a", JOB)
        await store.put_virtual_request("id", VirtualRequest("k", "ann", "app"))
        clock.now += JOB_RETENTION - 1
        assert await store.add_holder("k", JOB.request_id, "second")
        clock.now += 2
        assert not await store.add_holder("k", JOB.request_id, "third")
        assert (await store.get("k")).shared_call is None
        clock.now = 1e9 + VIRTUAL_ID_RETENTION - 1
        assert await store.get_virtual_request("id") is not None
        clock.now += 2
        assert await store.get_virtual_request("id") is None


async def call_every_method(store: SqliteStore) -> list[object]:
    """Return the result or the error of each method that uses the file."""
    calls: list[Awaitable[object]] = [
        store.probe(),
        store.get("k"),
        store.acquire("k", LEADER),
        store.record_job("k", "a", JOB),
        store.renew_lease("k", "a", 1),
        store.finish("k", "a", result()),
        store.put_virtual_request("id", VirtualRequest("k", "ann", "app")),
        store.get_virtual_request("id"),
        store.add_holder("k", "job", "holder"),
        store.remove_holder("k", "job", "holder"),
        store.stats(),
        store.clear(),
    ]
    return await asyncio.gather(*calls, return_exceptions=True)


def file_in_place_of_the_folder(file: Path) -> Callable[[], None]:
    file.parent.touch()
    return file.parent.unlink


def folder_of_the_same_name(file: Path) -> Callable[[], None]:
    file.mkdir(parents=True)
    return file.rmdir


def read_only_folder(file: Path) -> Callable[[], None]:
    file.parent.mkdir(mode=0o500)
    if os.access(file.parent, os.W_OK):
        pytest.skip("root can write to every folder")
    return lambda: file.parent.chmod(0o700)


@pytest.mark.parametrize(
    "damage", [file_in_place_of_the_folder, folder_of_the_same_name, read_only_folder]
)
async def test_a_file_that_cannot_be_used_is_used_once_it_can(
    file: Path, damage: Callable[[Path], Callable[[], None]]
) -> None:
    repair = damage(file)
    async with SqliteStore(file, max_size=1000) as store:
        with store.watch("k"):
            assert {type(outcome) for outcome in await call_every_method(store)} == {StoreError}
        repair()
        assert StoreError not in {type(outcome) for outcome in await call_every_method(store)}


async def test_every_operation_of_a_closed_store_is_an_error(file: Path) -> None:
    async with SqliteStore(file, max_size=1000) as store:
        await store.finish("k", "a", result())
    outcomes = await call_every_method(store)
    assert {type(outcome) for outcome in outcomes} == {StoreError}, outcomes


async def test_a_file_that_is_locked_too_long_is_an_error(file: Path) -> None:
    async with SqliteStore(file, max_size=1000) as store:
        await store.finish("k", "a", result(stored_at=time.time()))
        locker = sqlite3.connect(file, isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError):
            await store.probe()
        assert (await store.get("k")).result is not None, "reads do not need the lock"
        assert (await store.acquire("k", LEADER)).result is not None
        locker.execute("ROLLBACK")
        locker.close()
        await store.probe()


def garbage(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"no database" * 1000)


def corrupt_first_page(file: Path) -> None:
    """The header is valid, the tables cannot be read."""
    file.parent.mkdir()
    database = sqlite3.connect(file)
    database.execute("CREATE TABLE results (key TEXT PRIMARY KEY)")
    database.close()
    pages = file.read_bytes()
    file.write_bytes(pages[:100] + b"\xff" * (len(pages) - 100))


@pytest.mark.parametrize("damage", [garbage, corrupt_first_page])
async def test_a_corrupt_file_is_renamed_and_created_again(
    file: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(file)
    async with SqliteStore(file, max_size=1000, clock=FakeClock(1e9)) as store:
        await store.finish("k", "a", result())
        assert await store.get("k") == Lookup(result())
    assert file.with_name("cache.sqlite.broken").exists()
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1


async def test_a_file_that_becomes_corrupt_is_created_again(file: Path, clock: FakeClock) -> None:
    async with SqliteStore(file, max_size=10**7, clock=clock) as store:
        for n in range(100):
            await store.finish(str(n), "a", result(b"x" * 10_000))
    content = bytearray(file.read_bytes())
    content[20 * 4096 :] = b"\xff" * (len(content) - 20 * 4096)
    file.write_bytes(content)
    async with SqliteStore(file, max_size=10**7, clock=clock) as store:
        for n in range(100):
            await store.acquire(str(n), LEADER)
        await store.finish("k", "a", result())
        assert await store.get("k") == Lookup(result())


async def test_a_corrupt_file_is_renamed_once_by_two_stores(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    garbage(file)
    stores = [SqliteStore(file, max_size=1000, clock=FakeClock(1e9)) for _ in range(2)]
    for store in stores:
        await store.finish("k", "a", result())
    assert await stores[0].get("k") == await stores[1].get("k") == Lookup(result())
    for store in stores:
        await store.__aexit__()
    assert caplog.text.count("is corrupt") == 1


async def test_owners_survive_a_corrupt_results_file(file: Path) -> None:
    owner = RequestOwner("ann", "mark")
    async with SqliteStore(file, max_size=1000) as store:
        await store.put_owner("id", owner)
        await store.finish("k", "a", result())
    file.write_bytes(b"no database" * 1000)
    async with SqliteStore(file, max_size=1000) as store:
        await store.probe()
        assert await store.get_owner("id") == owner
    assert file.with_name("cache.sqlite.broken").exists()


async def test_a_store_without_owners_has_no_owners_file(file: Path) -> None:
    async with SqliteStore(file, max_size=1000) as store:
        await store.probe()
    assert not file.with_name(OWNERS_FILE).exists()


async def test_the_file_is_polled_only_while_there_are_watchers(file: Path) -> None:
    async with SqliteStore(file, max_size=1000) as store:
        tasks = asyncio.all_tasks()
        with store.watch("k"):
            assert len(asyncio.all_tasks() - tasks) == 1
        for _ in range(100):
            await asyncio.sleep(0.01)
            if asyncio.all_tasks() == tasks:
                break
        assert asyncio.all_tasks() == tasks


# Acquires one key after the other, and prints the keys of which it is the leader.
WORKER = """
import asyncio, sys
from pathlib import Path
from falproxy.stores.cache import AcquireRequest, CachedResult
from falproxy.stores.cache.sqlite import SqliteStore

async def work(file, name):
    async with SqliteStore(Path(file), max_size=10**8) as store:
        for n in range(int(sys.argv[3])):
            lookup = await store.acquire(f"k{n}", AcquireRequest(name, 60, False))
            if lookup.is_leader:
                print(f"k{n}", flush=True)
                body = str(n).encode() * 1000
                await store.finish(f"r{n}", name, CachedResult(body, "text/plain", 2e9, 3e9))

asyncio.run(work(*sys.argv[1:3]))
"""


def start_worker(file: Path, name: str, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(file), name, str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def test_processes_share_the_file(file: Path) -> None:
    workers = [start_worker(file, name, 100) for name in "ab"]
    led = [worker.communicate(timeout=30)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sorted(led[0] + led[1]) == sorted(f"k{n}" for n in range(100))


async def test_a_process_killed_while_it_writes_leaves_a_usable_file(file: Path) -> None:
    process = start_worker(file, "a", 10**6)
    assert process.stdout is not None
    led = [process.stdout.readline().strip() for _ in range(100)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    async with SqliteStore(file, max_size=10**8) as store:
        for n in range(99):  # the hundredth may not have been stored
            lookup = await store.get(f"r{n}")
            assert lookup.result is not None
            assert lookup.result.body == str(n).encode() * 1000
        assert led[99] == "k99"
        await store.finish("k", "a", result(stored_at=2e9))
        assert (await store.get("k")).result is not None
    reader = sqlite3.connect(file)
    assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    reader.close()
