"""Circuit breaker of the cache store."""

import asyncio
import time
from dataclasses import replace

import pytest

from falproxy.stores.cache import StoreContent, StoreError, circuit_breaker
from falproxy.stores.cache.circuit_breaker import (
    CALL_TIMEOUT,
    PROBE_INTERVAL,
    SLOW_PROBES_TO_TRIP,
    SLOW_SECONDS,
    StoreBreaker,
)
from tests.support.fake_store import STORE_DOWN, VIRTUAL_REQUEST, FakeStore
from tests.support.waiting import wait_until

pytestmark = pytest.mark.takes(seconds=1)

TIMEOUT = 5.0
# Seconds of a reply that is slow on a busy machine as well, where most of them do not count.
SLOW_REPLY = 8 * SLOW_SECONDS
CONTENT = StoreContent("content", is_new=False)


async def test_a_working_store_is_called(breaker: StoreBreaker, store: FakeStore) -> None:
    store.virtual_requests["id"] = VIRTUAL_REQUEST
    assert await breaker.call(store.get_virtual_request("id")) == VIRTUAL_REQUEST
    assert not breaker.is_open


@pytest.mark.parametrize("is_remote", [False, True])
async def test_only_a_remote_store_is_probed_while_it_works(is_remote: bool) -> None:
    store = FakeStore(is_remote=is_remote)
    async with StoreBreaker(store):
        await asyncio.sleep(PROBE_INTERVAL * 1.6)
    assert ("probe" in store.operations) == is_remote


async def test_a_late_reply_is_used(breaker: StoreBreaker, store: FakeStore) -> None:
    store.virtual_requests["id"] = VIRTUAL_REQUEST
    store.delay = 4 * SLOW_SECONDS
    assert await breaker.call(store.get_virtual_request("id")) == VIRTUAL_REQUEST
    assert not breaker.is_open


@pytest.mark.timed
async def test_a_store_that_hangs_delays_one_call_by_the_timeout(
    breaker: StoreBreaker, store: FakeStore
) -> None:
    store.running.clear()
    started = time.monotonic()
    with pytest.raises(StoreError, match="in time"):
        await breaker.call(store.get("key"))
    assert time.monotonic() - started < CALL_TIMEOUT + 0.3
    assert breaker.is_open
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(StoreError, match="skipped"):
            await breaker.call(store.get("key"))
    assert time.monotonic() - started < SLOW_SECONDS
    assert store.operations.count("get") == 1


@pytest.mark.timed
async def test_concurrent_calls_of_a_store_that_hangs_time_out_together(
    breaker: StoreBreaker, store: FakeStore
) -> None:
    store.running.clear()
    started = time.monotonic()
    results = await asyncio.gather(
        *(breaker.call(store.get("key")) for _ in range(50)), return_exceptions=True
    )
    assert {type(result) for result in results} == {StoreError}
    assert time.monotonic() - started < CALL_TIMEOUT + 0.5


