"""Contract of the stores of idempotency records, SQLite and Redis."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from redis.asyncio import Redis

from falproxy.stores.idempotency import (
    RECORD_BYTES,
    RETENTION,
    SMALL_OUTCOME_MAX,
    BeginReply,
    IdempotencyStore,
    IdempotencyStoreError,
)
from falproxy.stores.idempotency.redis import RedisIdempotencyStore
from falproxy.stores.idempotency.sqlite import SqliteIdempotencyStore
from tests.support.redis_server import RedisServer, redis_server
from tests.support.store_processes import StoreProcesses

LEASE = 60.0
SHORT = 0.2  # seconds, on a Redis whose clock cannot be moved
STARTED, RUNNING, LOST = BeginReply("started"), BeginReply("running"), BeginReply("lost")
MISMATCH, DROPPED, FULL = BeginReply("mismatch"), BeginReply("dropped"), BeginReply("full")
MAX_SIZE = 8 * SMALL_OUTCOME_MAX
LARGE = bytes(3 * SMALL_OUTCOME_MAX)  # two of them and some records have room


Processes = StoreProcesses[IdempotencyStore]


def sqlite_file(folder: Path) -> Path:
    return folder / "data" / "idempotency.sqlite"


def on_sqlite(folder: Path) -> Processes:
    file = sqlite_file(folder)
    return Processes.with_clock(
        lambda clock: SqliteIdempotencyStore(file, max_size=MAX_SIZE, clock=clock)
    )


def on_redis(url: str, prefix: str) -> Processes:
    return Processes(lambda: RedisIdempotencyStore(url, prefix=prefix, max_size=MAX_SIZE))


@pytest.fixture(params=["sqlite", "redis"])
async def processes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Processes]:
    if request.param == "sqlite":
        shared = on_sqlite(tmp_path)
    else:
        shared = on_redis(request.getfixturevalue("redis").url, f"{tmp_path.name}:")
    async with shared.stack:
        yield shared


@pytest.fixture
async def store(processes: Processes) -> IdempotencyStore:
    return await processes.store()


@pytest.fixture
async def other(processes: Processes) -> IdempotencyStore:
    """The store of another process."""
    return await processes.store()


async def begin(
    store: IdempotencyStore, token: str, *, key: str = "k", digest: str = "d", lease: float = LEASE
) -> BeginReply:
    return await store.begin(key, digest, token, lease)


async def test_the_first_call_starts_and_others_see_it_running(
    store: IdempotencyStore, other: IdempotencyStore
) -> None:
    assert await begin(store, "a") == STARTED
    assert await begin(other, "b") == RUNNING
    assert await begin(store, "a") == STARTED, "a repeated operation, after a lost reply"
    assert await begin(other, "b", key="another") == STARTED


async def test_of_many_at_once_one_starts(store: IdempotencyStore, other: IdempotencyStore) -> None:
    tasks = [begin((store, other)[n % 2], f"token-{n}") for n in range(20)]
    replies = await asyncio.gather(*tasks)
    assert sorted(reply.state for reply in replies) == ["running"] * 19 + ["started"]


@pytest.mark.parametrize("outcome", [b"", b"{}\n\x00\xff body", LARGE])
async def test_an_outcome_is_returned_to_all_later_calls(
    store: IdempotencyStore, other: IdempotencyStore, outcome: bytes
) -> None:
    await begin(store, "a")
    assert await store.mark_sent("k", "a", LEASE)
    assert await store.finish("k", "a", outcome)
    for each, token in ((other, "b"), (store, "c"), (store, "a")):
        assert await begin(each, token) == BeginReply("done", outcome)
    assert not await store.finish("k", "a", b"other")
    assert not await store.release("k", "a")
    assert await begin(other, "d") == BeginReply("done", outcome)


@pytest.mark.parametrize("ends", ["not", "sent", "done"])
async def test_another_digest_is_a_mismatch(
    store: IdempotencyStore, other: IdempotencyStore, ends: str
) -> None:
    await begin(store, "a")
    if ends != "not":
        await store.mark_sent("k", "a", LEASE)
    if ends == "done":
        await store.finish("k", "a", b"outcome")
    assert await begin(other, "b", digest="e") == MISMATCH


async def test_a_released_key_may_be_used_for_any_call(
    store: IdempotencyStore, other: IdempotencyStore
) -> None:
    await begin(store, "a")
    await store.mark_sent("k", "a", LEASE)
    assert await store.release("k", "a")
    assert not await store.release("k", "a")
    assert await begin(other, "b", digest="e") == STARTED


async def test_a_call_that_was_not_sent_is_taken_over_after_its_lease(
    processes: Processes, store: IdempotencyStore, other: IdempotencyStore
) -> None:
    await begin(store, "a", lease=SHORT)
    await processes.wait(SHORT * 1.5)
    assert await begin(other, "b") == STARTED
    assert await begin(store, "c") == RUNNING
    # The first one must not send it any more, and cannot end the record of the second.
    assert not await store.mark_sent("k", "a", LEASE)
    await store.renew([("k", "a")], LEASE)
    assert not await store.finish("k", "a", b"outcome")
    assert not await store.release("k", "a")
    assert await other.mark_sent("k", "b", LEASE)


async def test_a_call_that_was_sent_is_lost_after_its_lease(
    processes: Processes, store: IdempotencyStore, other: IdempotencyStore
) -> None:
    await begin(store, "a", lease=SHORT)
    await store.mark_sent("k", "a", SHORT)
    await processes.wait(SHORT * 1.5)
    assert [await begin(other, token) for token in "bc"] == [LOST, LOST]
    assert not await other.release("k", "b")
    # Its process was only slow.
    assert await store.finish("k", "a", b"outcome")
    assert await begin(other, "d") == BeginReply("done", b"outcome")


async def test_a_lease_is_renewed(
    processes: Processes, store: IdempotencyStore, other: IdempotencyStore
) -> None:
    await begin(store, "a", lease=SHORT)
    assert await store.mark_sent("k", "a", SHORT)
    await begin(store, "a", key="another", lease=SHORT)
    calls = [("k", "a"), ("unknown", "a"), ("another", "a"), ("k", "b")]
    assert [*await store.renew(calls, LEASE)] == [("unknown", "a"), ("k", "b")]
    assert not await store.renew([("k", "a")], SHORT), "a lease never gets shorter"
    assert not await store.renew([], LEASE)
    await processes.wait(SHORT * 2)
    for key in ("k", "another"):
        assert await begin(other, "b", key=key) == RUNNING


async def test_an_outcome_that_is_too_large_is_reported_as_dropped(
    store: IdempotencyStore, other: IdempotencyStore
) -> None:
    await begin(store, "a")
    assert await store.finish("k", "a", None)
    assert await begin(other, "b") == DROPPED
    assert await begin(other, "b", digest="e") == MISMATCH


async def test_the_oldest_large_outcomes_are_dropped_and_no_small_one(
    processes: Processes, store: IdempotencyStore, other: IdempotencyStore
) -> None:
    small = bytes(SMALL_OUTCOME_MAX // 2)
    outcomes = {"small": small, "old": LARGE, "new": LARGE, "newest": LARGE}
    for key, outcome in outcomes.items():
        await begin(store, "a", key=key)
        assert await store.finish(key, "a", outcome)
        await processes.wait(0.01)
    replies = {key: await begin(other, "b", key=key) for key in outcomes}
    assert replies == {
        "small": BeginReply("done", small),
        "old": DROPPED,
        "new": BeginReply("done", LARGE),
        "newest": BeginReply("done", LARGE),
    }


async def test_a_full_store_refuses_new_keys_and_forgets_none(
    store: IdempotencyStore, other: IdempotencyStore
) -> None:
    outcome = bytes(SMALL_OUTCOME_MAX)
    kept = MAX_SIZE // (SMALL_OUTCOME_MAX + RECORD_BYTES)
    for number in range(kept):
        assert await begin(store, "a", key=f"{number}") == STARTED
        assert await store.finish(f"{number}", "a", outcome)
    room = (MAX_SIZE - kept * (SMALL_OUTCOME_MAX + RECORD_BYTES)) // RECORD_BYTES
    for number in range(room):
        assert await begin(other, "a", key=f"more-{number}") == STARTED
    assert await begin(store, "a", key="one too many") == FULL
    assert await other.finish("more-0", "a", outcome), "without its outcome"
    assert await begin(store, "b", key="more-0") == DROPPED
    for number in range(kept):
        assert await begin(other, "b", key=f"{number}") == BeginReply("done", outcome)
    assert await other.release("more-1", "a")
    assert await begin(store, "a", key="one too many") == STARTED


async def test_records_expire_after_their_retention(tmp_path: Path) -> None:
    processes = on_sqlite(tmp_path)
    async with processes.stack:
        store = await processes.store()
        for number in range(30):
            await begin(store, "a", key=f"{number}")
            await store.finish(f"{number}", "a", b"outcome")
        await processes.wait(RETENTION - 1)
        assert await begin(store, "b", key="29") == BeginReply("done", b"outcome")
        await processes.wait(2)
        assert await begin(store, "b", key="29", digest="e") == STARTED
        for _ in range(2):
            await store.renew([("29", "b")], LEASE)
        with closing(sqlite3.connect(sqlite_file(tmp_path))) as connection:
            assert connection.execute("SELECT size FROM total").fetchone() == (RECORD_BYTES,)


async def test_records_in_redis_expire_and_have_no_time_to_live(redis: RedisServer) -> None:
    prefix = "expiry:"
    async with RedisIdempotencyStore(redis.url, prefix=prefix) as store:
        for number in range(30):
            await begin(store, "a", key=f"{number}")
            await store.finish(f"{number}", "a", LARGE)
        async with Redis.from_url(redis.url) as client:
            names = [name async for name in client.scan_iter(match=f"{prefix}*", count=1000)]
            assert len(names) == 30 + 3
            assert {await client.ttl(name) for name in names} == {-1}
            expiry = f"{prefix}{{idempotency}}:expiry"
            for name in await client.zrange(expiry, 0, -1):
                assert isinstance(name, bytes)
                await client.zincrby(expiry, -RETENTION, name)
            assert await begin(store, "b", key="29", digest="e") == STARTED
            await store.renew([("29", "b")], LEASE)
            names = [name async for name in client.scan_iter(match=f"{prefix}*", count=1000)]
            assert len(names) == 1 + 2
            assert await client.get(f"{prefix}{{idempotency}}:size") == b"%d" % RECORD_BYTES


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_a_call_is_sent_once(processes: Processes, seed: int) -> None:
    """Several callers with one key at once, some of which die or are slow."""
    random = Random(seed)
    stores = [await processes.store() for _ in range(3)]
    sent: list[str] = []
    lease = 0.02

    async def call(token: str) -> None:
        store = random.choice(stores)
        while (reply := await begin(store, token, lease=lease)).state == "running":
            await processes.wait(random.uniform(0, lease))
        if reply.state != "started" or random.random() < 0.3:
            return  # it has ended, or its process dies
        await processes.wait(random.uniform(0, 2 * lease))
        if not await store.mark_sent("k", token, lease):
            return
        sent.append(token)
        await processes.wait(random.uniform(0, 2 * lease))
        if random.random() < 0.5:
            await store.finish("k", token, token.encode())

    await asyncio.gather(*(call(f"token-{n}") for n in range(8)))
    assert len(sent) <= 1, f"seed {seed}"
    if sent:
        reply = await begin(stores[0], "last")
        assert reply in (BeginReply("done", sent[0].encode()), LOST, RUNNING), f"seed {seed}"


async def test_a_store_that_is_away_is_an_error_and_is_used_again(tmp_path: Path) -> None:
    with redis_server() as server:
        async with RedisIdempotencyStore(server.url) as store:
            assert await begin(store, "a") == STARTED
            server.kill()
            with pytest.raises(IdempotencyStoreError):
                await begin(store, "b")
            server.start()
            assert await begin(store, "b") == STARTED
    (tmp_path / "folder").mkdir()
    async with SqliteIdempotencyStore(tmp_path / "folder") as broken:
        with pytest.raises(IdempotencyStoreError):
            await begin(broken, "a")
        (tmp_path / "folder").rmdir()
        assert await begin(broken, "a") == STARTED


def test_an_invalid_url_is_refused_without_its_text() -> None:
    with pytest.raises(ValueError, match="not a URL of a Redis server") as raised:
        RedisIdempotencyStore("http://secret@host")
    assert "secret" not in str(raised.value)
