"""What only the embedded store does: several processes, a bound on its size, files that break."""

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
    StoreError,
    VirtualRequest,
)
from falproxy.stores.cache.sqlite import TOUCH_INTERVAL, SqliteStore
from falproxy.stores.cache.sqlite_schema import SWEEP_BATCH_SIZE

JOB = Job("job-1", "fal-ai/flux")
LEADER = AcquireRequest("a", 10.0, is_run=False)


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "cache.sqlite"


def result(body: bytes = b"{}", stored_at: float = 1e9, ttl: float = 3600.0) -> CachedResult:
    return CachedResult(body, "application/json", stored_at, stored_at + ttl)


async def keys_of(store: SqliteStore, *keys: str) -> str:
    """Which of some keys of one letter each have a result."""
    found = [await store.get(key) for key in keys]
    return "".join(key for key, each in zip(keys, found, strict=True) if each.result)


async def test_what_was_kept_is_there_after_a_restart(file: Path, clock: Clock) -> None:
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        await store.finish("k", "a", result())
        await store.put_virtual_request("id", VirtualRequest("k", "ann", "app"))
        await store.acquire("l", LEADER)
        await store.record_job("l", "a", JOB)
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        assert await store.get("k") == Lookup(result())
        assert await store.get_virtual_request("id") == VirtualRequest("k", "ann", "app")
        found = await store.acquire("l", AcquireRequest("b", 10, is_run=False))
        assert found.flight is not None
        assert found.flight.job == JOB


async def test_only_its_owner_can_read_the_file(file: Path) -> None:
    async with SqliteStore(file, max_size=1000) as store:
        await store.finish("k", "a", result())
        files = list(file.parent.iterdir())
        assert len(files) == 3
        assert {each.stat().st_mode & 0o777 for each in files} == {0o600}


async def test_what_was_used_least_recently_goes_first(file: Path, clock: Clock) -> None:
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


async def test_the_sum_of_sizes_stays_below_the_bound(file: Path, clock: Clock) -> None:
    async with SqliteStore(file, max_size=100, clock=clock) as store:
        for n in range(100):
            await store.finish(f"k{n % 30}", "t", result(b"x" * (n % 40)))
            assert (await store.stats()).size <= 100


async def test_a_result_above_the_bound_is_not_kept(file: Path, clock: Clock) -> None:
    async with SqliteStore(file, max_size=100, clock=clock) as store:
        await store.finish("a", "t", result(b"x" * 100))
        await store.finish("b", "t", result(b"x" * 101))
        assert await keys_of(store, "a", "b") == "a"


async def test_a_smaller_bound_holds_from_the_next_result_on(file: Path, clock: Clock) -> None:
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        for key in "abcde":
            await store.finish(key, "t", result(b"x" * 100))
    async with SqliteStore(file, max_size=250, clock=clock) as store:
        await store.finish("f", "t", result(b"x" * 100))
        assert await keys_of(store, *"abcdef") == "ef"


async def test_a_hit_writes_nothing_most_of_the_time(file: Path, clock: Clock) -> None:
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        await store.finish("k", "t", result())
        watching = sqlite3.connect(file)
        for waited, is_written in ((0, False), (TOUCH_INTERVAL - 1, False), (2, True), (1, False)):
            clock.now += waited
            before = watching.execute("PRAGMA data_version").fetchone()
            assert (await store.acquire("k", LEADER)).result is not None
            after = watching.execute("PRAGMA data_version").fetchone()
            assert (before != after) is is_written
        watching.close()


async def test_what_is_past_its_time_is_removed_bit_by_bit(file: Path, clock: Clock) -> None:
    async with SqliteStore(file, max_size=10**6, clock=clock) as store:
        for n in range(2 * SWEEP_BATCH_SIZE + 5):
            await store.finish(f"k{n}", "t", result(b"x"))
            await store.put_virtual_request(f"id{n}", VirtualRequest("k", "ann", "app"))
            await store.acquire(f"f{n}", LEADER)
        clock.now += max(VIRTUAL_ID_RETENTION, 3600 + GRACE_PERIOD, JOB_RETENTION) + 1
        left = []
        for _ in range(3):
            await store.probe()
            left.append((await store.stats()).results)
    assert left == [SWEEP_BATCH_SIZE + 5, 5, 0]
    tables = sqlite3.connect(file)
    for table in ("results", "claims", "flights", "holders"):
        assert tables.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table
    tables.close()


async def test_a_job_and_its_claims_are_remembered_for_their_time(file: Path, clock: Clock) -> None:
    async with SqliteStore(file, max_size=1000, clock=clock) as store:
        await store.acquire("k", LEADER)
        await store.record_job("k", "a", JOB)
        await store.put_virtual_request("id", VirtualRequest("k", "ann", "app"))
        clock.now += JOB_RETENTION - 1
        assert await store.add_holder("k", JOB.request_id, "second")
        clock.now += 2
        assert not await store.add_holder("k", JOB.request_id, "third")
        assert (await store.get("k")).flight is None
        clock.now = 1e9 + VIRTUAL_ID_RETENTION - 1
        assert await store.get_virtual_request("id") is not None
        clock.now += 2
        assert await store.get_virtual_request("id") is None


