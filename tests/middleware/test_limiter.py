"""The limiter: admission, ends of reservations, and a store that is away."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from falproxy.errors import ProxyError
from falproxy.middleware.limiter import (
    JOB_TIMEOUT,
    LEASE,
    CallReservation,
    JobState,
    Limiter,
    OnError,
)
from falproxy.stores.limits import Admission, Limit, LimitsError, Reservation, ReserveRequest
from falproxy.stores.limits.sqlite import SqliteLimitsStore
from falproxy.windows import DAY, Window

BUDGET = Limit("budget", "principal:web", 1000, Window(DAY))
RATE = Limit("rate", "principal:web", 3, Window(60))
CONCURRENCY = Limit("concurrency", "principal:web", 3)


class UnreliableStore(SqliteLimitsStore):
    """A store that can be away. `loses_replies`: operations are done, but their replies lost."""

    is_away = False
    loses_replies = False

    def check(self) -> None:
        if self.is_away:
            raise LimitsError("it is away")

    async def reserve(self, request: ReserveRequest) -> Admission:
        self.check()
        admission = await super().reserve(request)
        if self.loses_replies:
            raise LimitsError("the reply was lost")
        return admission

    async def settle(self, token: str, amount: int) -> bool:
        self.check()
        return await super().settle(token, amount)

    async def claim_due(self, limit: int, lease: float) -> list[Reservation]:
        self.check()
        return await super().claim_due(limit, lease)


@dataclass
class World:
    """Limiters of several processes over one file, with a clock that tests move.

    jobs: what fal reports about each job.
    asked: request ids that fal was asked about.
    """

    folder: Path
    seconds: float = 0.0
    jobs: dict[str, JobState] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def store(self) -> UnreliableStore:
        file = self.folder / "limits.sqlite"
        return UnreliableStore(file, clock=lambda: 1e9 + self.seconds)

    def limiter(self, store: UnreliableStore, on_error: OnError = "default") -> Limiter:
        return Limiter(store, self.ask, on_error)

    async def ask(self, reservation: Reservation) -> JobState:
        request_id = reservation.request_id or ""
        self.asked.append(request_id)
        return self.jobs[request_id]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
async def store(world: World) -> AsyncIterator[UnreliableStore]:
    async with world.store() as opened:
        yield opened


@pytest.fixture
def limiter(world: World, store: UnreliableStore) -> Limiter:
    return world.limiter(store)


async def reserve(limiter: Limiter, amount: int, *limits: Limit) -> CallReservation:
    admission, reservation = await limiter.reserve(limits or (BUDGET,), amount)
    assert admission is not None
    assert admission.refused is None
    assert reservation is not None
    return reservation


async def used(store: UnreliableStore, *limits: Limit) -> list[int]:
    return [state.used for state in await store.count(limits or (BUDGET,))]


async def test_a_rate_needs_no_end(limiter: Limiter, store: UnreliableStore) -> None:
    admissions = [await limiter.admit([RATE], 0) for _ in range(4)]
    assert [admission and admission.refused for admission in admissions] == [None, None, None, 0]
    assert limiter.running == set()


async def test_a_call_ends_once(limiter: Limiter, store: UnreliableStore) -> None:
    reservation = await reserve(limiter, 100, BUDGET, CONCURRENCY)
    assert await used(store, BUDGET, CONCURRENCY) == [100, 1]
    await reservation.settle(40)
    await reservation.release()
    await reservation.attach("job", "")
    assert await used(store, BUDGET, CONCURRENCY) == [40, 0]
    assert limiter.running == set()


async def test_an_unknown_cost_keeps_what_was_reserved(
    limiter: Limiter, store: UnreliableStore
) -> None:
    await (await reserve(limiter, 100)).settle(None)
    assert await used(store) == [100]


async def test_a_refused_call_leaves_nothing(limiter: Limiter, store: UnreliableStore) -> None:
    admission, reservation = await limiter.reserve([BUDGET], 1001)
    assert admission is not None
    assert (admission.refused, reservation) == (0, None)
    assert await used(store) == [0]
    assert limiter.running == set()


async def test_a_job_is_settled_by_any_process_that_reads_its_result(
    world: World, limiter: Limiter, store: UnreliableStore
) -> None:
    await (await reserve(limiter, 100)).attach("job-1", "{}")
    other = world.limiter(store)
    await other.settle_job("job-1", lambda found: 70)
    await limiter.settle_job("job-1", lambda found: 99)
    await limiter.settle_job("unknown", lambda found: 5)
    assert await used(store) == [70]


@pytest.mark.parametrize(
    ("state", "spent"),
    [
        pytest.param(JobState("ended", 30), 30, id="ended"),
        pytest.param(JobState("ended", None), 100, id="ended, cost unknown"),
        pytest.param(JobState("ended", 0), 0, id="failed"),
        pytest.param(JobState("gone"), 100, id="gone"),
    ],
)
async def test_fal_is_asked_about_a_job_whose_result_is_not_read(
    world: World, limiter: Limiter, store: UnreliableStore, state: JobState, spent: int
) -> None:
    await (await reserve(limiter, 100, BUDGET, CONCURRENCY)).attach("job-1", "{}")
    world.jobs["job-1"] = state
    await limiter.sweep()
    assert world.asked == []
    world.seconds += 11
    await limiter.sweep()
    await limiter.sweep()
    assert world.asked == ["job-1"]
    assert await used(store, BUDGET, CONCURRENCY) == [spent, 0]


@pytest.mark.parametrize("state", ["running", "unknown"])
async def test_a_running_job_is_asked_about_less_and_less(
    world: World, limiter: Limiter, store: UnreliableStore, state: str
) -> None:
    await (await reserve(limiter, 100)).attach("job-1", "{}")
    world.jobs["job-1"] = JobState(state)  # type: ignore[arg-type]
    times: list[float] = []
    while world.seconds < JOB_TIMEOUT:
        world.seconds += 5
        before = len(world.asked)
        await limiter.sweep()
        times += [world.seconds] * (len(world.asked) - before)
    gaps = [second - first for first, second in pairwise(times)]
    assert gaps == sorted(gaps)
    assert 300 <= gaps[-1] <= 310
    assert len(times) < 80
    assert await used(store) == [100]
    world.seconds += 400
    await limiter.sweep()
    assert await used(store) == [100]
    assert await store.find("job-1") is None, "it counts as spent"


async def test_a_call_of_a_dead_process_counts_as_spent(
    world: World, limiter: Limiter, store: UnreliableStore
) -> None:
    await reserve(limiter, 100, BUDGET, CONCURRENCY)
    other = world.limiter(store)
    world.seconds += LEASE + 1
    await other.sweep()
    assert await used(store, BUDGET, CONCURRENCY) == [100, 0]
    assert await store.claim_due(9, 1.0) == []


async def test_a_running_call_is_kept(
    world: World, limiter: Limiter, store: UnreliableStore
) -> None:
    reservation = await reserve(limiter, 100)
    world.seconds += LEASE + 1
    await limiter.sweep()
    await reservation.release()
    assert await used(store) == [0]


async def test_a_cancelled_job_is_asked_about_soon(
    world: World, limiter: Limiter, store: UnreliableStore
) -> None:
    await (await reserve(limiter, 100)).attach("job-1", "{}")
    world.jobs["job-1"] = JobState("ended", 0)
    await limiter.check_job_soon("job-1", str)
    world.seconds += 2.5
    await limiter.sweep()
    assert await used(store) == [0]


# --- A store that is away ---


@pytest.mark.parametrize(
    ("on_error", "limits", "passes"),
    [
        ("default", [RATE], True),
        ("default", [CONCURRENCY], True),
        ("default", [RATE, BUDGET], False),
        ("allow", [RATE, BUDGET], True),
        ("refuse", [RATE], False),
    ],
)
async def test_a_store_that_is_away(
    world: World, store: UnreliableStore, on_error: OnError, limits: Sequence[Limit], passes: bool
) -> None:
    store.is_away = True
    limiter = world.limiter(store, on_error)
    for _ in range(3):
        if passes:
            assert await limiter.reserve(limits, 10) == (None, None)
            continue
        with pytest.raises(ProxyError) as caught:
            await limiter.reserve(limits, 10)
        assert (caught.value.status, caught.value.code) == (503, "limits_unavailable")
        assert "Retry-After" in caught.value.headers


async def recover(limiter: Limiter, store: UnreliableStore) -> None:
    store.is_away = store.loses_replies = False
    async with asyncio.timeout(5):
        while True:
            try:
                await limiter.sweep()
            except LimitsError:
                await asyncio.sleep(0.05)
            else:
                return


async def test_an_end_is_written_when_the_store_is_back(
    limiter: Limiter, store: UnreliableStore
) -> None:
    reservation = await reserve(limiter, 100)
    store.is_away = True
    await reservation.settle(30)
    store.is_away = False
    assert await used(store) == [100]
    await recover(limiter, store)
    assert await used(store) == [30]


async def test_a_reservation_whose_reply_was_lost_is_released(
    limiter: Limiter, store: UnreliableStore
) -> None:
    store.loses_replies = True
    with pytest.raises(ProxyError):
        await limiter.reserve([BUDGET], 100)
    assert await used(store) == [100]
    await recover(limiter, store)
    assert await used(store) == [0]


async def test_a_cancelled_reservation_is_released(
    limiter: Limiter, store: UnreliableStore
) -> None:
    task = asyncio.ensure_future(limiter.reserve([BUDGET], 100))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await limiter.sweep()
    assert await used(store) == [0]
