"""Single-flight: which of the concurrent equal calls is sent, and how the others follow it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from falproxy.errors import ProxyError
from falproxy.stores.cache import (
    CachedResult,
    Job,
    SharedCallRecord,
    SharedFailure,
    StoreError,
)
from falproxy.stores.cache.call_outcome import CallOutcome
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.single_flight import (
    LEASE_SECONDS,
    POLL_INTERVAL,
    RENEW_INTERVAL,
    SharedCallFns,
    SingleFlight,
)
from tests.support.fake_store import FakeStore
from tests.support.waiting import wait_until

TIMEOUT = 3.0  # seconds; of `wait_until`

KEY = "key"
JOB = Job("job-1", "fal-ai/flux", "mark")
RESULT = CachedResult(b"{}", "application/json", 1.0, 3600.0)
GOOD = CallOutcome(RESULT)
BAD = CallOutcome(failure=SharedFailure(500, "application/json", b"{}"))


class FakeCall:
    """A call that a test controls.

    outcome: result of `send`.
    may_send, may_end: `send` and `await_job` wait while they are not set.
    sends, awaited: the calls of `send` and `await_job` so far.
    """

    def __init__(self, outcome: Job | CallOutcome | Exception, min_stored_at: float = 0.0) -> None:
        self.outcome = outcome
        self.sends = 0
        self.awaited: list[Job] = []
        self.may_send, self.may_end = asyncio.Event(), asyncio.Event()
        self.may_send.set()
        self.may_end.set()
        self.fns = SharedCallFns(
            self.send, self.await_job, not isinstance(outcome, Job), min_stored_at
        )

    async def send(self) -> Job | CallOutcome:
        self.sends += 1
        await self.may_send.wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def await_job(self, job: Job) -> CallOutcome:
        self.awaited.append(job)
        await self.may_end.wait()
        return GOOD


async def wait_done(single_flight: SingleFlight, call: FakeCall) -> CallOutcome:
    """Join as a waiting request."""
    shared_call = single_flight.join_or_start(KEY, call.fns)
    async with shared_call.waiting(), asyncio.timeout(TIMEOUT):
        return await asyncio.shield(shared_call.done)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


Process = Callable[[], Awaitable[SingleFlight]]


@pytest.fixture
async def process(store: FakeStore) -> AsyncIterator[Process]:
    """Create the single-flight group of one more process."""
    async with AsyncExitStack() as stack:

        async def make() -> SingleFlight:
            single_flight = SingleFlight(await stack.enter_async_context(StoreBreaker(store)))
            stack.push_async_callback(single_flight.close, 0.0)
            return single_flight

        yield make
        store.running.set()
        store.error = None


@pytest.fixture
async def single_flight(process: Process) -> SingleFlight:
    return await process()


async def test_one_of_equal_calls_is_sent(single_flight: SingleFlight, store: FakeStore) -> None:
    call = FakeCall(GOOD)
    assert await asyncio.gather(*(wait_done(single_flight, call) for _ in range(5))) == [GOOD] * 5
    assert call.sends == 1
    assert store.results == {KEY: RESULT}
    assert store.flights == {}


async def test_a_cached_result_needs_no_call(single_flight: SingleFlight, store: FakeStore) -> None:
    store.results[KEY] = RESULT
    call = FakeCall(GOOD)
    assert await wait_done(single_flight, call) == CallOutcome(RESULT, was_executed=False)
    assert call.sends == 0


async def test_a_result_older_than_min_stored_at_is_not_used(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    store.results[KEY] = RESULT
    call = FakeCall(GOOD, min_stored_at=RESULT.stored_at)
    assert await wait_done(single_flight, call) == GOOD
    assert call.sends == 1


async def test_a_job_is_stored_before_waiting_calls_get_it(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    call = FakeCall(JOB)
    call.may_end.clear()
    shared_call = single_flight.join_or_start(KEY, call.fns)
    async with shared_call.waiting():
        assert await shared_call.accepted == JOB
    assert store.flights[KEY][0].job == JOB
    call.may_end.set()
    assert await shared_call.done == GOOD
    assert call.awaited == [JOB]


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(BAD, id="a response that is not storable"),
        pytest.param(CallOutcome(), id="a response that cannot be shared"),
        pytest.param(ProxyError(504, "upstream_broken", "It broke."), id="no response"),
        pytest.param(ZeroDivisionError("a bug"), id="an unexpected exception"),
    ],
)
async def test_a_failed_call_fails_for_all_waiters_and_is_not_cached(
    failure: CallOutcome | Exception,
    single_flight: SingleFlight,
    process: Process,
    store: FakeStore,
) -> None:
    call = FakeCall(failure)
    outcomes = await asyncio.gather(*(wait_done(single_flight, call) for _ in range(3)))
    if isinstance(failure, Exception):
        assert [outcome.error for outcome in outcomes] == [failure] * 3
    else:
        assert outcomes == [failure] * 3
    assert call.sends == 1
    assert store.flights == {}
    for group in (single_flight, await process()):
        call = FakeCall(BAD)
        assert await wait_done(group, call) == BAD
        assert call.sends == 1


@pytest.mark.parametrize("outcome", [GOOD, JOB], ids=["run", "submit"])
async def test_another_process_waits_for_the_call(
    outcome: CallOutcome | Job, single_flight: SingleFlight, process: Process
) -> None:
    call, other = FakeCall(outcome), FakeCall(outcome)
    call.may_send.clear()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(wait_done(single_flight, call))
        await wait_until(lambda: call.sends, seconds=TIMEOUT)
        second = group.create_task(wait_done(await process(), other))
        await asyncio.sleep(0.02)
        call.may_send.set()
    assert first.result() == GOOD
    assert second.result().result == RESULT
    assert (other.sends, other.awaited) == (0, [])


async def test_another_process_gets_the_job_before_its_end(
    single_flight: SingleFlight, process: Process
) -> None:
    call, other = FakeCall(JOB), FakeCall(JOB)
    call.may_end.clear()
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await wait_until(lambda: call.awaited, seconds=TIMEOUT)
    shared_call = (await process()).join_or_start(KEY, other.fns)
    async with shared_call.waiting(), asyncio.timeout(TIMEOUT):
        assert await asyncio.shield(shared_call.accepted) == JOB
        assert not shared_call.done.done()
        assert shared_call.is_job_stored
    call.may_end.set()
    await task


async def test_the_next_call_awaits_the_job_of_a_stopped_leader(
    single_flight: SingleFlight, process: Process, store: FakeStore
) -> None:
    call, other = FakeCall(JOB), FakeCall(JOB)
    call.may_end.clear()
    shared_call = single_flight.join_or_start(KEY, call.fns)
    async with shared_call.waiting():
        await shared_call.accepted
    await single_flight.close(0.0)
    assert await wait_done(await process(), other) == GOOD
    assert (other.sends, other.awaited) == (0, [JOB])
    assert store.results == {KEY: RESULT}


async def test_a_job_is_taken_over_when_the_lease_has_run_out(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    store.flights[KEY] = (
        SharedCallRecord("dead", False, JOB, LEASE_SECONDS),
        store.now + LEASE_SECONDS,
    )
    call = FakeCall(JOB)
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await asyncio.sleep(0.05)
    assert call.awaited == []
    store.now += LEASE_SECONDS
    assert await task == GOOD
    assert (call.sends, call.awaited) == (0, [JOB])


async def test_a_direct_call_is_repeated_when_the_lease_has_run_out(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    store.flights[KEY] = (
        SharedCallRecord("dead", True, None, LEASE_SECONDS),
        store.now + LEASE_SECONDS,
    )
    call = FakeCall(GOOD)
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await asyncio.sleep(0.05)
    assert call.sends == 0
    store.now += LEASE_SECONDS
    assert await task == GOOD
    assert call.sends == 1


async def test_a_call_without_waiting_requests_is_not_sent(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    store.running.clear()
    call = FakeCall(GOOD)
    shared_call = single_flight.join_or_start(KEY, call.fns)
    async with shared_call.waiting():
        await asyncio.sleep(0.01)
    store.running.set()
    outcome = await asyncio.wait_for(shared_call.done, TIMEOUT)
    assert call.sends == 0
    assert not outcome.was_executed
    assert store.flights == {}


async def test_a_pending_virtual_id_counts_as_waiting(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    store.running.clear()
    call = FakeCall(GOOD)
    shared_call = single_flight.join_or_start(KEY, call.fns)
    async with shared_call.waiting():
        shared_call.pending_ids.add("an id")
    store.running.set()
    assert await asyncio.wait_for(shared_call.done, TIMEOUT) == GOOD


async def test_a_call_that_was_sent_is_completed_without_waiting_requests(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    call = FakeCall(GOOD)
    call.may_send.clear()
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await wait_until(lambda: call.sends, seconds=TIMEOUT)
    task.cancel()
    await asyncio.wait([task])
    call.may_send.set()
    await wait_until(lambda: KEY in store.results, seconds=TIMEOUT)
    assert store.flights == {}


# --- The store is down ---

STORE_DOWN = StoreError("the store is down")


@pytest.mark.parametrize("outcome", [GOOD, JOB], ids=["run", "submit"])
async def test_calls_of_one_process_are_shared_without_a_store(
    outcome: CallOutcome | Job, single_flight: SingleFlight, store: FakeStore
) -> None:
    store.error = STORE_DOWN
    call = FakeCall(outcome)
    assert await asyncio.gather(*(wait_done(single_flight, call) for _ in range(3))) == [GOOD] * 3
    assert call.sends == 1


async def test_a_known_job_is_awaited_when_the_store_fails(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    store.flights[KEY] = (
        SharedCallRecord("elsewhere", False, JOB, LEASE_SECONDS),
        store.now + LEASE_SECONDS,
    )
    call = FakeCall(JOB)
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await wait_until(lambda: "acquire" in store.succeeded, seconds=TIMEOUT)
    store.error = STORE_DOWN
    store.notify()
    assert await task == GOOD
    assert (call.sends, call.awaited) == (0, [JOB])


async def test_the_lease_of_a_known_leader_is_respected_when_the_store_fails(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    """It may be about to submit a job. Its lease is the limit of the wait."""
    store.flights[KEY] = SharedCallRecord("elsewhere", False, None, 0.6), store.now + 0.6
    call = FakeCall(GOOD)
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await wait_until(lambda: "acquire" in store.succeeded, seconds=TIMEOUT)
    store.error = STORE_DOWN
    store.notify()
    await asyncio.sleep(0.4)
    assert call.sends == 0
    assert await task == GOOD
    assert call.sends == 1


async def test_a_job_is_stored_after_the_recovery_of_the_store(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    call = FakeCall(JOB)
    call.may_end.clear()
    call.may_send.clear()
    shared_call = single_flight.join_or_start(KEY, call.fns)
    async with shared_call.waiting():
        await wait_until(lambda: call.sends, seconds=TIMEOUT)
        store.error = STORE_DOWN
        call.may_send.set()
        assert await shared_call.accepted == JOB
    assert not shared_call.is_job_stored
    store.error = None
    async with asyncio.timeout(RENEW_INTERVAL + TIMEOUT):
        while store.flights[KEY][0].job != JOB:
            await asyncio.sleep(0.05)
    assert f"renew_lease {LEASE_SECONDS}" in store.operations
    call.may_end.set()
    await shared_call.done


async def test_a_lost_notification_delays_a_follower_by_one_poll(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    store.flights[KEY] = (
        SharedCallRecord("elsewhere", True, None, LEASE_SECONDS),
        store.now + LEASE_SECONDS,
    )
    call = FakeCall(GOOD)
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await wait_until(lambda: "acquire" in store.succeeded, seconds=TIMEOUT)
    store.results[KEY] = RESULT  # without a notification
    async with asyncio.timeout(POLL_INTERVAL + 0.5):
        assert await task == CallOutcome(RESULT, was_executed=False)


# --- Shutdown ---


async def test_a_direct_call_may_finish_during_shutdown(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    call = FakeCall(GOOD)
    call.may_send.clear()
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await wait_until(lambda: call.sends, seconds=TIMEOUT)
    closing = asyncio.ensure_future(single_flight.close(TIMEOUT))
    await asyncio.sleep(0.02)
    call.may_send.set()
    await closing
    assert await task == GOOD
    assert store.results == {KEY: RESULT}


@pytest.mark.parametrize("outcome", [GOOD, JOB], ids=["run", "submit"])
async def test_a_call_that_does_not_finish_in_time_gives_up_its_lease(
    outcome: CallOutcome | Job, single_flight: SingleFlight, store: FakeStore
) -> None:
    call = FakeCall(outcome)
    (call.may_end if isinstance(outcome, Job) else call.may_send).clear()
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await wait_until(
        lambda: call.awaited if isinstance(outcome, Job) else call.sends, seconds=TIMEOUT
    )
    await single_flight.close(0.02)
    assert "renew_lease 0.0" in store.operations
    assert store.flights[KEY][1] == store.now
    assert (await task).result is None
    assert store.results == {}


async def test_a_frozen_store_does_not_block_the_shutdown(
    single_flight: SingleFlight, store: FakeStore
) -> None:
    call = FakeCall(JOB)
    call.may_end.clear()
    task = asyncio.ensure_future(wait_done(single_flight, call))
    await wait_until(lambda: call.awaited, seconds=TIMEOUT)
    store.running.clear()
    async with asyncio.timeout(TIMEOUT):
        await single_flight.close(0.02)
        await task
