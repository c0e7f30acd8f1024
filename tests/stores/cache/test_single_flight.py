"""Single-flight over a store that does as it is told: who makes the call, and who follows it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import pytest

from falproxy.errors import ProxyError
from falproxy.stores.cache import (
    AcquireRequest,
    CachedResult,
    FlightRecord,
    Job,
    Lookup,
    SharedFailure,
    StoreError,
    StoreStats,
    VirtualRequest,
)
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.single_flight import (
    LEASE_SECONDS,
    POLL_INTERVAL,
    RENEW_INTERVAL,
    CallOutcome,
    SharedCallFns,
    SingleFlight,
)

KEY = "key"
JOB = Job("job-1", "fal-ai/flux", "mark")
RESULT = CachedResult(b"{}", "application/json", 1.0, 3600.0)
GOOD = CallOutcome(RESULT)
BAD = CallOutcome(failure=SharedFailure(500, "application/json", b"{}"))
SOON = 3.0


@dataclass(slots=True)
class FakeStore:
    """A store in memory, whose time goes when it is told.

    trouble: raised by whatever is asked. frozen: while it is not set, nothing is answered. asked:
    the names of the questions.
    """

    is_remote: bool = False
    now: float = 10.0
    trouble: StoreError | None = None
    frozen: asyncio.Event = field(default_factory=asyncio.Event)
    delay: float = 0.0
    asked: list[str] = field(default_factory=list)
    results: dict[str, CachedResult] = field(default_factory=dict)
    flights: dict[str, tuple[FlightRecord, float]] = field(default_factory=dict)
    claims: dict[str, VirtualRequest] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)
    events: set[asyncio.Event] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.frozen.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def _hear(self, question: str) -> None:
        self.asked.append(question)
        await asyncio.sleep(self.delay)
        await self.frozen.wait()
        if self.trouble is not None:
            raise self.trouble

    async def probe(self) -> None:
        await self._hear("probe")

    def _flight(self, key: str) -> FlightRecord | None:
        if key not in self.flights:
            return None
        flight, until = self.flights[key]
        return replace(flight, lease_left=until - self.now)

    async def get(self, key: str) -> Lookup:
        await self._hear("get")
        return Lookup(self.results.get(key), self._flight(key))

    async def acquire(self, key: str, request: AcquireRequest) -> Lookup:
        await self._hear("acquire")
        flight, result = self._flight(key), self.results.get(key)
        is_led = flight is not None and flight.lease_left > 0
        if flight is not None and is_led and flight.owner_token == request.owner_token:
            return Lookup(flight=flight, is_leader=True)
        if result is not None and result.stored_at > request.min_stored_at:
            return Lookup(result)
        if is_led:
            return Lookup(flight=flight)
        job = flight.job if flight else None
        mine = FlightRecord(request.owner_token, request.is_run and job is None, job, request.lease)
        self.flights[key] = mine, self.now + request.lease
        return Lookup(flight=mine, is_leader=True)

    def _leads(self, key: str, token: str) -> bool:
        flight = self._flight(key)
        return flight is not None and flight.owner_token == token

    async def record_job(self, key: str, owner_token: str, job: Job) -> bool:
        await self._hear("accept")
        if not self._leads(key, owner_token):
            return False
        flight, until = self.flights[key]
        self.flights[key] = replace(flight, job=job), until
        self.tell()
        return True

    async def renew_lease(self, key: str, owner_token: str, lease: float) -> bool:
        await self._hear(f"renew {lease}")
        if not self._leads(key, owner_token):
            return False
        self.flights[key] = self.flights[key][0], self.now + lease
        self.tell()
        return True

    async def finish(self, key: str, owner_token: str, result: CachedResult | None) -> None:
        await self._hear("finish")
        if result is not None:
            self.results[key] = result
        if self._leads(key, owner_token):
            del self.flights[key]
        self.tell()

    async def put_virtual_request(
        self, request_id: str, virtual_request: VirtualRequest, retention: float = 0.0
    ) -> None:
        await self._hear("put_claim")
        self.claims[request_id] = virtual_request

    async def get_virtual_request(self, request_id: str) -> VirtualRequest | None:
        await self._hear("get_claim")
        return self.claims.get(request_id)

    async def add_holder(self, key: str, job_id: str, holder: str) -> bool:
        await self._hear("join")
        self.holders.add(holder)
        return True

    async def remove_holder(self, key: str, job_id: str, holder: str) -> bool:
        await self._hear("leave")
        self.holders.discard(holder)
        return not self.holders

    async def stats(self) -> StoreStats:
        return StoreStats(len(self.results), 0, len(self.flights), len(self.claims))

    async def clear(self) -> int:
        return 0

    @contextmanager
    def watch(self, key: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self.events.add(event)
        yield event
        self.events.discard(event)

    def tell(self) -> None:
        for event in self.events:
            event.set()


class Trip:
    """A call as a flight knows it. outcome: what sending it comes to. may_send, may_end: hold it
    up while they are not set. sends, follows: what was done."""

    def __init__(self, outcome: Job | CallOutcome | Exception, newer_than: float = 0.0) -> None:
        self.outcome = outcome
        self.sends = 0
        self.follows: list[Job] = []
        self.may_send, self.may_end = asyncio.Event(), asyncio.Event()
        self.may_send.set()
        self.may_end.set()
        self.errand = SharedCallFns(
            self.send, self.follow, not isinstance(outcome, Job), newer_than
        )

    async def send(self) -> Job | CallOutcome:
        self.sends += 1
        await self.may_send.wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def follow(self, job: Job) -> CallOutcome:
        self.follows.append(job)
        await self.may_end.wait()
        return GOOD


async def fly(flights: SingleFlight, trip: Trip) -> CallOutcome:
    """A request that waits for the end."""
    shared = flights.join_or_start(KEY, trip.errand)
    async with shared.waiting(), asyncio.timeout(SOON):
        return await asyncio.shield(shared.done)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


Process = Callable[[], Awaitable[SingleFlight]]


@pytest.fixture
async def process(store: FakeStore) -> AsyncIterator[Process]:
    """Makes the flights of one more process."""
    async with AsyncExitStack() as stack:

        async def make() -> SingleFlight:
            flights = SingleFlight(await stack.enter_async_context(StoreBreaker(store)))
            stack.push_async_callback(flights.close, 0.0)
            return flights

        yield make
        store.frozen.set()
        store.trouble = None


@pytest.fixture
async def flights(process: Process) -> SingleFlight:
    return await process()


async def test_of_equal_calls_one_is_made(flights: SingleFlight, store: FakeStore) -> None:
    trip = Trip(GOOD)
    assert await asyncio.gather(*(fly(flights, trip) for _ in range(5))) == [GOOD] * 5
    assert trip.sends == 1
    assert store.results == {KEY: RESULT}
    assert store.flights == {}


async def test_a_kept_result_is_no_call(flights: SingleFlight, store: FakeStore) -> None:
    store.results[KEY] = RESULT
    trip = Trip(GOOD)
    assert await fly(flights, trip) == CallOutcome(RESULT, was_executed=False)
    assert trip.sends == 0


async def test_a_result_that_is_too_old_is_made_anew(
    flights: SingleFlight, store: FakeStore
) -> None:
    store.results[KEY] = RESULT
    trip = Trip(GOOD, newer_than=RESULT.stored_at)
    assert await fly(flights, trip) == GOOD
    assert trip.sends == 1


async def test_a_job_is_recorded_before_anybody_hears_of_it(
    flights: SingleFlight, store: FakeStore
) -> None:
    trip = Trip(JOB)
    trip.may_end.clear()
    shared = flights.join_or_start(KEY, trip.errand)
    async with shared.waiting():
        assert await shared.accepted == JOB
    assert store.flights[KEY][0].job == JOB
    trip.may_end.set()
    assert await shared.done == GOOD
    assert trip.follows == [JOB]


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(BAD, id="an answer that is not kept"),
        pytest.param(CallOutcome(), id="an answer that cannot be shared"),
        pytest.param(ProxyError(504, "upstream_broken", "It broke."), id="no answer"),
        pytest.param(ZeroDivisionError("a bug"), id="a bug of ours"),
    ],
)
async def test_a_flight_that_failed_is_over_for_everybody(
    failure: CallOutcome | Exception, flights: SingleFlight, process: Process, store: FakeStore
) -> None:
    trip = Trip(failure)
    landings = await asyncio.gather(*(fly(flights, trip) for _ in range(3)))
    if isinstance(failure, Exception):
        assert [landing.error for landing in landings] == [failure] * 3
    else:
        assert landings == [failure] * 3
    assert trip.sends == 1
    assert store.flights == {}
    for others in (flights, await process()):
        trip = Trip(BAD)
        assert await fly(others, trip) == BAD
        assert trip.sends == 1


@pytest.mark.parametrize("outcome", [GOOD, JOB], ids=["a run", "a job"])
async def test_another_process_waits_for_the_flight(
    outcome: CallOutcome | Job, flights: SingleFlight, process: Process
) -> None:
    trip, other = Trip(outcome), Trip(outcome)
    trip.may_send.clear()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(fly(flights, trip))
        await until(lambda: trip.sends)
        second = group.create_task(fly(await process(), other))
        await asyncio.sleep(0.02)
        trip.may_send.set()
    assert first.result() == GOOD
    assert second.result().result == RESULT
    assert (other.sends, other.follows) == (0, [])


async def test_another_process_hears_of_the_job_before_its_end(
    flights: SingleFlight, process: Process
) -> None:
    trip, other = Trip(JOB), Trip(JOB)
    trip.may_end.clear()
    flying = asyncio.ensure_future(fly(flights, trip))
    await until(lambda: trip.follows)
    shared = (await process()).join_or_start(KEY, other.errand)
    async with shared.waiting(), asyncio.timeout(SOON):
        assert await asyncio.shield(shared.accepted) == JOB
        assert not shared.done.done()
        assert shared.is_job_stored
    trip.may_end.set()
    await flying


async def test_a_job_is_followed_by_who_comes_after_its_leader(
    flights: SingleFlight, process: Process, store: FakeStore
) -> None:
    trip, other = Trip(JOB), Trip(JOB)
    trip.may_end.clear()
    shared = flights.join_or_start(KEY, trip.errand)
    async with shared.waiting():
        await shared.accepted
    await flights.close(0.0)
    assert await fly(await process(), other) == GOOD
    assert (other.sends, other.follows) == (0, [JOB])
    assert store.results == {KEY: RESULT}


async def test_a_job_is_followed_when_its_leader_says_nothing_any_more(
    flights: SingleFlight, store: FakeStore
) -> None:
    """What died without a word: the lease runs out."""
    store.flights[KEY] = FlightRecord("dead", False, JOB, LEASE_SECONDS), store.now + LEASE_SECONDS
    trip = Trip(JOB)
    flying = asyncio.ensure_future(fly(flights, trip))
    await asyncio.sleep(0.05)
    assert trip.follows == []
    store.now += LEASE_SECONDS
    assert await flying == GOOD
    assert (trip.sends, trip.follows) == (0, [JOB])


async def test_a_run_is_made_again_when_its_leader_says_nothing_any_more(
    flights: SingleFlight, store: FakeStore
) -> None:
    store.flights[KEY] = FlightRecord("dead", True, None, LEASE_SECONDS), store.now + LEASE_SECONDS
    trip = Trip(GOOD)
    flying = asyncio.ensure_future(fly(flights, trip))
    await asyncio.sleep(0.05)
    assert trip.sends == 0
    store.now += LEASE_SECONDS
    assert await flying == GOOD
    assert trip.sends == 1


async def test_nothing_is_sent_for_those_who_have_left(
    flights: SingleFlight, store: FakeStore
) -> None:
    store.frozen.clear()
    trip = Trip(GOOD)
    shared = flights.join_or_start(KEY, trip.errand)
    async with shared.waiting():
        await asyncio.sleep(0.01)
    store.frozen.set()
    landing = await asyncio.wait_for(shared.done, SOON)
    assert trip.sends == 0
    assert not landing.was_executed
    assert store.flights == {}


async def test_an_id_that_was_handed_out_waits_as_well(
    flights: SingleFlight, store: FakeStore
) -> None:
    store.frozen.clear()
    trip = Trip(GOOD)
    shared = flights.join_or_start(KEY, trip.errand)
    async with shared.waiting():
        shared.pending_ids.add("an id")
    store.frozen.set()
    assert await asyncio.wait_for(shared.done, SOON) == GOOD


async def test_who_leaves_later_does_not_stop_the_call(
    flights: SingleFlight, store: FakeStore
) -> None:
    trip = Trip(GOOD)
    trip.may_send.clear()
    leaving = asyncio.ensure_future(fly(flights, trip))
    await until(lambda: trip.sends)
    leaving.cancel()
    await asyncio.wait([leaving])
    trip.may_send.set()
    await until(lambda: KEY in store.results)
    assert store.flights == {}


# --- The store is away ---

AWAY = StoreError("it is away")


@pytest.mark.parametrize("outcome", [GOOD, JOB], ids=["a run", "a job"])
async def test_without_a_store_the_process_shares_with_itself(
    outcome: CallOutcome | Job, flights: SingleFlight, store: FakeStore
) -> None:
    store.trouble = AWAY
    trip = Trip(outcome)
    assert await asyncio.gather(*(fly(flights, trip) for _ in range(3))) == [GOOD] * 3
    assert trip.sends == 1


async def test_a_job_that_was_heard_of_is_followed_when_the_store_goes(
    flights: SingleFlight, store: FakeStore
) -> None:
    store.flights[KEY] = (
        FlightRecord("elsewhere", False, JOB, LEASE_SECONDS),
        store.now + LEASE_SECONDS,
    )
    trip = Trip(JOB)
    flying = asyncio.ensure_future(fly(flights, trip))
    await until(lambda: "acquire" in store.asked)
    store.trouble = AWAY
    store.tell()
    assert await flying == GOOD
    assert (trip.sends, trip.follows) == (0, [JOB])


async def test_a_leader_that_was_heard_of_is_waited_for_when_the_store_goes(
    flights: SingleFlight, store: FakeStore
) -> None:
    """It may be about to pay. After its lease it is not waited for any more."""
    store.flights[KEY] = FlightRecord("elsewhere", False, None, 0.6), store.now + 0.6
    trip = Trip(GOOD)
    flying = asyncio.ensure_future(fly(flights, trip))
    await until(lambda: "acquire" in store.asked)
    store.trouble = AWAY
    store.tell()
    await asyncio.sleep(0.4)
    assert trip.sends == 0
    assert await flying == GOOD
    assert trip.sends == 1


async def test_a_job_that_could_not_be_recorded_is_recorded_later(
    flights: SingleFlight, store: FakeStore
) -> None:
    trip = Trip(JOB)
    trip.may_end.clear()
    trip.may_send.clear()
    shared = flights.join_or_start(KEY, trip.errand)
    async with shared.waiting():
        await until(lambda: trip.sends)
        store.trouble = AWAY
        trip.may_send.set()
        assert await shared.accepted == JOB
    assert not shared.is_job_stored
    store.trouble = None
    async with asyncio.timeout(RENEW_INTERVAL + SOON):
        while store.flights[KEY][0].job != JOB:
            await asyncio.sleep(0.05)
    assert f"renew {LEASE_SECONDS}" in store.asked
    trip.may_end.set()
    await shared.done


async def test_news_that_got_lost_delay_a_follower_only_a_little(
    flights: SingleFlight, store: FakeStore
) -> None:
    store.flights[KEY] = (
        FlightRecord("elsewhere", True, None, LEASE_SECONDS),
        store.now + LEASE_SECONDS,
    )
    trip = Trip(GOOD)
    flying = asyncio.ensure_future(fly(flights, trip))
    await until(lambda: "acquire" in store.asked)
    store.results[KEY] = RESULT  # and nobody tells
    async with asyncio.timeout(POLL_INTERVAL + 0.5):
        assert await flying == CallOutcome(RESULT, was_executed=False)


# --- The end ---


async def test_a_run_may_end_while_the_process_stops(
    flights: SingleFlight, store: FakeStore
) -> None:
    trip = Trip(GOOD)
    trip.may_send.clear()
    flying = asyncio.ensure_future(fly(flights, trip))
    await until(lambda: trip.sends)
    closing = asyncio.ensure_future(flights.close(SOON))
    await asyncio.sleep(0.02)
    trip.may_send.set()
    await closing
    assert await flying == GOOD
    assert store.results == {KEY: RESULT}


@pytest.mark.parametrize("outcome", [GOOD, JOB], ids=["a run", "a job"])
async def test_what_does_not_end_in_time_is_left_to_others(
    outcome: CallOutcome | Job, flights: SingleFlight, store: FakeStore
) -> None:
    trip = Trip(outcome)
    (trip.may_end if isinstance(outcome, Job) else trip.may_send).clear()
    flying = asyncio.ensure_future(fly(flights, trip))
    await until(lambda: trip.follows if isinstance(outcome, Job) else trip.sends)
    await flights.close(0.02)
    assert "renew 0.0" in store.asked
    assert store.flights[KEY][1] == store.now
    assert (await flying).result is None
    assert store.results == {}


async def test_an_end_with_a_frozen_store_does_not_hang(
    flights: SingleFlight, store: FakeStore
) -> None:
    trip = Trip(JOB)
    trip.may_end.clear()
    flying = asyncio.ensure_future(fly(flights, trip))
    await until(lambda: trip.follows)
    store.frozen.clear()
    async with asyncio.timeout(SOON):
        await flights.close(0.02)
        await flying
