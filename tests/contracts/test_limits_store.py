"""Contract of the limits stores, SQLite and Redis."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from random import Random

import pytest
from redis.asyncio import Redis

from falproxy.stores.limits import (
    Admission,
    Limit,
    LimitsError,
    LimitsStore,
    LimitState,
    Reservation,
    ReserveRequest,
)
from falproxy.stores.limits.redis import RedisLimitsStore
from falproxy.stores.limits.sqlite import SqliteLimitsStore
from falproxy.windows import DAY, Window
from tests.support.redis_server import RedisServer, redis_server
from tests.support.store_processes import StoreProcesses
from tests.support.tcp_forwarder import TcpForwarder

MINUTE, MONTH = Window(60), Window(None)
LONG = Window(1000 * DAY)  # does not end while a test runs
TOKENS = count()


Processes = StoreProcesses[LimitsStore]


@pytest.fixture(params=["sqlite", "redis"])
async def processes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Processes]:
    if request.param == "sqlite":
        file = tmp_path / "data" / "limits.sqlite"
        shared = Processes.with_clock(lambda clock: SqliteLimitsStore(file, clock=clock))
    else:
        url = request.getfixturevalue("redis").url
        shared = Processes(lambda: RedisLimitsStore(url, prefix=f"{tmp_path.name}:"))
    async with shared.stack:
        yield shared


@pytest.fixture
async def redis_store(redis: RedisServer, tmp_path: Path) -> AsyncIterator[LimitsStore]:
    async with RedisLimitsStore(redis.url, prefix=f"{tmp_path.name}:") as opened:
        yield opened


@pytest.fixture
async def store(processes: Processes) -> LimitsStore:
    return await processes.store()


@pytest.fixture
async def other(processes: Processes) -> LimitsStore:
    """The store of another process."""
    return await processes.store()


def rate(maximum: int, seconds: int = 60, subject: str = "principal:web") -> Limit:
    return Limit("rate", subject, maximum, Window(seconds))


def concurrency(maximum: int, subject: str = "principal:web") -> Limit:
    return Limit("concurrency", subject, maximum)


def budget(maximum: int, window: Window = LONG, subject: str = "principal:web") -> Limit:
    return Limit("budget", subject, maximum, window)


def request(*limits: Limit, amount: int = 0, lease: float = 60.0) -> ReserveRequest:
    return ReserveRequest(f"token-{next(TOKENS)}", limits, amount, lease)


async def used(store: LimitsStore, *limits: Limit) -> list[int]:
    return [state.used for state in await store.count(limits)]


# --- Each kind of limit ---


async def test_a_new_store_has_counted_nothing(store: LimitsStore) -> None:
    limits = (rate(5), concurrency(5), budget(5), budget(5, MONTH))
    assert await used(store, *limits) == [0, 0, 0, 0]
    assert await store.find("id") is None
    assert await store.claim_due(10, 60.0) == []
    assert await store.settle("unknown", 1) is False
    assert await store.attach("unknown", "id", "", 1.0) is False
    assert await store.renew("unknown", 1.0) is False
    assert await store.find("id") is None


async def test_a_rate_admits_exactly_its_maximum(store: LimitsStore, other: LimitsStore) -> None:
    limit = rate(5)
    admissions = [await one.reserve(request(limit)) for one in (store, other) * 4]
    assert [admission.refused for admission in admissions] == [None] * 5 + [0] * 3
    assert [admission.states[0].used for admission in admissions] == [1, 2, 3, 4, 5, 5, 5, 5]
    assert all(0 < admission.states[0].seconds <= 61 for admission in admissions)
    assert await used(other, limit, rate(5, subject="principal:other"), rate(5, 3600)) == [5, 0, 0]


async def test_a_rate_admits_again_after_the_seconds_of_its_refusal(
    processes: Processes, store: LimitsStore
) -> None:
    limit = rate(2, 1)
    for _ in range(2):
        assert (await store.reserve(request(limit))).refused is None
    refusal = await store.reserve(request(limit))
    assert refusal.refused == 0
    await processes.wait(refusal.states[0].seconds + 0.01)
    assert (await store.reserve(request(limit))).refused is None


async def test_no_window_of_a_rate_has_more_requests(tmp_path: Path) -> None:
    now = 1_000_000_000.0
    admitted: list[float] = []
    random = Random(3)
    async with SqliteLimitsStore(tmp_path / "l.sqlite", clock=lambda: now) as store:
        for _ in range(400):
            now += random.choice((0.0, 0.01, 0.4, 5.0))
            if (await store.reserve(request(rate(7, 10)))).refused is None:
                admitted.append(now)
    windows = (sum(1 for at in admitted if start <= at < start + 10) for start in admitted)
    assert max(windows) == 7


async def test_concurrency_counts_jobs_under_way(store: LimitsStore, other: LimitsStore) -> None:
    limit = concurrency(2)
    first, second, third = request(limit), request(limit), request(limit)
    assert [
        (await one.reserve(call)).refused for one, call in ((store, first), (other, second))
    ] == [
        None,
        None,
    ]
    refusal = await store.reserve(third)
    assert (refusal.refused, refusal.states[0].used) == (0, 2)
    assert await other.release(first.token) is True
    assert await other.release(first.token) is False
    assert (await store.reserve(third)).refused is None


async def test_a_dead_process_does_not_hold_concurrency(
    processes: Processes, store: LimitsStore
) -> None:
    limit = concurrency(2)
    dead, alive = request(limit, lease=0.2), request(limit, lease=0.2)
    for call in (dead, alive):
        await store.reserve(call)
    await store.renew(alive.token, 60.0)
    await processes.wait(0.25)
    assert await used(store, limit) == [1]
    assert (await store.reserve(request(limit))).refused is None


async def test_a_job_in_the_queue_counts_until_its_end(
    processes: Processes, store: LimitsStore, other: LimitsStore
) -> None:
    limit = concurrency(1)
    call = request(limit, lease=0.2)
    await store.reserve(call)
    assert await store.attach(call.token, "job", "{}", 0.2) is True
    await store.renew(call.token, 0.1)
    await processes.wait(0.25)
    assert (await other.reserve(request(limit))).refused == 0
    assert await other.settle(call.token, 0) is True
    assert (await other.reserve(request(limit))).refused is None


async def test_a_budget_is_never_exceeded(store: LimitsStore, other: LimitsStore) -> None:
    limit = budget(1_000_000)
    calls = [request(limit, amount=25_000) for _ in range(200)]
    admissions = await asyncio.gather(
        *((store, other)[number % 2].reserve(call) for number, call in enumerate(calls))
    )
    assert Counter(admission.refused for admission in admissions) == {None: 40, 0: 160}
    assert await used(store, limit) == [1_000_000]


async def test_a_budget_counts_what_a_call_cost(store: LimitsStore, other: LimitsStore) -> None:
    limit = budget(100)
    calls = [request(limit, amount=50) for _ in range(3)]
    assert [(await store.reserve(call)).refused for call in calls] == [None, None, 0]
    assert await other.settle(calls[0].token, 20) is True
    assert await used(store, limit) == [70]
    assert await store.settle(calls[0].token, 99) is False
    assert await store.settle(calls[1].token, 60) is True
    assert await used(store, limit) == [80]
    assert await store.settle(calls[2].token, 9) is False
    assert await used(store, limit) == [80]


async def test_a_call_that_costs_more_than_was_reserved_is_counted(store: LimitsStore) -> None:
    limit, call = budget(100), request(budget(100), amount=90)
    await store.reserve(call)
    await store.settle(call.token, 250)
    assert await used(store, limit) == [250]
    assert (await store.reserve(request(limit, amount=0))).refused == 0


async def test_amounts_are_exact(store: LimitsStore) -> None:
    limit = budget(2**53, MONTH)
    call = request(limit, amount=2**52 + 1)
    await store.reserve(call)
    assert await used(store, limit) == [2**52 + 1]
    await store.settle(call.token, 3)
    assert await used(store, limit) == [3]


async def test_a_refused_call_counts_nowhere(store: LimitsStore) -> None:
    limits = (rate(5), concurrency(5), budget(100), budget(10, subject="total"))
    admission = await store.reserve(request(*limits, amount=11))
    assert admission.refused == 3
    assert await used(store, *limits) == [0, 0, 0, 0]
    admission = await store.reserve(request(*limits, amount=10))
    assert [state.used for state in admission.states] == [1, 1, 10, 10]
    assert await used(store, *limits) == [1, 1, 10, 10]


async def test_the_first_limit_that_refuses_is_named(store: LimitsStore) -> None:
    assert (await store.reserve(request(rate(0), concurrency(0), budget(0), amount=1))).refused == 0
    assert (await store.reserve(request(rate(1), concurrency(0), budget(0), amount=1))).refused == 1


async def test_a_budget_renews_with_its_window(processes: Processes, store: LimitsStore) -> None:
    limit = budget(100, Window(1))
    call = request(limit, amount=100)
    while (await store.count([limit]))[0].seconds < 0.5:  # not at the end of a window
        await processes.wait(0.1)
    await store.reserve(call)
    refusal = await store.reserve(request(limit, amount=1))
    assert refusal.refused == 0
    assert 0 < refusal.states[0].seconds <= 1
    await processes.wait(refusal.states[0].seconds + 0.01)
    assert (await store.reserve(request(limit, amount=100))).refused is None
    await store.settle(call.token, 0)
    assert await used(store, limit) == [100], "an earlier window does not change this one"


# --- Reservations ---


async def test_a_reservation_is_found_by_the_request_id(
    store: LimitsStore, other: LimitsStore
) -> None:
    call = request(budget(100), concurrency(3), amount=40)
    await store.reserve(call)
    assert await store.attach(call.token, "job-1", '{"app": "a"}', 60.0) is True
    found = await other.find("job-1")
    assert found == Reservation(call.token, 40, "job-1", '{"app": "a"}')
    assert 0 <= found.age < 60
    await other.settle(call.token, 40)
    assert await store.find("job-1") is None


async def test_a_rate_alone_leaves_nothing_to_end(store: LimitsStore) -> None:
    call = request(rate(5), lease=0.0)
    await store.reserve(call)
    assert await store.release(call.token) is False
    assert await store.claim_due(10, 60.0) == []


async def test_reservations_that_are_due_are_claimed_once(
    processes: Processes, store: LimitsStore, other: LimitsStore
) -> None:
    limit = budget(1000)
    calls = [request(limit, amount=number, lease=0.1 + number / 1000) for number in range(6)]
    later = request(limit, amount=1, lease=60.0)
    for call in (*calls, later):
        await store.reserve(call)
    await store.attach(calls[0].token, "job-0", "details", 0.01)
    await processes.wait(0.3)
    claims = [*await store.claim_due(4, 60.0), *await other.claim_due(10, 60.0)]
    assert [claim.token for claim in claims] == [call.token for call in calls]
    assert [claim.amount for claim in claims] == [call.amount for call in calls]
    assert (claims[0].request_id, claims[0].details) == ("job-0", "details")
    assert claims[1].request_id is None
    assert await other.claim_due(10, 60.0) == []
    await other.renew(calls[3].token, 0.1)
    await processes.wait(0.15)
    assert [claim.token for claim in await store.claim_due(10, 60.0)] == [calls[3].token]


async def test_a_settled_reservation_is_never_due(processes: Processes, store: LimitsStore) -> None:
    call = request(budget(10), amount=1, lease=0.05)
    await store.reserve(call)
    await store.settle(call.token, 1)
    assert await store.renew(call.token, 0.0) is False
    await processes.wait(0.1)
    assert await store.claim_due(10, 60.0) == []


async def test_calls_of_several_processes_leave_exact_sums(
    store: LimitsStore, other: LimitsStore
) -> None:
    """Random calls, ends and repeats of ends; the sums are those of a plain model."""
    random, limits = Random(11), (budget(10_000), budget(30_000, MONTH, "total"), concurrency(9))
    open_calls: dict[str, int] = {}
    spent = 0
    for _ in range(300):
        one = random.choice((store, other))
        if open_calls and random.random() < 0.5:
            token = random.choice(list(open_calls))
            amount, reserved = random.randrange(60), open_calls.pop(token)
            assert await one.settle(token, amount) is True
            assert await one.settle(token, reserved) is False
            spent += amount
            continue
        call = request(*limits, amount=random.randrange(400))
        admission = await one.reserve(call)
        total = spent + sum(open_calls.values()) + call.amount
        expected = 0 if total > 10_000 else 2 if len(open_calls) == 9 else None
        assert admission.refused == expected
        if expected is None:
            open_calls[call.token] = call.amount
    total = spent + sum(open_calls.values())
    assert await used(other, *limits) == [total, total, len(open_calls)]
    for token in open_calls:
        await store.release(token)
    assert await used(other, *limits) == [spent, spent, 0]


# --- Clocks and failures ---


async def test_the_clock_of_redis_counts(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = (budget(10, MINUTE), rate(2))
    async with (
        RedisLimitsStore(redis.url, prefix="right:") as right,
        RedisLimitsStore(redis.url, prefix="right:") as wrong,
    ):
        await right.reserve(request(*limits, amount=4))
        real = time.time
        monkeypatch.setattr("falproxy.stores.limits.redis.time.time", lambda: real() + 5000.0)
        assert [state.used for state in await wrong.count(limits)] == [4, 1]
        assert (await wrong.reserve(request(*limits, amount=4))).refused is None
        monkeypatch.undo()
        assert await used(right, *limits) == [8, 2]


async def test_a_store_that_is_away_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    async with (
        RedisLimitsStore("redis://127.0.0.1:1/0") as redis,
        SqliteLimitsStore(tmp_path / "folder") as sqlite,
    ):
        for store in (redis, sqlite):
            with pytest.raises(LimitsError):
                await store.reserve(request(rate(1)))
            with pytest.raises(LimitsError):
                await store.count([rate(1)])


def test_a_url_that_is_none_is_refused_without_its_text() -> None:
    with pytest.raises(ValueError, match=r"^not a URL of a Redis server$") as caught:
        RedisLimitsStore("redis://u:s3cret@host:port/")
    assert caught.value.__cause__ is None


def test_the_stores_have_a_repr(tmp_path: Path) -> None:
    assert "limits.sqlite" in repr(SqliteLimitsStore(tmp_path / "limits.sqlite"))
    assert "s3cret" not in repr(RedisLimitsStore("redis://u:s3cret@127.0.0.1:1/0"))
    assert Admission(None, (LimitState(1, 2.0),)).refused is None


async def test_two_reservations_with_one_request_id_both_end(store: LimitsStore) -> None:
    first, second = request(budget(100), amount=30), request(budget(100), amount=40)
    for reservation in (first, second):
        await store.reserve(reservation)
        assert await store.attach(reservation.token, "same id", "", 60.0)
    found = await store.find("same id")
    assert found is not None
    assert found.token == second.token
    assert await store.settle(second.token, 4)
    assert await store.settle(first.token, 3)
    assert await used(store, budget(100)) == [7]


async def test_a_reserve_that_is_sent_again_counts_once(redis_store: LimitsStore) -> None:
    """As by a client of a cluster, after a lost connection."""
    reservation = request(budget(100), concurrency(1), amount=60)
    for _ in range(2):
        assert (await redis_store.reserve(reservation)).refused is None
    assert await used(redis_store, budget(100), concurrency(1)) == [60, 1]


async def test_a_server_at_the_same_address_after_a_failover_is_used() -> None:
    """Connections to the old server stay open, and it has become read-only."""
    with redis_server() as old, redis_server() as new:
        async with (
            TcpForwarder(old.port).running() as address,
            RedisLimitsStore(address.url) as store,
        ):
            assert (await store.reserve(request(budget(100), amount=1))).refused is None
            async with Redis.from_url(old.url) as redis:
                await redis.replicaof("127.0.0.1", new.port)
            address.target = new.port
            with pytest.raises(LimitsError):
                await store.reserve(request(budget(100), amount=1))
            assert (await store.reserve(request(budget(100), amount=2))).refused is None


async def test_no_key_in_redis_can_be_evicted_and_expired_ones_are_deleted() -> None:
    with redis_server() as running:
        async with RedisLimitsStore(running.url) as store, Redis.from_url(running.url) as redis:
            ended, attached = (
                request(rate(9), concurrency(9), budget(9), amount=1, lease=0.0) for _ in range(2)
            )
            for reservation in (ended, attached):
                await store.reserve(reservation)
                await store.attach(reservation.token, reservation.token, "", 60.0)
            await store.settle(ended.token, 1)
            keys = [key async for key in redis.scan_iter()]
            assert [await redis.ttl(key) for key in keys] == [-1] * len(keys)
            expiry = "falproxy:{limits}:expiry"
            names: list[bytes] = await redis.zrange(expiry, 0, -1)  # type: ignore[assignment]
            assert {*names} == {*keys} - {expiry.encode(), b"falproxy:{limits}:open"}
            await redis.zadd(expiry, dict.fromkeys(names, 1.0))
            await store.claim_due(9, 60.0)
            assert [key async for key in redis.scan_iter()] == [b"falproxy:{limits}:open"]