async def ask_all(store: SqliteStore) -> list[object]:
    """What every method does: an answer, or an error."""
    asked: list[Awaitable[object]] = [
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
    return await asyncio.gather(*asked, return_exceptions=True)


def a_file_in_the_way(file: Path) -> Callable[[], None]:
    file.parent.touch()
    return file.parent.unlink


def a_folder_of_its_name(file: Path) -> Callable[[], None]:
    file.mkdir(parents=True)
    return file.rmdir


def a_folder_that_is_read_only(file: Path) -> Callable[[], None]:
    file.parent.mkdir(mode=0o500)
    if os.access(file.parent, os.W_OK):
        pytest.skip("root may write into every folder")
    return lambda: file.parent.chmod(0o700)


@pytest.mark.parametrize(
    "spoil", [a_file_in_the_way, a_folder_of_its_name, a_folder_that_is_read_only]
)
async def test_a_file_that_cannot_be_used_is_used_once_it_can(
    file: Path, spoil: Callable[[Path], Callable[[], None]]
) -> None:
    mend = spoil(file)
    async with SqliteStore(file, max_size=1000) as store:
        with store.watch("k"):
            assert {type(answer) for answer in await ask_all(store)} == {StoreError}
        mend()
        assert StoreError not in {type(answer) for answer in await ask_all(store)}


async def test_a_file_that_another_process_holds_too_long_is_an_error(file: Path) -> None:
    async with SqliteStore(file, max_size=1000) as store:
        await store.finish("k", "a", result(stored_at=time.time()))
        holder = sqlite3.connect(file, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError):
            await store.probe()
        assert (await store.get("k")).result is not None, "reading goes on"
        assert (await store.acquire("k", LEADER)).result is not None
        holder.execute("ROLLBACK")
        holder.close()
        await store.probe()


def garbage(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"no database" * 1000)


def a_torn_first_page(file: Path) -> None:
    """A database by its header, with tables that cannot be read."""
    file.parent.mkdir()
    database = sqlite3.connect(file)
    database.execute("CREATE TABLE results (key TEXT PRIMARY KEY)")
    database.close()
    pages = file.read_bytes()
    file.write_bytes(pages[:100] + b"\xff" * (len(pages) - 100))


@pytest.mark.parametrize("spoil", [garbage, a_torn_first_page])
async def test_a_broken_file_is_put_aside_and_made_anew(
    file: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(file)
    async with SqliteStore(file, max_size=1000, clock=Clock()) as store:
        await store.finish("k", "a", result())
        assert await store.get("k") == Lookup(result())
    assert file.with_name("cache.sqlite.broken").exists()
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1


async def test_a_file_that_breaks_under_way_is_made_anew(file: Path, clock: Clock) -> None:
    async with SqliteStore(file, max_size=10**7, clock=clock) as store:
        for n in range(100):
            await store.finish(str(n), "a", result(b"x" * 10_000))
    broken = bytearray(file.read_bytes())
    broken[20 * 4096 :] = b"\xff" * (len(broken) - 20 * 4096)
    file.write_bytes(broken)
    async with SqliteStore(file, max_size=10**7, clock=clock) as store:
        for n in range(100):
            await store.acquire(str(n), LEADER)
        await store.finish("k", "a", result())
        assert await store.get("k") == Lookup(result())


async def test_two_who_find_it_broken_put_it_aside_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    garbage(file)
    stores = [SqliteStore(file, max_size=1000, clock=Clock()) for _ in range(2)]
    for store in stores:
        await store.finish("k", "a", result())
    assert await stores[0].get("k") == await stores[1].get("k") == Lookup(result())
    for store in stores:
        await store.__aexit__()
    assert caplog.text.count("is broken") == 1


async def test_nobody_looks_at_the_file_while_nobody_watches(file: Path) -> None:
    async with SqliteStore(file, max_size=1000) as store:
        tasks = asyncio.all_tasks()
        with store.watch("k"):
            assert len(asyncio.all_tasks() - tasks) == 1
        for _ in range(100):
            await asyncio.sleep(0.01)
            if asyncio.all_tasks() == tasks:
                break
        assert asyncio.all_tasks() == tasks


# Leads where it can, for ever, and says what it leads.
WORKER = """
import asyncio, sys
from pathlib import Path
from falproxy.stores.cache import AcquireRequest, CachedResult
from falproxy.stores.cache.sqlite import SqliteStore

async def work(file, name):
    async with SqliteStore(Path(file), max_size=10**8) as store:
        for n in range(int(sys.argv[3])):
            found = await store.acquire(f"k{n}", AcquireRequest(name, 60, False))
            if found.is_leader:
                print(f"k{n}", flush=True)
                body = str(n).encode() * 1000
                await store.finish(f"r{n}", name, CachedResult(body, "text/plain", 2e9, 3e9))

asyncio.run(work(*sys.argv[1:3]))
"""


def worker(file: Path, name: str, rounds: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WORKER, str(file), name, str(rounds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


async def test_processes_share_the_file(file: Path) -> None:
    workers = [worker(file, name, 100) for name in "ab"]
    led = [each.communicate(timeout=30)[0].split() for each in workers]
    assert [each.returncode for each in workers] == [0, 0]
    assert sorted(led[0] + led[1]) == sorted(f"k{n}" for n in range(100))


async def test_a_process_killed_while_it_writes_leaves_a_usable_file(file: Path) -> None:
    doomed = worker(file, "a", 10**6)
    assert doomed.stdout is not None
    led = [doomed.stdout.readline().strip() for _ in range(100)]
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate()
    async with SqliteStore(file, max_size=10**8) as store:
        for n in range(99):  # the hundredth was perhaps not kept yet
            found = await store.get(f"r{n}")
            assert found.result is not None
            assert found.result.body == str(n).encode() * 1000
        assert led[99] == "k99"
        await store.finish("k", "a", result(stored_at=2e9))
        assert (await store.get("k")).result is not None
    checked = sqlite3.connect(file)
    assert checked.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    checked.close()