async def test_a_failed_store_is_skipped_until_it_recovers(
    breaker: StoreBreaker, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.error = STORE_DOWN
    with pytest.raises(StoreError, match="down"):
        await breaker.call(store.get("key"))
    assert breaker.is_open
    await wait_until(lambda: store.operations.count("probe") >= 2, seconds=TIMEOUT)
    assert breaker.is_open
    store.error = None
    await wait_until(lambda: not breaker.is_open, seconds=TIMEOUT)
    await breaker.call(store.get("key"))
    messages = [record.getMessage() for record in caplog.records if "cache" in record.name]
    assert messages == [
        "The result cache is bypassed for now: the store is down",
        "The result cache works again",
    ]


async def test_a_store_that_is_down_does_not_prevent_the_start() -> None:
    class BrokenStore(FakeStore):
        async def __aenter__(self) -> "BrokenStore":
            raise STORE_DOWN

    async with StoreBreaker(BrokenStore()) as breaker:
        assert breaker.is_open


async def test_slow_probes_open_the_breaker() -> None:
    store = FakeStore(is_remote=True)
    async with StoreBreaker(store) as breaker:
        store.delay = 3 * SLOW_SECONDS
        await wait_until(lambda: breaker.is_open, seconds=TIMEOUT)
        assert store.operations.count("probe") >= SLOW_PROBES_TO_TRIP
        store.delay = 0.0
        await wait_until(lambda: not breaker.is_open, seconds=TIMEOUT)


@pytest.fixture
def waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls wait so long that the breaker opens before, also on a busy machine."""
    monkeypatch.setattr(circuit_breaker, "CALL_TIMEOUT", 10 * CALL_TIMEOUT)


@pytest.mark.usefixtures("waits_long")
async def test_a_call_that_waits_for_a_slow_store_gets_its_reply() -> None:
    """Without the reply the proxy would send the call, which another process may have sent."""
    store = FakeStore(is_remote=True)

    async def claim() -> str:
        await wait_until(lambda: breaker.is_open, seconds=TIMEOUT)
        await asyncio.sleep(0.02)
        return "another process has the lease"

    async with StoreBreaker(store) as breaker:
        store.delay = 1.2 * SLOW_SECONDS
        assert await breaker.call(claim()) == "another process has the lease"
        assert breaker.is_open


@pytest.mark.usefixtures("waits_long")
async def test_a_call_that_waits_for_a_slow_store_fails_with_it() -> None:
    store = FakeStore(is_remote=True)
    async with StoreBreaker(store) as breaker:
        store.delay = 1.2 * SLOW_SECONDS
        waiting = asyncio.ensure_future(breaker.call(asyncio.sleep(10 * TIMEOUT)))
        await wait_until(lambda: breaker.is_open, seconds=TIMEOUT)
        assert not waiting.done()
        store.error = STORE_DOWN
        with pytest.raises(StoreError, match="in time"):
            await waiting


async def test_a_slow_store_is_used_where_it_is_needed_only() -> None:
    store = FakeStore(is_remote=True, content=CONTENT)
    store.virtual_requests["id"] = VIRTUAL_REQUEST
    async with StoreBreaker(store) as breaker:
        await wait_until(lambda: "probe" in store.operations, seconds=TIMEOUT)
        store.delay = SLOW_REPLY
        await wait_until(lambda: breaker.is_open, seconds=TIMEOUT)
        with pytest.raises(StoreError, match="skipped"):
            await breaker.call(store.get_virtual_request("id"))
        found = await breaker.call(store.get_virtual_request("id"), even_if_slow=True)
        assert found == VIRTUAL_REQUEST
        assert breaker.is_complete


@pytest.mark.parametrize("failure", ["down", "frozen", "other content"])
async def test_a_store_that_does_not_work_is_skipped_by_all(failure: str) -> None:
    store = FakeStore(is_remote=True, content=CONTENT)
    async with StoreBreaker(store) as breaker:
        await wait_until(lambda: "probe" in store.operations, seconds=TIMEOUT)
        store.delay = SLOW_REPLY
        await wait_until(lambda: breaker.is_complete and breaker.is_open, seconds=TIMEOUT)
        if failure == "down":
            store.error = STORE_DOWN
        elif failure == "frozen":
            store.running.clear()
        else:
            store.content = replace(CONTENT, id="another")
        await wait_until(lambda: not breaker.is_complete, seconds=TIMEOUT)
        with pytest.raises(StoreError, match="skipped"):
            await breaker.call(store.get("key"), even_if_slow=True)
        store.error, store.delay = None, 0.0
        store.running.set()
        await wait_until(lambda: not breaker.is_open, seconds=TIMEOUT)


async def test_a_slow_store_that_hangs_is_an_error() -> None:
    store = FakeStore(is_remote=True, content=CONTENT)
    async with StoreBreaker(store) as breaker:
        await wait_until(lambda: "probe" in store.operations, seconds=TIMEOUT)
        store.delay = SLOW_REPLY
        await wait_until(lambda: breaker.is_complete and breaker.is_open, seconds=TIMEOUT)
        store.running.clear()
        with pytest.raises(StoreError):
            await breaker.call(store.get("key"), even_if_slow=True)
        assert not breaker.is_complete
        store.running.set()


async def test_entries_in_memory_are_written_to_a_slow_store() -> None:
    store, unwritten, writes = FakeStore(is_remote=True, content=CONTENT), [1], []

    async def write() -> None:
        writes.append(await breaker.call(store.get_virtual_request("id"), even_if_slow=True))
        if len(writes) == 2:
            unwritten.clear()

    async with StoreBreaker(store) as breaker:
        breaker.unwritten_counts.append(lambda: len(unwritten))
        breaker.on_recovered.append(write)
        await wait_until(lambda: "probe" in store.operations, seconds=TIMEOUT)
        store.delay = SLOW_REPLY
        await wait_until(lambda: not unwritten, seconds=TIMEOUT)
        assert breaker.is_open
        probes = store.operations.count("probe")
        await wait_until(lambda: store.operations.count("probe") > probes + 2, seconds=TIMEOUT)
        assert len(writes) == 2, "nothing is left to write"


async def test_a_single_slow_probe_does_not_open_the_breaker() -> None:
    store = FakeStore(is_remote=True)
    async with StoreBreaker(store) as breaker:
        for delay in (3 * SLOW_SECONDS, 0.0) * SLOW_PROBES_TO_TRIP:
            store.delay = delay
            before = store.operations.count("probe")
            await wait_until(
                lambda before=before: store.operations.count("probe") > before,  # type: ignore[misc]
                seconds=TIMEOUT,
            )
            assert not breaker.is_open


async def test_a_frozen_store_is_detected_without_calls() -> None:
    store = FakeStore(is_remote=True)
    async with StoreBreaker(store) as breaker:
        store.running.clear()
        await wait_until(lambda: breaker.is_open, seconds=TIMEOUT)
        store.running.set()
        await wait_until(lambda: not breaker.is_open, seconds=TIMEOUT)


async def test_a_busy_event_loop_does_not_open_the_breaker() -> None:
    """The event loop is blocked repeatedly."""
    store = FakeStore(is_remote=True)
    async with StoreBreaker(store) as breaker:
        async with asyncio.timeout(TIMEOUT):
            while store.operations.count("probe") <= SLOW_PROBES_TO_TRIP:
                time.sleep(2 * SLOW_SECONDS)  # noqa: ASYNC251
                await asyncio.sleep(0)
                assert not breaker.is_open


async def test_a_reply_that_takes_several_turns_of_a_busy_event_loop_is_used() -> None:
    """A burst of calls keeps the event loop busy for longer than the timeout of an operation."""

    async def turns() -> str:
        for _ in range(5):  # as the reader of a socket, the parser and the tasks after it
            await asyncio.sleep(0.001)
        return "reply"

    store = FakeStore(is_remote=True, delay=0.001)
    async with StoreBreaker(store) as breaker:
        replies = [asyncio.ensure_future(breaker.call(turns())) for _ in range(3)]
        while not all(reply.done() for reply in replies):
            time.sleep(CALL_TIMEOUT / 3)  # noqa: ASYNC251
            await asyncio.sleep(0)
        assert [reply.result() for reply in replies] == ["reply"] * 3
        assert not breaker.is_open
