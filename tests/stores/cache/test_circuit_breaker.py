"""The guard before a store, and the memory of request ids that is there without one."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from uuid import UUID, uuid4

import pytest

from falproxy.stores.cache import CachedResult, StoreError, VirtualRequest
from falproxy.stores.cache.circuit_breaker import (
    CALL_TIMEOUT,
    PROBE_INTERVAL,
    SLOW_PROBES_TO_TRIP,
    SLOW_SECONDS,
    StoreBreaker,
)
from falproxy.stores.cache.virtual_ids import (
    CACHE_SIZE,
    LOCAL_TTL,
    RESULTS_MAX_BYTES,
    VirtualRequests,
    is_virtual_id,
    new_virtual_id,
)
from tests.stores.cache.test_single_flight import FakeStore

CLAIM = VirtualRequest("key", "ann", "fal-ai/flux")
AWAY = StoreError("it is away")
SOON = 5.0


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def guard(store: FakeStore) -> AsyncIterator[StoreBreaker]:
    async with StoreBreaker(store) as guard:
        yield guard


async def test_a_store_that_is_well_is_asked(guard: StoreBreaker, store: FakeStore) -> None:
    store.claims["id"] = CLAIM
    assert await guard.call(store.get_virtual_request("id")) == CLAIM
    assert not guard.is_open


@pytest.mark.parametrize("is_remote", [False, True])
async def test_only_a_remote_store_is_looked_at_while_it_is_well(is_remote: bool) -> None:
    store = FakeStore(is_remote=is_remote)
    async with StoreBreaker(store):
        await asyncio.sleep(PROBE_INTERVAL * 1.6)
    assert ("probe" in store.asked) == is_remote


async def test_a_late_answer_is_an_answer(guard: StoreBreaker, store: FakeStore) -> None:
    store.claims["id"] = CLAIM
    store.delay = 4 * SLOW_SECONDS
    assert await guard.call(store.get_virtual_request("id")) == CLAIM
    assert not guard.is_open


@pytest.mark.timed
async def test_a_store_that_hangs_costs_one_call_its_patience(
    guard: StoreBreaker, store: FakeStore
) -> None:
    store.frozen.clear()
    started = time.monotonic()
    with pytest.raises(StoreError, match="in time"):
        await guard.call(store.get("key"))
    assert time.monotonic() - started < CALL_TIMEOUT + 0.3
    assert guard.is_open
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(StoreError, match="skipped"):
            await guard.call(store.get("key"))
    assert time.monotonic() - started < SLOW_SECONDS
    assert store.asked.count("get") == 1


@pytest.mark.timed
async def test_many_who_wait_for_a_store_that_hangs_wait_together(
    guard: StoreBreaker, store: FakeStore
) -> None:
    store.frozen.clear()
    started = time.monotonic()
    answers = await asyncio.gather(
        *(guard.call(store.get("key")) for _ in range(50)), return_exceptions=True
    )
    assert {type(answer) for answer in answers} == {StoreError}
    assert time.monotonic() - started < CALL_TIMEOUT + 0.5


async def test_a_store_that_fails_is_skipped_until_it_is_back(
    guard: StoreBreaker, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.trouble = AWAY
    with pytest.raises(StoreError, match="away"):
        await guard.call(store.get("key"))
    assert guard.is_open
    await until(lambda: store.asked.count("probe") >= 2)
    assert guard.is_open
    store.trouble = None
    await until(lambda: not guard.is_open)
    await guard.call(store.get("key"))
    said = [record.getMessage() for record in caplog.records if record.name.endswith("guard")]
    assert said == ["The result cache is done without for now: it is away",
                    "The result cache is back"]  # fmt: skip


async def test_a_store_that_is_away_at_the_start_is_no_reason_not_to_start() -> None:
    class Broken(FakeStore):
        async def __aenter__(self) -> "Broken":
            raise AWAY

    async with StoreBreaker(Broken()) as guard:
        assert guard.is_open


async def test_a_slow_store_is_found_out_by_the_guard() -> None:
    store = FakeStore(is_remote=True)
    async with StoreBreaker(store) as guard:
        store.delay = 3 * SLOW_SECONDS
        await until(lambda: guard.is_open)
        assert store.asked.count("probe") >= SLOW_PROBES_TO_TRIP
        store.delay = 0.0
        await until(lambda: not guard.is_open)


async def test_one_slow_answer_is_no_slow_store() -> None:
    store = FakeStore(is_remote=True)
    async with StoreBreaker(store) as guard:
        for delay in (3 * SLOW_SECONDS, 0.0) * SLOW_PROBES_TO_TRIP:
            store.delay = delay
            before = store.asked.count("probe")
            await until(lambda before=before: store.asked.count("probe") > before)  # type: ignore[misc]
            assert not guard.is_open


async def test_a_frozen_store_is_noticed_while_nobody_calls() -> None:
    store = FakeStore(is_remote=True)
    async with StoreBreaker(store) as guard:
        store.frozen.clear()
        await until(lambda: guard.is_open)
        store.frozen.set()
        await until(lambda: not guard.is_open)


async def test_a_busy_process_is_no_slow_store() -> None:
    """The event loop is held up by our own work, again and again."""
    store = FakeStore(is_remote=True)
    async with StoreBreaker(store) as guard:
        async with asyncio.timeout(SOON):
            while store.asked.count("probe") <= SLOW_PROBES_TO_TRIP:
                time.sleep(2 * SLOW_SECONDS)  # noqa: ASYNC251
                await asyncio.sleep(0)
                assert not guard.is_open


# --- Ids ---


@pytest.mark.parametrize(
    ("request_id", "own"),
    [
        pytest.param("00000000-0000-8000-8000-000000000000", True, id="version 8"),
        pytest.param("ffffffff-ffff-8fff-bfff-ffffffffffff", True, id="the last of them"),
        pytest.param("00000000-0000-4000-8000-000000000000", False, id="version 4, as fal's"),
        pytest.param("00000000-0000-8000-c000-000000000000", False, id="another variant"),
        pytest.param("00000000-0000-8000-8000-00000000000", False, id="too short"),
        pytest.param("00000000-0000-8000-8000-0000000000000", False, id="too long"),
        pytest.param("00000000-0000-8000-8000-000000000000\n", False, id="a line end"),
        pytest.param("00000000000080008000000000000000", False, id="without dashes"),
        pytest.param("", False, id="nothing"),
    ],
)
def test_our_ids_are_known_by_sight(request_id: str, own: bool) -> None:
    assert is_virtual_id(request_id) is own


def test_our_ids_are_uuids_that_nobody_can_guess() -> None:
    made = [new_virtual_id() for _ in range(1000)]
    assert len({*made}) == 1000
    assert all(is_virtual_id(request_id) for request_id in made)
    assert {(UUID(found).version, UUID(found).variant) for found in made} == {
        (8, "specified in RFC 4122")
    }
    assert not any(is_virtual_id(str(uuid4())) for _ in range(1000))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def claims(guard: StoreBreaker, clock: Clock) -> VirtualRequests:
    return VirtualRequests(guard, clock)


async def test_what_was_handed_out_is_known_to_all(
    claims: VirtualRequests, guard: StoreBreaker, store: FakeStore
) -> None:
    await claims.put("id", CLAIM)
    assert store.claims == {"id": CLAIM}
    assert await VirtualRequests(guard).get("id") == CLAIM
    assert await claims.get("another") is None


async def test_our_own_word_is_believed_for_a_moment(
    claims: VirtualRequests, store: FakeStore, clock: Clock
) -> None:
    await claims.put("id", CLAIM)
    assert await claims.get("id") == CLAIM
    assert "get_claim" not in store.asked
    clock.now += LOCAL_TTL
    cancelled = VirtualRequest("key", "ann", "fal-ai/flux", is_cancelled=True)
    store.claims["id"] = cancelled
    assert await claims.get("id") == cancelled
    assert claims.peek("id") == cancelled


async def test_what_this_process_handed_out_it_knows_without_the_store(
    claims: VirtualRequests, store: FakeStore, clock: Clock
) -> None:
    store.trouble = AWAY
    await claims.put("id", CLAIM)
    clock.now += 10 * LOCAL_TTL
    assert await claims.get("id") == CLAIM
    with pytest.raises(StoreError):
        await claims.get("another")


async def test_what_the_store_never_heard_of_is_known_when_it_is_back(
    claims: VirtualRequests, guard: StoreBreaker, store: FakeStore, clock: Clock
) -> None:
    store.trouble = AWAY
    await claims.put("id", CLAIM)
    store.trouble = None
    await until(lambda: not guard.is_open)
    clock.now += LOCAL_TTL
    assert await claims.get("id") == CLAIM


async def test_a_promised_result_is_at_hand(claims: VirtualRequests, store: FakeStore) -> None:
    result = CachedResult(b"{}", "application/json", 1.0, 2.0)
    await claims.put("id", CLAIM, result)
    assert claims.cached_result("id") == result
    assert claims.cached_result("another") is None


async def test_documents_at_hand_are_bounded(claims: VirtualRequests) -> None:
    """By their bytes; the oldest go."""
    size = RESULTS_MAX_BYTES // 4
    for number in range(6):
        result = CachedResult(bytes(size), "application/json", 1.0, 2.0)
        await claims.put(str(number), CLAIM, result)
    assert [claims.cached_result(str(number)) is not None for number in range(6)] == [
        *[False] * 2, *[True] * 4
    ]  # fmt: skip


async def test_a_document_that_is_put_twice_is_counted_once(claims: VirtualRequests) -> None:
    result = CachedResult(bytes(RESULTS_MAX_BYTES // 4), "application/json", 1.0, 2.0)
    for _ in range(6):
        await claims.put("id", CLAIM, result)
    assert claims.cached_result("id") is not None
    await claims.put("other", CLAIM, result)
    assert claims.cached_result("id") is not None


async def test_ids_in_memory_are_bounded(guard: StoreBreaker, store: FakeStore) -> None:
    claims = VirtualRequests(guard)
    await claims.put("first", CLAIM)
    store.trouble = AWAY
    for number in range(CACHE_SIZE):
        await claims.put(str(number), CLAIM)
    assert claims.peek("first") is None
    assert claims.peek("0") == CLAIM
