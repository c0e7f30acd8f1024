"""Contract of the cache stores, SQLite and Redis."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from falproxy.stores.cache import (
    GRACE_PERIOD,
    AcquireRequest,
    CachedResult,
    CacheStore,
    Job,
    Lookup,
    RequestOwner,
    SharedCallRecord,
    SharedFailure,
    SharedOutcome,
    StoreStats,
    VirtualRequest,
)
from falproxy.stores.cache.redis import RedisStore
from falproxy.stores.cache.sqlite import SqliteStore
from tests.support.store_processes import StoreProcesses

LEASE = 0.2
JOB = Job("job-1", "fal-ai/flux", "mark")
OTHER_JOB = Job("job-2", "fal-ai/flux")


class Processes(StoreProcesses[CacheStore]):
    async def store(self) -> CacheStore:
        store = await super().store()
        await store.probe()
        return store

    def result(self, body: bytes = b"{}", age: float = 0.0, ttl: float = 60.0) -> CachedResult:
        """A result that was stored `age` seconds ago."""
        stored_at = round(self.now() - age, 3)
        return CachedResult(body, "application/json", stored_at, stored_at + ttl)


@pytest.fixture(params=["sqlite", "redis"])
async def processes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Processes]:
    if request.param == "sqlite":
        file = tmp_path / "data" / "cache.sqlite"
        shared = Processes.with_clock(lambda clock: SqliteStore(file, max_size=2**30, clock=clock))
    else:
        url, prefix = request.getfixturevalue("redis").url, f"{uuid4()}:"
        shared = Processes(lambda: RedisStore(url, prefix=prefix))
    async with shared.stack:
        yield shared


@pytest.fixture
async def store(processes: Processes) -> CacheStore:
    return await processes.store()


@pytest.fixture
async def other(processes: Processes) -> CacheStore:
    """The store of another process."""
    return await processes.store()


def acquire_request(token: str = "a", lease: float = 10.0, **fields: object) -> AcquireRequest:
    return replace(AcquireRequest(token, lease, is_run=False), **fields)  # type: ignore[arg-type]


async def is_set_within(event: asyncio.Event, seconds: float = 2.0) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def test_a_new_store_is_empty(store: CacheStore) -> None:
    assert await store.get("k") == Lookup()
    assert await store.get_virtual_request("id") is None
    assert await store.stats() == StoreStats(0, 0, 0, 0)


async def test_a_result_is_shared_by_all_processes(
    processes: Processes, store: CacheStore, other: CacheStore
) -> None:
    result = processes.result(b"document")
    await store.finish("k", "another", result)
    assert await other.get("k") == await store.get("k") == Lookup(result)
    assert await other.acquire("k", acquire_request()) == Lookup(result)
    assert await other.get("another") == Lookup()


async def test_an_expired_result_can_be_read_but_not_acquired(
    processes: Processes, store: CacheStore
) -> None:
    expired = processes.result(age=100, ttl=99)
    await store.finish("k", "a", expired)
    assert (await store.get("k")).result == expired
    lookup = await store.acquire("k", acquire_request())
    assert (lookup.result, lookup.is_leader) == (None, True)


async def test_a_result_is_deleted_after_its_grace_period(
    processes: Processes, store: CacheStore
) -> None:
    await store.finish("k", "a", processes.result(age=GRACE_PERIOD + 100, ttl=99))
    assert await store.get("k") == Lookup()


async def test_a_stored_result_expires(processes: Processes, store: CacheStore) -> None:
    await store.finish("k", "a", processes.result(ttl=LEASE))
    assert (await store.acquire("k", acquire_request())).result is not None
    await processes.wait(LEASE + 0.05)
    assert (await store.acquire("k", acquire_request())).is_leader


@pytest.mark.parametrize(
    ("offset", "is_leader"),
    [
        pytest.param(-1.0, False, id="stored after it"),
        pytest.param(0.0, True, id="stored at that moment"),
        pytest.param(1.0, True, id="stored before it"),
    ],
)
async def test_a_result_must_be_newer_than_min_stored_at(
    processes: Processes, store: CacheStore, offset: float, is_leader: bool
) -> None:
    result = processes.result(age=5)
    await store.finish("k", "a", result)
    lookup = await store.acquire("k", acquire_request(min_stored_at=result.stored_at + offset))
    assert (lookup.is_leader, lookup.result) == (is_leader, None if is_leader else result)


async def test_a_newer_result_replaces_an_older_one(
    processes: Processes, store: CacheStore
) -> None:
    await store.finish("k", "a", processes.result(b"old" * 100))
    newer = processes.result(b"new")
    await store.finish("k", "a", newer)
    assert await store.get("k") == Lookup(newer)
    assert (await store.stats()).size == 3


@pytest.mark.parametrize("is_run", [True, False], ids=["run", "submit"])
async def test_the_first_call_leads_and_the_second_gets_its_flight(
    store: CacheStore, other: CacheStore, is_run: bool
) -> None:
    lookup = await store.acquire("k", acquire_request("a", is_run=is_run))
    assert lookup.is_leader
    assert lookup.shared_call is not None
    for seen in (await other.acquire("k", acquire_request("b")), await other.get("k")):
        assert (seen.is_leader, seen.result) == (False, None)
        assert seen.shared_call is not None
        assert 9 < seen.shared_call.lease_left <= 10.001
        assert replace(seen.shared_call, lease_left=0) == SharedCallRecord("a", is_run, None, 0)


async def test_a_repeated_acquire_with_the_same_token_returns_the_same(
    store: CacheStore, other: CacheStore
) -> None:
    for process in (store, store, other):
        assert (await process.acquire("k", acquire_request("a"))).is_leader
        assert not (await process.acquire("k", acquire_request("b"))).is_leader


async def test_keys_have_flights_of_their_own(store: CacheStore) -> None:
    assert (await store.acquire("k", acquire_request("a"))).is_leader
    assert (await store.acquire("l", acquire_request("b"))).is_leader


@pytest.mark.parametrize("job", [None, JOB], ids=["without a job", "with its job"])
async def test_a_flight_is_taken_over_after_its_lease(
    processes: Processes, store: CacheStore, other: CacheStore, job: Job | None
) -> None:
    await store.acquire("k", acquire_request("a", LEASE))
    if job is not None:
        await store.record_job("k", "a", job)
    await processes.wait(LEASE + 0.05)
    expired = await other.get("k")
    assert expired.shared_call is not None
    assert expired.shared_call.lease_left <= 0
    lookup = await other.acquire("k", acquire_request("b", is_run=True))
    assert lookup.is_leader
    assert lookup.shared_call is not None
    assert (lookup.shared_call.owner_token, lookup.shared_call.job) == ("b", job)
    assert lookup.shared_call.is_run is (job is None)
    assert not (await store.acquire("k", acquire_request("a"))).is_leader


async def test_a_renewed_lease_prevents_a_takeover(
    processes: Processes, store: CacheStore, other: CacheStore
) -> None:
    await store.acquire("k", acquire_request("a", 0.5))
    for _ in range(3):
        await processes.wait(0.2)
        assert await store.renew_lease("k", "a", 0.5)
    assert not (await other.acquire("k", acquire_request("b"))).is_leader


async def test_a_lease_of_zero_gives_up_the_lead(store: CacheStore, other: CacheStore) -> None:
    await store.acquire("k", acquire_request("a"))
    await store.record_job("k", "a", JOB)
    assert await store.renew_lease("k", "a", 0)
    lookup = await other.acquire("k", acquire_request("b"))
    assert lookup.is_leader
    assert lookup.shared_call is not None
    assert lookup.shared_call.job == JOB


async def test_a_former_leader_changes_nothing(processes: Processes, store: CacheStore) -> None:
    await store.acquire("k", acquire_request("a", LEASE))
    await processes.wait(LEASE + 0.05)
    await store.acquire("k", acquire_request("b"))
    assert not await store.renew_lease("k", "a", 10)
    assert not await store.record_job("k", "a", JOB)
    await store.finish("k", "a", None)
    lookup = await store.get("k")
    assert lookup.shared_call is not None
    assert (lookup.shared_call.owner_token, lookup.shared_call.job) == ("b", None)
    assert await store.record_job("k", "b", OTHER_JOB)


async def test_a_late_leader_still_leads_without_a_takeover(
    processes: Processes, store: CacheStore
) -> None:
    await store.acquire("k", acquire_request("a", LEASE))
    await processes.wait(LEASE + 0.05)
    assert await store.record_job("k", "a", JOB)
    assert await store.renew_lease("k", "a", 10)


async def test_without_a_flight_no_call_leads(store: CacheStore) -> None:
    assert not await store.record_job("k", "a", JOB)
    assert not await store.renew_lease("k", "a", 1)
    assert await store.get("k") == Lookup()


async def test_a_result_of_a_call_that_does_not_lead_is_stored(
    processes: Processes, store: CacheStore
) -> None:
    await store.acquire("k", acquire_request("b"))
    result = processes.result()
    await store.finish("k", "a", result)
    lookup = await store.get("k")
    assert lookup.result == result
    assert lookup.shared_call is not None


async def test_the_next_call_leads_after_the_end_of_a_flight(
    store: CacheStore, other: CacheStore
) -> None:
    await store.acquire("k", acquire_request("a"))
    await store.record_job("k", "a", JOB)
    await store.finish("k", "a", None)
    assert await store.get("k") == Lookup()
    lookup = await other.acquire("k", acquire_request("b"))
    assert lookup.is_leader
    assert lookup.shared_call is not None
    assert lookup.shared_call.job is None


OUTCOME = SharedOutcome(b"outcome", 1.0)


def waited_request(token: str, awaited: str, known: str = "") -> AcquireRequest:
    return acquire_request(token, awaited_token=awaited, known_outcome=known)


async def test_a_call_that_waited_for_a_leader_gets_its_outcome(
    store: CacheStore, other: CacheStore
) -> None:
    await store.acquire("k", acquire_request("a"))
    assert not (await other.acquire("k", acquire_request("b"))).is_leader
    await store.finish("k", "a", None, OUTCOME)
    new = await other.acquire("k", acquire_request("new"))
    assert (new.is_leader, new.last_outcome) == (True, "a")
    lookup = await other.acquire("k", waited_request("b", "a"))
    assert lookup.outcome is not None
    assert lookup.outcome.content == b"outcome"
    assert 1.0 <= lookup.outcome.age < 3.0
    assert not lookup.is_leader


async def test_a_call_that_missed_a_leader_gets_the_token_of_its_outcome(
    store: CacheStore, other: CacheStore
) -> None:
    await store.acquire("k", acquire_request("a"))
    await store.finish("k", "a", None, OUTCOME)
    lookup = await other.acquire("k", waited_request("b", "another"))
    assert lookup == Lookup(last_outcome="a")
    assert (await other.acquire("k", waited_request("b", "another", "a"))).is_leader


async def test_only_the_outcome_of_the_leader_without_a_result_is_recorded(
    processes: Processes, store: CacheStore
) -> None:
    await store.acquire("k", acquire_request("a"))
    await store.finish("k", "another", None, OUTCOME)
    assert (await store.get("k")).last_outcome == ""
    await store.finish("k", "a", processes.result(), OUTCOME)
    assert (await store.get("k")).last_outcome == ""


async def test_concurrent_acquire_and_finish_never_make_two_leaders(
    processes: Processes, store: CacheStore, other: CacheStore
) -> None:
    result = processes.result()
    for n in range(100):
        key = f"k{n}"
        await store.acquire(key, acquire_request("a"))
        first, _, second = await asyncio.gather(
            other.acquire(key, acquire_request("b")),
            store.finish(key, "a", result),
            other.acquire(key, acquire_request("c")),
        )
        assert not first.is_leader
        assert not second.is_leader


async def test_one_of_a_hundred_concurrent_calls_leads(processes: Processes) -> None:
    stores = [await processes.store() for _ in range(3)]
    calls = (stores[n % 3].acquire("k", acquire_request(str(n))) for n in range(100))
    lookups = await asyncio.gather(*calls)
    assert sum(lookup.is_leader for lookup in lookups) == 1
    assert len({lookup.shared_call.owner_token for lookup in lookups if lookup.shared_call}) == 1


async def test_the_last_holder_ends_the_flight(store: CacheStore, other: CacheStore) -> None:
    await store.acquire("k", acquire_request("a"))
    await store.record_job("k", "a", JOB)
    assert await other.add_holder("k", JOB.request_id, "second")
    assert not await store.remove_holder("k", JOB.request_id, JOB.request_id)
    assert await other.remove_holder("k", JOB.request_id, "second")
    assert not await store.add_holder("k", JOB.request_id, "third")
    assert not await store.renew_lease("k", "a", 10)
    assert await store.get("k") == Lookup()


async def test_a_holder_removed_twice_counts_once(store: CacheStore) -> None:
    await store.acquire("k", acquire_request("a"))
    await store.record_job("k", "a", JOB)
    await store.add_holder("k", JOB.request_id, "second")
    for _ in range(2):
        assert not await store.remove_holder("k", JOB.request_id, JOB.request_id)
    assert await store.remove_holder("k", JOB.request_id, "second")
    assert await store.remove_holder("k", JOB.request_id, "second") is None


async def test_only_a_job_in_flight_can_be_joined(store: CacheStore) -> None:
    assert not await store.add_holder("k", JOB.request_id, "early")
    await store.acquire("k", acquire_request("a"))
    assert not await store.add_holder("k", JOB.request_id, "early")
    await store.record_job("k", "a", JOB)
    assert not await store.add_holder("k", OTHER_JOB.request_id, "wrong")
    await store.finish("k", "a", None)
    assert not await store.add_holder("k", JOB.request_id, "late")


async def test_a_holder_of_another_job_does_not_end_the_flight(store: CacheStore) -> None:
    await store.acquire("k", acquire_request("a"))
    await store.record_job("k", "a", JOB)
    assert await store.remove_holder("k", OTHER_JOB.request_id, OTHER_JOB.request_id) is None
    assert await store.add_holder("k", JOB.request_id, "second")


async def test_a_new_job_has_new_holders(store: CacheStore) -> None:
    await store.acquire("k", acquire_request("a"))
    await store.record_job("k", "a", JOB)
    await store.add_holder("k", JOB.request_id, "second")
    await store.record_job("k", "a", OTHER_JOB)
    assert await store.remove_holder("k", OTHER_JOB.request_id, OTHER_JOB.request_id)


async def test_holders_stay_after_a_takeover(
    processes: Processes, store: CacheStore, other: CacheStore
) -> None:
    await store.acquire("k", acquire_request("a", LEASE))
    await store.record_job("k", "a", JOB)
    await processes.wait(LEASE + 0.05)
    await other.acquire("k", acquire_request("b"))
    await other.record_job("k", "b", JOB)
    assert await other.add_holder("k", JOB.request_id, "second")
    assert not await other.remove_holder("k", JOB.request_id, JOB.request_id)
    assert await other.remove_holder("k", JOB.request_id, "second")


async def test_concurrent_add_and_last_remove_never_both_succeed(
    store: CacheStore, other: CacheStore
) -> None:
    for n in range(50):
        key = f"k{n}"
        await store.acquire(key, acquire_request("a"))
        await store.record_job(key, "a", JOB)
        operations = [
            other.add_holder(key, JOB.request_id, "second"),
            store.remove_holder(key, JOB.request_id, JOB.request_id),
        ]
        was_added, was_last = await asyncio.gather(*operations)
        assert was_added is not was_last


VIRTUAL_REQUEST = VirtualRequest("k", "ann", "fal-ai/flux")


@pytest.mark.parametrize(
    "virtual_request",
    [
        pytest.param(VIRTUAL_REQUEST, id="cached result"),
        pytest.param(replace(VIRTUAL_REQUEST, job=JOB), id="shared job"),
        pytest.param(replace(VIRTUAL_REQUEST, is_cancelled=True, job=JOB), id="cancelled"),
        pytest.param(replace(VIRTUAL_REQUEST, owner="", app=""), id="anonymous owner"),
        pytest.param(
            replace(
                VIRTUAL_REQUEST, failure=SharedFailure(422, "text/plain", bytes(range(256)) * 2)
            ),
            id="failure with a body of all bytes",
        ),
        pytest.param(
            replace(VIRTUAL_REQUEST, failure=SharedFailure(500, "", b"")),
            id="failure with an empty body",
        ),
    ],
)
async def test_a_virtual_request_is_returned_unchanged(
    store: CacheStore, other: CacheStore, virtual_request: VirtualRequest
) -> None:
    await store.put_virtual_request(
        "id", replace(VIRTUAL_REQUEST, job=OTHER_JOB, failure=SharedFailure(1, "x", b"\n"))
    )
    await store.put_virtual_request("id", virtual_request)
    assert await other.get_virtual_request("id") == virtual_request
    assert await other.get_virtual_request("another") is None


OWNER = RequestOwner("ann", "mark")


@pytest.mark.parametrize(
    "owner",
    [
        pytest.param(OWNER, id="a named caller"),
        pytest.param(RequestOwner("", ""), id="an anonymous caller"),
        pytest.param(RequestOwner('jwt:ü \n" \\ \0', "mark"), id="any characters"),
    ],
)
async def test_an_owner_is_returned_unchanged_to_every_process(
    store: CacheStore, other: CacheStore, owner: RequestOwner
) -> None:
    await store.put_owner("id", owner)
    assert await store.get_owner("id") == await other.get_owner("id") == owner
    assert await other.get_owner("another") is None


async def test_the_first_owner_stays(store: CacheStore, other: CacheStore) -> None:
    assert await store.put_owner("id", OWNER) is True
    for process in (store, other):
        assert await process.put_owner("id", RequestOwner("bob", "")) is False
        assert await process.get_owner("id") == OWNER


async def test_of_concurrent_owners_one_stays_for_every_process(
    store: CacheStore, other: CacheStore
) -> None:
    owners = [RequestOwner(str(number), "") for number in range(20)]
    stores = (store, other)
    are_new = await asyncio.gather(
        *(stores[n % 2].put_owner("id", owner) for n, owner in enumerate(owners))
    )
    assert are_new.count(True) == 1
    winner = await store.get_owner("id")
    assert winner == owners[are_new.index(True)]
    assert await other.get_owner("id") == winner


async def test_owners_and_virtual_requests_are_separate(store: CacheStore) -> None:
    await store.put_owner("id", OWNER)
    assert await store.get_virtual_request("id") is None
    assert (await store.stats()).virtual_ids == 0
    await store.put_virtual_request("id", VIRTUAL_REQUEST)
    assert await store.get_owner("id") == OWNER


async def test_owners_stay_when_the_results_are_cleared(
    processes: Processes, store: CacheStore
) -> None:
    await store.finish("k", "a", processes.result())
    await store.put_owner("id", OWNER)
    assert await store.clear() == 1
    assert await store.get_owner("id") == OWNER


@pytest.mark.parametrize("operation", ["record_job", "give up the lead", "finish", "remove_holder"])
@pytest.mark.parametrize("is_own", [True, False], ids=["own", "another process's"])
async def test_watchers_are_notified_of_changes(
    store: CacheStore, other: CacheStore, operation: str, is_own: bool
) -> None:
    await other.acquire("k", acquire_request("a"))
    if operation == "remove_holder":
        await other.record_job("k", "a", JOB)
    writer = store if is_own else other
    with store.watch("k") as event, store.watch("another") as unrelated:
        await discard_initial_events(store, event, unrelated)
        if operation == "record_job":
            await writer.record_job("k", "a", JOB)
        elif operation == "give up the lead":
            await writer.renew_lease("k", "a", 0)
        elif operation == "finish":
            await writer.finish("k", "a", None)
        else:
            await writer.remove_holder("k", JOB.request_id, JOB.request_id)
        assert await is_set_within(event)
        assert not unrelated.is_set()


async def discard_initial_events(store: CacheStore, *events: asyncio.Event) -> None:
    """Wait for the notification of every watcher at the start of a subscription."""
    await store.get("k")
    if store.is_remote:
        await asyncio.sleep(0.1)
    for event in events:
        event.clear()


async def test_a_renewed_lease_notifies_no_watcher(store: CacheStore, other: CacheStore) -> None:
    await other.acquire("k", acquire_request("a"))
    with store.watch("k") as event:
        await discard_initial_events(store, event)
        await other.renew_lease("k", "a", 10)
        await other.acquire("k", acquire_request("b"))
        assert not await is_set_within(event, 0.15)


async def test_all_current_watchers_are_notified(store: CacheStore, other: CacheStore) -> None:
    await other.acquire("k", acquire_request("a"))
    with store.watch("k") as first:
        with store.watch("k") as second:
            await discard_initial_events(store, first, second)
        await other.finish("k", "a", None)
        assert await is_set_within(first)
    assert not second.is_set()


async def test_a_key_can_be_watched_again(store: CacheStore, other: CacheStore) -> None:
    for n in range(3):
        await other.acquire("k", acquire_request(str(n)))
        with store.watch("k") as event:
            await discard_initial_events(store, event)
            await other.finish("k", str(n), None)
            assert await is_set_within(event)


async def test_a_change_after_the_first_read_is_not_missed(
    store: CacheStore, other: CacheStore
) -> None:
    for n in range(10):
        await other.acquire("k", acquire_request(str(n)))
        with store.watch("k") as event:
            assert (await store.get("k")).shared_call is not None
            await other.finish("k", str(n), None)
            assert await is_set_within(event)


async def test_the_content_is_counted_and_results_can_be_cleared(
    processes: Processes, store: CacheStore, other: CacheStore
) -> None:
    for n in range(3):
        await store.finish(f"k{n}", "a", processes.result(b"x" * 10))
    await store.acquire("k", acquire_request("a"))
    await store.put_virtual_request("id", VIRTUAL_REQUEST)
    assert await other.stats() == StoreStats(3, 30, 1, 1)
    assert await other.clear() == 3
    assert await store.stats() == StoreStats(0, 0, 1, 1)
    assert await store.clear() == 0


@pytest.mark.parametrize("size", [0, 1, 2**24], ids=["empty", "one byte", "16 MiB"])
async def test_a_document_is_returned_unchanged(
    processes: Processes, store: CacheStore, other: CacheStore, size: int
) -> None:
    result = processes.result((bytes(range(256)) * (size // 256 + 1))[:size])
    await store.finish("k", "a", result)
    assert await other.get("k") == Lookup(result)
    assert await other.acquire("k", acquire_request()) == Lookup(result)


UNUSUAL_KEYS = [
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


@pytest.mark.parametrize("key", UNUSUAL_KEYS, ids=ascii)
async def test_keys_and_ids_may_be_any_text(
    processes: Processes, store: CacheStore, other: CacheStore, key: str
) -> None:
    assert (await store.acquire(key, acquire_request(key))).is_leader
    assert await store.record_job(key, key, Job(key, key, key))
    assert await store.add_holder(key, key, f"{key}2")
    with other.watch(key) as event:
        await discard_initial_events(other, event)
        result = processes.result()
        await store.finish(key, key, result)
        assert await is_set_within(event)
    assert await other.get(key) == Lookup(result)
    await store.put_virtual_request(key, VirtualRequest(key, key, key))
    assert await other.get_virtual_request(key) == VirtualRequest(key, key, key)
    await store.put_owner(key, RequestOwner(key, key))
    assert await other.get_owner(key) == RequestOwner(key, key)
    assert await store.stats() == StoreStats(1, 2, 0, 1)
    assert await store.clear() == 1


async def test_a_cancelled_call_leaves_the_store_usable(store: CacheStore) -> None:
    for _ in range(50):
        task = asyncio.ensure_future(store.get("k"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    calls = [store.get("k") for _ in range(50)]
    assert await asyncio.gather(*calls) == [Lookup()] * 50
