"""The guard before a store, and the memory of request ids that is there without one."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from uuid import UUID, uuid4

import pytest

from falproxy.stores.cache import Claim, Result, StoreError
from falproxy.stores.cache.circuit_breaker import EVERY, PATIENCE, SLOW, SLOW_ANSWERS, Guard
from falproxy.stores.cache.virtual_ids import (
    AT_HAND_MAX,
    BELIEVED,
    REMEMBERED_MAX,
    Claims,
    is_own,
    new_id,
)
from test_flights import FakeStore

CLAIM = Claim("key", "ann", "fal-ai/flux")
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
async def guard(store: FakeStore) -> AsyncIterator[Guard]:
    async with Guard(store) as guard:
        yield guard


async def test_a_store_that_is_well_is_asked(guard: Guard, store: FakeStore) -> None:
    store.claims["id"] = CLAIM
    assert await guard.ask(store.get_claim("id")) == CLAIM
    assert not guard.is_open


@pytest.mark.parametrize("is_remote", [False, True])
async def test_only_a_remote_store_is_looked_at_while_it_is_well(is_remote: bool) -> None:
    store = FakeStore(is_remote=is_remote)
    async with Guard(store):
        await asyncio.sleep(EVERY * 1.6)
    assert ("probe" in store.asked) == is_remote


async def test_a_late_answer_is_an_answer(guard: Guard, store: FakeStore) -> None:
    store.claims["id"] = CLAIM
    store.delay = 4 * SLOW
    assert await guard.ask(store.get_claim("id")) == CLAIM
    assert not guard.is_open


@pytest.mark.timed
async def test_a_store_that_hangs_costs_one_call_its_patience(
    guard: Guard, store: FakeStore
) -> None:
    store.frozen.clear()
    started = time.monotonic()
    with pytest.raises(StoreError, match="in time"):
        await guard.ask(store.get("key"))
    assert time.monotonic() - started < PATIENCE + 0.3
    assert guard.is_open
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(StoreError, match="skipped"):
            await guard.ask(store.get("key"))
    assert time.monotonic() - started < SLOW
    assert store.asked.count("get") == 1


@pytest.mark.timed
async def test_many_who_wait_for_a_store_that_hangs_wait_together(
    guard: Guard, store: FakeStore
) -> None:
    store.frozen.clear()
    started = time.monotonic()
    answers = await asyncio.gather(
        *(guard.ask(store.get("key")) for _ in range(50)), return_exceptions=True
    )
    assert {type(answer) for answer in answers} == {StoreError}
    assert time.monotonic() - started < PATIENCE + 0.5


async def test_a_store_that_fails_is_skipped_until_it_is_back(
    guard: Guard, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.trouble = AWAY
    with pytest.raises(StoreError, match="away"):
        await guard.ask(store.get("key"))
    assert guard.is_open
    await until(lambda: store.asked.count("probe") >= 2)
    assert guard.is_open
    store.trouble = None
    await until(lambda: not guard.is_open)
    await guard.ask(store.get("key"))
    said = [record.getMessage() for record in caplog.records if record.name.endswith("guard")]
    assert said == ["The result cache is done without for now: it is away",
                    "The result cache is back"]  # fmt: skip


async def test_a_store_that_is_away_at_the_start_is_no_reason_not_to_start() -> None:
    class Broken(FakeStore):
        async def __aenter__(self) -> "Broken":
            raise AWAY

    async with Guard(Broken()) as guard:
        assert guard.is_open


async def test_a_slow_store_is_found_out_by_the_guard() -> None:
    store = FakeStore(is_remote=True)
    async with Guard(store) as guard:
        store.delay = 3 * SLOW
        await until(lambda: guard.is_open)
        assert store.asked.count("probe") >= SLOW_ANSWERS
        store.delay = 0.0
        await until(lambda: not guard.is_open)


async def test_one_slow_answer_is_no_slow_store() -> None:
    store = FakeStore(is_remote=True)
    async with Guard(store) as guard:
        for delay in (3 * SLOW, 0.0) * SLOW_ANSWERS:
            store.delay = delay
            before = store.asked.count("probe")
            await until(lambda before=before: store.asked.count("probe") > before)  # type: ignore[misc]
            assert not guard.is_open


async def test_a_frozen_store_is_noticed_while_nobody_calls() -> None:
    store = FakeStore(is_remote=True)
    async with Guard(store) as guard:
        store.frozen.clear()
        await until(lambda: guard.is_open)
        store.frozen.set()
        await until(lambda: not guard.is_open)


async def test_a_busy_process_is_no_slow_store() -> None:
    """The event loop is held up by our own work, again and again."""
    store = FakeStore(is_remote=True)
    async with Guard(store) as guard:
        async with asyncio.timeout(SOON):
            while store.asked.count("probe") <= SLOW_ANSWERS:
                time.sleep(2 * SLOW)  # noqa: ASYNC251
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
    assert is_own(request_id) is own


def test_our_ids_are_uuids_that_nobody_can_guess() -> None:
    made = [new_id() for _ in range(1000)]
    assert len({*made}) == 1000
    assert all(is_own(request_id) for request_id in made)
    assert {(UUID(found).version, UUID(found).variant) for found in made} == {
        (8, "specified in RFC 4122")
    }
    assert not any(is_own(str(uuid4())) for _ in range(1000))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def claims(guard: Guard, clock: Clock) -> Claims:
    return Claims(guard, clock)


async def test_what_was_handed_out_is_known_to_all(
    claims: Claims, guard: Guard, store: FakeStore
) -> None:
    await claims.put("id", CLAIM)
    assert store.claims == {"id": CLAIM}
    assert await Claims(guard).get("id") == CLAIM
    assert await claims.get("another") is None


async def test_our_own_word_is_believed_for_a_moment(
    claims: Claims, store: FakeStore, clock: Clock
) -> None:
    await claims.put("id", CLAIM)
    assert await claims.get("id") == CLAIM
    assert "get_claim" not in store.asked
    clock.now += BELIEVED
    cancelled = Claim("key", "ann", "fal-ai/flux", is_cancelled=True)
    store.claims["id"] = cancelled
    assert await claims.get("id") == cancelled
    assert claims.peek("id") == cancelled


async def test_what_this_process_handed_out_it_knows_without_the_store(
    claims: Claims, store: FakeStore, clock: Clock
) -> None:
    store.trouble = AWAY
    await claims.put("id", CLAIM)
    clock.now += 10 * BELIEVED
    assert await claims.get("id") == CLAIM
    with pytest.raises(StoreError):
        await claims.get("another")


async def test_what_the_store_never_heard_of_is_known_when_it_is_back(
    claims: Claims, guard: Guard, store: FakeStore, clock: Clock
) -> None:
    store.trouble = AWAY
    await claims.put("id", CLAIM)
    store.trouble = None
    await until(lambda: not guard.is_open)
    clock.now += BELIEVED
    assert await claims.get("id") == CLAIM


async def test_a_promised_result_is_at_hand(claims: Claims, store: FakeStore) -> None:
    result = Result(b"{}", "application/json", 1.0, 2.0)
    await claims.put("id", CLAIM, result)
    assert claims.at_hand("id") == result
    assert claims.at_hand("another") is None


async def test_documents_at_hand_are_bounded(claims: Claims) -> None:
    """By their bytes; the oldest go."""
    size = AT_HAND_MAX // 4
    for number in range(6):
        result = Result(bytes(size), "application/json", 1.0, 2.0)
        await claims.put(str(number), CLAIM, result)
    assert [claims.at_hand(str(number)) is not None for number in range(6)] == [
        *[False] * 2, *[True] * 4
    ]  # fmt: skip


async def test_a_document_that_is_put_twice_is_counted_once(claims: Claims) -> None:
    result = Result(bytes(AT_HAND_MAX // 4), "application/json", 1.0, 2.0)
    for _ in range(6):
        await claims.put("id", CLAIM, result)
    assert claims.at_hand("id") is not None
    await claims.put("other", CLAIM, result)
    assert claims.at_hand("id") is not None


async def test_ids_in_memory_are_bounded(guard: Guard, store: FakeStore) -> None:
    claims = Claims(guard)
    await claims.put("first", CLAIM)
    store.trouble = AWAY
    for number in range(REMEMBERED_MAX):
        await claims.put(str(number), CLAIM)
    assert claims.peek("first") is None
    assert claims.peek("0") == CLAIM
