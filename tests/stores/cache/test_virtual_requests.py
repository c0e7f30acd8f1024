"""Virtual request ids, and their meaning in memory and in the store."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from falproxy.stores.cache import (
    CachedResult,
    SharedFailure,
    StoreContent,
    StoreError,
    VirtualRequest,
)
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.virtual_requests import (
    CACHE_MAX_BYTES,
    CACHE_SIZE,
    ENTRY_BYTES,
    LOCAL_TTL,
    RESULTS_MAX_BYTES,
    VirtualRequests,
    is_virtual_id,
    new_virtual_id,
    size_in_memory,
)
from tests.support.fake_clock import FakeClock
from tests.support.fake_store import STORE_DOWN, VIRTUAL_REQUEST, FakeStore
from tests.support.waiting import wait_until

TIMEOUT = 5.0  # seconds; of `wait_until`


@pytest.mark.parametrize(
    ("request_id", "expected"),
    [
        pytest.param("00000000-0000-8000-8000-000000000000", True, id="version 8"),
        pytest.param("ffffffff-ffff-8fff-bfff-ffffffffffff", True, id="highest digits"),
        pytest.param("00000000-0000-4000-8000-000000000000", False, id="version 4, of fal"),
        pytest.param("00000000-0000-8000-c000-000000000000", False, id="another variant"),
        pytest.param("00000000-0000-8000-8000-00000000000", False, id="too short"),
        pytest.param("00000000-0000-8000-8000-0000000000000", False, id="too long"),
        pytest.param("00000000-0000-8000-8000-000000000000\n", False, id="line end"),
        pytest.param("00000000000080008000000000000000", False, id="without dashes"),
        pytest.param("", False, id="empty"),
    ],
)
def test_a_virtual_id_is_recognized_by_its_form(request_id: str, expected: bool) -> None:
    assert is_virtual_id(request_id) is expected


def test_virtual_ids_are_random_uuids_of_version_8() -> None:
    ids = [new_virtual_id() for _ in range(1000)]
    assert len({*ids}) == 1000
    assert all(is_virtual_id(request_id) for request_id in ids)
    assert {(UUID(request_id).version, UUID(request_id).variant) for request_id in ids} == {
        (8, "specified in RFC 4122")
    }
    assert not any(is_virtual_id(str(uuid4())) for _ in range(1000))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def virtual_requests(breaker: StoreBreaker, clock: FakeClock) -> VirtualRequests:
    return VirtualRequests(breaker, clock)


async def test_a_virtual_request_is_in_the_store(
    virtual_requests: VirtualRequests, breaker: StoreBreaker, store: FakeStore
) -> None:
    await virtual_requests.put("id", VIRTUAL_REQUEST)
    assert store.virtual_requests == {"id": VIRTUAL_REQUEST}
    assert await VirtualRequests(breaker).get("id") == VIRTUAL_REQUEST
    assert await virtual_requests.get("another") is None


async def test_the_memory_is_used_for_a_second_without_the_store(
    virtual_requests: VirtualRequests, store: FakeStore, clock: FakeClock
) -> None:
    await virtual_requests.put("id", VIRTUAL_REQUEST)
    assert await virtual_requests.get("id") == VIRTUAL_REQUEST
    assert "get_virtual_request" not in store.operations
    clock.now += LOCAL_TTL
    cancelled = VirtualRequest("key", "ann", "fal-ai/flux", is_cancelled=True)
    store.virtual_requests["id"] = cancelled
    assert await virtual_requests.get("id") == cancelled
    assert virtual_requests.peek("id") == cancelled


async def test_virtual_requests_of_this_process_are_known_without_the_store(
    virtual_requests: VirtualRequests, store: FakeStore, clock: FakeClock
) -> None:
    store.error = STORE_DOWN
    await virtual_requests.put("id", VIRTUAL_REQUEST)
    clock.now += 10 * LOCAL_TTL
    assert await virtual_requests.get("id") == VIRTUAL_REQUEST
    with pytest.raises(StoreError):
        await virtual_requests.get("another")


async def test_a_virtual_request_is_written_after_the_recovery_of_the_store(
    virtual_requests: VirtualRequests, breaker: StoreBreaker, store: FakeStore, clock: FakeClock
) -> None:
    store.error = STORE_DOWN
    await virtual_requests.put("id", VIRTUAL_REQUEST)
    store.error = None
    await wait_until(lambda: not breaker.is_open, seconds=TIMEOUT)
    clock.now += LOCAL_TTL
    assert await virtual_requests.get("id") == VIRTUAL_REQUEST


async def test_the_result_of_a_new_virtual_id_is_in_memory(
    virtual_requests: VirtualRequests, store: FakeStore
) -> None:
    result = CachedResult(b"{}", "application/json", 1.0, 2.0)
    await virtual_requests.put("id", VIRTUAL_REQUEST, result)
    assert virtual_requests.cached_result("id") == result
    assert virtual_requests.cached_result("another") is None


async def test_results_in_memory_are_bounded(virtual_requests: VirtualRequests) -> None:
    """By their bytes; the oldest are dropped."""
    size = RESULTS_MAX_BYTES // 4 - ENTRY_BYTES
    for number in range(6):
        result = CachedResult(bytes(size), "application/json", 1.0, 2.0)
        await virtual_requests.put(str(number), VIRTUAL_REQUEST, result)
    assert [virtual_requests.cached_result(str(number)) is not None for number in range(6)] == [
        *[False] * 2, *[True] * 4
    ]  # fmt: skip


async def test_a_result_that_is_put_twice_is_counted_once(
    virtual_requests: VirtualRequests,
) -> None:
    result = CachedResult(bytes(RESULTS_MAX_BYTES // 4), "application/json", 1.0, 2.0)
    for _ in range(6):
        await virtual_requests.put("id", VIRTUAL_REQUEST, result)
    assert virtual_requests.cached_result("id") is not None
    await virtual_requests.put("other", VIRTUAL_REQUEST, result)
    assert virtual_requests.cached_result("id") is not None


async def test_virtual_requests_in_memory_are_bounded(
    breaker: StoreBreaker, store: FakeStore
) -> None:
    virtual_requests = VirtualRequests(breaker)
    await virtual_requests.put("first", VIRTUAL_REQUEST)
    store.error = STORE_DOWN
    count = CACHE_MAX_BYTES // size_in_memory(VIRTUAL_REQUEST)
    assert 0.9 * CACHE_SIZE < count <= CACHE_SIZE
    for number in range(count):
        await virtual_requests.put(str(number), VIRTUAL_REQUEST)
    assert virtual_requests.peek("first") is None
    assert virtual_requests.peek("0") == VIRTUAL_REQUEST


async def test_failures_in_memory_are_bounded_by_their_bytes(breaker: StoreBreaker) -> None:
    virtual_requests = VirtualRequests(breaker)
    failure = SharedFailure(500, "", bytes(CACHE_MAX_BYTES // 4))
    for number in range(6):
        failed = replace(VIRTUAL_REQUEST, failure=failure)
        await virtual_requests.put(str(number), failed)
    in_memory = [virtual_requests.peek(str(number)) is not None for number in range(6)]
    assert in_memory == [False] * 3 + [True] * 3


async def test_a_failure_larger_than_the_memory_is_in_the_store_only(
    virtual_requests: VirtualRequests, store: FakeStore
) -> None:
    failed = replace(VIRTUAL_REQUEST, failure=SharedFailure(500, "", bytes(CACHE_MAX_BYTES)))
    await virtual_requests.put("id", VIRTUAL_REQUEST)
    await virtual_requests.put("id", failed)
    assert virtual_requests.peek("id") is None
    assert await virtual_requests.get("id") == failed


@pytest.fixture
def remote_store() -> FakeStore:
    return FakeStore(is_remote=True, content=StoreContent("first", is_new=False))


@pytest.fixture
async def remote_breaker(remote_store: FakeStore) -> AsyncIterator[StoreBreaker]:
    async with StoreBreaker(remote_store) as breaker:
        await wait_until(lambda: remote_store.operations.count("probe") > 1, seconds=TIMEOUT)
        yield breaker


def empty(store: FakeStore) -> None:
    store.virtual_requests.clear()
    store.results.clear()
    store.content = StoreContent("second", is_new=True)


async def test_an_emptied_store_gets_the_ids_and_results_in_memory(
    remote_breaker: StoreBreaker, remote_store: FakeStore
) -> None:
    result = CachedResult(b"{}", "application/json", 1.0, 2.0)
    virtual_requests = VirtualRequests(remote_breaker)
    await virtual_requests.put("1", VIRTUAL_REQUEST, result)
    await virtual_requests.put("2", VIRTUAL_REQUEST)
    empty(remote_store)
    await wait_until(lambda: remote_store.results == {"key": result}, seconds=TIMEOUT)
    assert remote_store.virtual_requests == {"1": VIRTUAL_REQUEST, "2": VIRTUAL_REQUEST}


async def test_a_request_that_has_ended_is_restored_last(
    remote_breaker: StoreBreaker, remote_store: FakeStore
) -> None:
    """Another process may restore an earlier state of it."""
    cancelled = replace(VIRTUAL_REQUEST, is_cancelled=True)
    first, second = VirtualRequests(remote_breaker), VirtualRequests(remote_breaker)
    await first.put("1", cancelled)
    await second.put("1", VIRTUAL_REQUEST)
    await second.put("2", VIRTUAL_REQUEST)
    empty(remote_store)
    await wait_until(
        lambda: remote_store.virtual_requests.get("2") == VIRTUAL_REQUEST, seconds=TIMEOUT
    )
    await wait_until(lambda: remote_store.virtual_requests.get("1") == cancelled, seconds=TIMEOUT)


async def test_no_id_is_unknown_while_other_processes_restore_theirs(
    remote_breaker: StoreBreaker, remote_store: FakeStore
) -> None:
    virtual_requests = VirtualRequests(remote_breaker)
    empty(remote_store)
    await wait_until(lambda: not remote_breaker.is_complete, seconds=TIMEOUT)
    waiting = asyncio.create_task(virtual_requests.find("1"))
    await asyncio.sleep(1.0)
    assert not waiting.done()
    remote_store.virtual_requests["1"] = VIRTUAL_REQUEST
    assert await waiting == VIRTUAL_REQUEST


async def test_an_id_that_cannot_be_looked_up_fails_at_once(
    virtual_requests: VirtualRequests, store: FakeStore
) -> None:
    store.error = STORE_DOWN
    async with asyncio.timeout(0.5):
        with pytest.raises(StoreError):
            await virtual_requests.find("1")
