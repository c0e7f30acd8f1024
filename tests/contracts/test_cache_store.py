"""What every store of results does: one contract, over SQLite and over Redis."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import pytest

from falproxy.stores.cache import (
    GRACE_PERIOD,
    AcquireRequest,
    CachedResult,
    CacheStore,
    FlightRecord,
    Job,
    Lookup,
    SharedFailure,
    StoreStats,
    VirtualRequest,
)
from falproxy.stores.cache.redis import RedisStore
from falproxy.stores.cache.sqlite import SqliteStore
from tests.support.redis_server import RedisServer, redis_server

LEASE = 0.2
JOB = Job("job-1", "fal-ai/flux", "mark")
OTHER_JOB = Job("job-2", "fal-ai/flux")


@dataclass(slots=True)
class Machines:
    """Stores that share one file or server, as those of several processes do."""

    make: Callable[[], CacheStore]
    lapse: Callable[[float], Awaitable[None]]
    now: Callable[[], float]
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def store(self) -> CacheStore:
        store = await self.stack.enter_async_context(self.make())
        await store.probe()
        return store

    def result(self, body: bytes = b"{}", age: float = 0.0, ttl: float = 60.0) -> CachedResult:
        """A result that was stored `age` seconds ago."""
        stored_at = round(self.now() - age, 3)
        return CachedResult(body, "application/json", stored_at, stored_at + ttl)


def on_sqlite(folder: Path) -> Machines:
    skipped = [0.0]

    def clock() -> float:
        return time.time() + skipped[0]

    async def lapse(seconds: float) -> None:
        skipped[0] += seconds

    def make() -> CacheStore:
        return SqliteStore(folder / "data" / "cache.sqlite", max_size=2**30, clock=clock)

    return Machines(make, lapse, clock)


def on_redis(server: RedisServer) -> Machines:
    prefix = f"{uuid4()}:"
    return Machines(lambda: RedisStore(server.url, prefix=prefix), asyncio.sleep, time.time)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "redis"])
async def machines(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Machines]:
    if request.param == "sqlite":
        made = on_sqlite(tmp_path)
    else:
        made = on_redis(request.getfixturevalue("server"))
    async with made.stack:
        yield made


@pytest.fixture
async def store(machines: Machines) -> CacheStore:
    return await machines.store()


@pytest.fixture
async def other(machines: Machines) -> CacheStore:
    """The store of another process."""
    return await machines.store()


def wish(token: str = "a", lease: float = 10.0, **given: object) -> AcquireRequest:
    return replace(AcquireRequest(token, lease, is_run=False), **given)  # type: ignore[arg-type]


async def heard(event: asyncio.Event, seconds: float = 2.0) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def test_nothing_is_there_at_first(store: CacheStore) -> None:
    assert await store.get("k") == Lookup()
    assert await store.get_virtual_request("id") is None
    assert await store.stats() == StoreStats(0, 0, 0, 0)


async def test_a_result_is_kept_for_everybody(
    machines: Machines, store: CacheStore, other: CacheStore
) -> None:
    result = machines.result(b"document")
    await store.finish("k", "nobody", result)
    assert await other.get("k") == await store.get("k") == Lookup(result)
    assert await other.acquire("k", wish()) == Lookup(result)
    assert await other.get("another") == Lookup()


async def test_a_result_that_expired_is_for_those_it_was_promised_to_only(
    machines: Machines, store: CacheStore
) -> None:
    expired = machines.result(age=100, ttl=99)
    await store.finish("k", "a", expired)
    assert (await store.get("k")).result == expired
    found = await store.acquire("k", wish())
    assert (found.result, found.is_leader) == (None, True)


async def test_after_its_grace_a_result_is_gone(machines: Machines, store: CacheStore) -> None:
    await store.finish("k", "a", machines.result(age=GRACE_PERIOD + 100, ttl=99))
    assert await store.get("k") == Lookup()


async def test_a_result_expires_while_it_is_there(machines: Machines, store: CacheStore) -> None:
    await store.finish("k", "a", machines.result(ttl=LEASE))
    assert (await store.acquire("k", wish())).result is not None
    await machines.lapse(LEASE + 0.05)
    assert (await store.acquire("k", wish())).is_leader


@pytest.mark.parametrize(
    ("ahead", "leads"),
    [
        pytest.param(-1.0, False, id="stored after it"),
        pytest.param(0.0, True, id="stored at that moment"),
        pytest.param(1.0, True, id="stored before it"),
    ],
)
async def test_a_call_may_want_a_newer_result(
    machines: Machines, store: CacheStore, ahead: float, leads: bool
) -> None:
    result = machines.result(age=5)
    await store.finish("k", "a", result)
    found = await store.acquire("k", wish(min_stored_at=result.stored_at + ahead))
    assert (found.is_leader, found.result) == (leads, None if leads else result)


async def test_a_newer_result_takes_the_place_of_an_older(
    machines: Machines, store: CacheStore
) -> None:
    await store.finish("k", "a", machines.result(b"old" * 100))
    newer = machines.result(b"new")
    await store.finish("k", "a", newer)
    assert await store.get("k") == Lookup(newer)
    assert (await store.stats()).size == 3


@pytest.mark.parametrize("is_run", [True, False], ids=["run", "submit"])
async def test_the_first_leads_and_the_second_sees_its_flight(
    store: CacheStore, other: CacheStore, is_run: bool
) -> None:
    found = await store.acquire("k", wish("a", is_run=is_run))
    assert found.is_leader
    assert found.flight is not None
    for seen in (await other.acquire("k", wish("b")), await other.get("k")):
        assert (seen.is_leader, seen.result) == (False, None)
        assert seen.flight is not None
        assert 9 < seen.flight.lease_left <= 10.001
        assert replace(seen.flight, lease_left=0) == FlightRecord("a", is_run, None, 0)


async def test_asked_again_with_the_same_token_it_gives_the_same_answer(
    store: CacheStore, other: CacheStore
) -> None:
    for asked in (store, store, other):
        assert (await asked.acquire("k", wish("a"))).is_leader
        assert not (await asked.acquire("k", wish("b"))).is_leader


async def test_other_keys_are_other_flights(store: CacheStore) -> None:
    assert (await store.acquire("k", wish("a"))).is_leader
    assert (await store.acquire("l", wish("b"))).is_leader


@pytest.mark.parametrize("job", [None, JOB], ids=["without a job", "with its job"])
async def test_a_lease_that_ran_out_hands_the_flight_over(
    machines: Machines, store: CacheStore, other: CacheStore, job: Job | None
) -> None:
    await store.acquire("k", wish("a", LEASE))
    if job is not None:
        await store.record_job("k", "a", job)
    await machines.lapse(LEASE + 0.05)
    left = await other.get("k")
    assert left.flight is not None
    assert left.flight.lease_left <= 0
    found = await other.acquire("k", wish("b", is_run=True))
    assert found.is_leader
    assert found.flight is not None
    assert (found.flight.owner_token, found.flight.job) == ("b", job)
    assert found.flight.is_run is (job is None)
    assert not (await store.acquire("k", wish("a"))).is_leader


async def test_a_leader_that_says_it_lives_keeps_its_flight(
    machines: Machines, store: CacheStore, other: CacheStore
) -> None:
    await store.acquire("k", wish("a", 0.5))
    for _ in range(3):
        await machines.lapse(0.2)
        assert await store.renew_lease("k", "a", 0.5)
    assert not (await other.acquire("k", wish("b"))).is_leader


async def test_a_leader_can_give_its_flight_away(store: CacheStore, other: CacheStore) -> None:
    await store.acquire("k", wish("a"))
    await store.record_job("k", "a", JOB)
    assert await store.renew_lease("k", "a", 0)
    found = await other.acquire("k", wish("b"))
    assert found.is_leader
    assert found.flight is not None
    assert found.flight.job == JOB


async def test_who_lost_the_lead_changes_nothing(machines: Machines, store: CacheStore) -> None:
    await store.acquire("k", wish("a", LEASE))
    await machines.lapse(LEASE + 0.05)
    await store.acquire("k", wish("b"))
    assert not await store.renew_lease("k", "a", 10)
    assert not await store.record_job("k", "a", JOB)
    await store.finish("k", "a", None)
    found = await store.get("k")
    assert found.flight is not None
    assert (found.flight.owner_token, found.flight.job) == ("b", None)
    assert await store.record_job("k", "b", OTHER_JOB)


async def test_a_late_leader_that_nobody_replaced_still_leads(
    machines: Machines, store: CacheStore
) -> None:
    await store.acquire("k", wish("a", LEASE))
    await machines.lapse(LEASE + 0.05)
    assert await store.record_job("k", "a", JOB)
    assert await store.renew_lease("k", "a", 10)


async def test_nobody_leads_where_there_is_no_flight(store: CacheStore) -> None:
    assert not await store.record_job("k", "a", JOB)
    assert not await store.renew_lease("k", "a", 1)
    assert await store.get("k") == Lookup()


async def test_a_good_result_is_kept_whoever_leads(machines: Machines, store: CacheStore) -> None:
    await store.acquire("k", wish("b"))
    result = machines.result()
    await store.finish("k", "a", result)
    found = await store.get("k")
    assert found.result == result
    assert found.flight is not None


async def test_the_end_of_a_flight_lets_the_next_one_lead(
    store: CacheStore, other: CacheStore
) -> None:
    await store.acquire("k", wish("a"))
    await store.record_job("k", "a", JOB)
    await store.finish("k", "a", None)
    assert await store.get("k") == Lookup()
    found = await other.acquire("k", wish("b"))
    assert found.is_leader
    assert found.flight is not None
    assert found.flight.job is None


async def test_an_end_between_two_claims_never_makes_two_leaders(
    machines: Machines, store: CacheStore, other: CacheStore
) -> None:
    result = machines.result()
    for n in range(100):
        key = f"k{n}"
        await store.acquire(key, wish("a"))
        first, _, second = await asyncio.gather(
            other.acquire(key, wish("b")),
            store.finish(key, "a", result),
            other.acquire(key, wish("c")),
        )
        assert not first.is_leader
        assert not second.is_leader


async def test_of_a_hundred_at_once_one_leads(machines: Machines) -> None:
    stores = [await machines.store() for _ in range(3)]
    calls = (stores[n % 3].acquire("k", wish(str(n))) for n in range(100))
    found = await asyncio.gather(*calls)
    assert sum(each.is_leader for each in found) == 1
    assert len({each.flight.owner_token for each in found if each.flight}) == 1


async def test_the_last_who_leaves_ends_the_flight(store: CacheStore, other: CacheStore) -> None:
    await store.acquire("k", wish("a"))
    await store.record_job("k", "a", JOB)
    assert await other.add_holder("k", JOB.request_id, "second")
    assert not await store.remove_holder("k", JOB.request_id, JOB.request_id)
    assert await other.remove_holder("k", JOB.request_id, "second")
    assert not await store.add_holder("k", JOB.request_id, "third")
    assert not await store.renew_lease("k", "a", 10)
    assert await store.get("k") == Lookup()


async def test_who_leaves_twice_leaves_once(store: CacheStore) -> None:
    await store.acquire("k", wish("a"))
    await store.record_job("k", "a", JOB)
    await store.add_holder("k", JOB.request_id, "second")
    for _ in range(2):
        assert not await store.remove_holder("k", JOB.request_id, JOB.request_id)
    assert await store.remove_holder("k", JOB.request_id, "second")
    assert await store.remove_holder("k", JOB.request_id, "second") is None


async def test_only_the_job_that_is_under_way_can_be_joined(store: CacheStore) -> None:
    assert not await store.add_holder("k", JOB.request_id, "early")
    await store.acquire("k", wish("a"))
    assert not await store.add_holder("k", JOB.request_id, "early")
    await store.record_job("k", "a", JOB)
    assert not await store.add_holder("k", OTHER_JOB.request_id, "wrong")
    await store.finish("k", "a", None)
    assert not await store.add_holder("k", JOB.request_id, "late")


async def test_who_leaves_another_job_does_not_end_the_flight(store: CacheStore) -> None:
    await store.acquire("k", wish("a"))
    await store.record_job("k", "a", JOB)
    assert await store.remove_holder("k", OTHER_JOB.request_id, OTHER_JOB.request_id) is None
    assert await store.add_holder("k", JOB.request_id, "second")


async def test_holders_belong_to_their_job(store: CacheStore) -> None:
    await store.acquire("k", wish("a"))
    await store.record_job("k", "a", JOB)
    await store.add_holder("k", JOB.request_id, "second")
    await store.record_job("k", "a", OTHER_JOB)
    assert await store.remove_holder("k", OTHER_JOB.request_id, OTHER_JOB.request_id)


async def test_holders_stay_when_another_takes_over(
    machines: Machines, store: CacheStore, other: CacheStore
) -> None:
    await store.acquire("k", wish("a", LEASE))
    await store.record_job("k", "a", JOB)
    await machines.lapse(LEASE + 0.05)
    await other.acquire("k", wish("b"))
    await other.record_job("k", "b", JOB)
    assert await other.add_holder("k", JOB.request_id, "second")
    assert not await other.remove_holder("k", JOB.request_id, JOB.request_id)
    assert await other.remove_holder("k", JOB.request_id, "second")


async def test_a_join_and_the_last_leave_at_once_never_both_succeed(
    store: CacheStore, other: CacheStore
) -> None:
    for n in range(50):
        key = f"k{n}"
        await store.acquire(key, wish("a"))
        await store.record_job(key, "a", JOB)
        pair = [
            other.add_holder(key, JOB.request_id, "second"),
            store.remove_holder(key, JOB.request_id, JOB.request_id),
        ]
        joined, was_last = await asyncio.gather(*pair)
        assert joined is not was_last


CLAIM = VirtualRequest("k", "ann", "fal-ai/flux")


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(CLAIM, id="a result's"),
        pytest.param(replace(CLAIM, job=JOB), id="a shared job's"),
        pytest.param(replace(CLAIM, is_cancelled=True, job=JOB), id="a cancelled one"),
        pytest.param(replace(CLAIM, owner="", app=""), id="nobody's"),
        pytest.param(
            replace(CLAIM, failure=SharedFailure(422, "text/plain", bytes(range(256)) * 2)),
            id="a failed run's, with a body of all bytes",
        ),
        pytest.param(replace(CLAIM, failure=SharedFailure(500, "", b"")), id="an empty failure's"),
    ],
)
async def test_a_claim_comes_back_as_it_was(
    store: CacheStore, other: CacheStore, claim: VirtualRequest
) -> None:
    await store.put_virtual_request(
        "id", replace(CLAIM, job=OTHER_JOB, failure=SharedFailure(1, "x", b"\n"))
    )
    await store.put_virtual_request("id", claim)
    assert await other.get_virtual_request("id") == claim
    assert await other.get_virtual_request("another") is None


@pytest.mark.parametrize("verb", ["accept", "give away", "finish", "leave"])
@pytest.mark.parametrize("is_own", [True, False], ids=["own", "another process's"])
async def test_whoever_watches_is_told(
    store: CacheStore, other: CacheStore, verb: str, is_own: bool
) -> None:
    await other.acquire("k", wish("a"))
    if verb == "leave":
        await other.record_job("k", "a", JOB)
    teller = store if is_own else other
    with store.watch("k") as event, store.watch("another") as nothing:
        await settled(store, event, nothing)
        if verb == "accept":
            await teller.record_job("k", "a", JOB)
        elif verb == "give away":
            await teller.renew_lease("k", "a", 0)
        elif verb == "finish":
            await teller.finish("k", "a", None)
        else:
            await teller.remove_holder("k", JOB.request_id, JOB.request_id)
        assert await heard(event)
        assert not nothing.is_set()


async def settled(store: CacheStore, *events: asyncio.Event) -> None:
    """Whatever a store says because it has just begun to listen has been said."""
    await store.get("k")
    if store.is_remote:
        await asyncio.sleep(0.1)
    for event in events:
        event.clear()


async def test_a_sign_of_life_is_no_change(store: CacheStore, other: CacheStore) -> None:
    await other.acquire("k", wish("a"))
    with store.watch("k") as event:
        await settled(store, event)
        await other.renew_lease("k", "a", 10)
        await other.acquire("k", wish("b"))
        assert not await heard(event, 0.15)


async def test_all_who_watch_are_told_and_who_stopped_is_not(
    store: CacheStore, other: CacheStore
) -> None:
    await other.acquire("k", wish("a"))
    with store.watch("k") as first:
        with store.watch("k") as second:
            await settled(store, first, second)
        await other.finish("k", "a", None)
        assert await heard(first)
    assert not second.is_set()


async def test_a_watch_can_be_taken_up_again(store: CacheStore, other: CacheStore) -> None:
    for n in range(3):
        await other.acquire("k", wish(str(n)))
        with store.watch("k") as event:
            await settled(store, event)
            await other.finish("k", str(n), None)
            assert await heard(event)


async def test_a_change_after_the_first_look_is_not_missed(
    store: CacheStore, other: CacheStore
) -> None:
    for n in range(10):
        await other.acquire("k", wish(str(n)))
        with store.watch("k") as event:
            assert (await store.get("k")).flight is not None
            await other.finish("k", str(n), None)
            assert await heard(event)


async def test_what_is_there_is_counted_and_results_can_be_forgotten(
    machines: Machines, store: CacheStore, other: CacheStore
) -> None:
    for n in range(3):
        await store.finish(f"k{n}", "a", machines.result(b"x" * 10))
    await store.acquire("k", wish("a"))
    await store.put_virtual_request("id", CLAIM)
    assert await other.stats() == StoreStats(3, 30, 1, 1)
    assert await other.clear() == 3
    assert await store.stats() == StoreStats(0, 0, 1, 1)
    assert await store.clear() == 0


@pytest.mark.parametrize("size", [0, 1, 2**24], ids=["empty", "one byte", "16 MiB"])
async def test_documents_are_bytes(
    machines: Machines, store: CacheStore, other: CacheStore, size: int
) -> None:
    result = machines.result((bytes(range(256)) * (size // 256 + 1))[:size])
    await store.finish("k", "a", result)
    assert await other.get("k") == Lookup(result)
    assert await other.acquire("k", wish()) == Lookup(result)


ODD = [
    "{",
    "}",
    "{a}b",
    "a{}",
    "a:result",
    "*",
    "a b\n\r\0",
    "ключ 🔑",
    "%7B",
    "'\"; --",
    "a" * 5000,
]


@pytest.mark.parametrize("key", ODD, ids=ascii)
async def test_a_key_is_any_text(
    machines: Machines, store: CacheStore, other: CacheStore, key: str
) -> None:
    assert (await store.acquire(key, wish(key))).is_leader
    assert await store.record_job(key, key, Job(key, key, key))
    assert await store.add_holder(key, key, f"{key}2")
    with other.watch(key) as event:
        await settled(other, event)
        result = machines.result()
        await store.finish(key, key, result)
        assert await heard(event)
    assert await other.get(key) == Lookup(result)
    await store.put_virtual_request(key, VirtualRequest(key, key, key))
    assert await other.get_virtual_request(key) == VirtualRequest(key, key, key)
    assert await store.stats() == StoreStats(1, 2, 0, 1)
    assert await store.clear() == 1


async def test_a_call_that_is_cancelled_leaves_the_store_usable(store: CacheStore) -> None:
    for _ in range(50):
        task = asyncio.ensure_future(store.get("k"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    calls = [store.get("k") for _ in range(50)]
    assert await asyncio.gather(*calls) == [Lookup()] * 50
