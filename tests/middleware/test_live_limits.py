"""Limits and costs of live video: a session counts until its heartbeats end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientResponse, web

from falproxy.metrics import METRICS
from falproxy.middleware.limiter import LIMITER
from falproxy.middleware.live_reservations import FIRST_SECONDS, NEXT_SECONDS, SESSION_LEASE
from falproxy.stores.ledger import CallRecord, UsageQuery
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.fake_fal import FakeFal
from tests.support.fake_live import (
    DIRECTOR,
    ICE,
    FakeLive,
    beat,
    open_session,
    opened_session,
)
from tests.support.gateway import Gateway, MakeGateway
from tests.support.limits import HOUR, LONG, open_reservations, running, spent, sweep_after
from tests.support.waiting import SOON, wait_until

ME = "principal:address:127.0.0.1"
KEYS = (("ann", "s3cret-ann"), ("bob", "s3cret-bob"))
ANN, BOB = ("x-falproxy-key", "s3cret-ann"), ("x-falproxy-key", "s3cret-bob")
CENT = 10_000  # micro-USD


@pytest.fixture
def live(fal: FakeFal, monkeypatch: pytest.MonkeyPatch) -> FakeLive:
    return FakeLive(fal, monkeypatch, price=0.01)


Open = Callable[..., Awaitable[Gateway]]


@pytest.fixture
def make(make_gateway: MakeGateway, live: FakeLive) -> Open:
    async def open_gateway(**settings: Any) -> Gateway:
        return await make_gateway(live.fake.origin, **settings)

    return open_gateway


def app_of(gateway: Gateway) -> web.Application:
    return gateway.client.server.app  # type: ignore[attr-defined, no-any-return]


async def refused(response: ClientResponse, status: int, code: str) -> None:
    document = await response.json()
    assert (response.status, document["type"]) == (status, code), document


async def records(gateway: Gateway) -> list[CallRecord]:
    """Return the records of the ledger, oldest first."""
    writer = app_of(gateway)[LEDGER_WRITER]
    await wait_until(lambda: not writer.pending_rows)
    return (await writer.ledger.latest(UsageQuery()))[::-1]


# --- Rates and concurrency ---


async def test_sessions_and_their_servers_count_as_requests(make: Open, live: FakeLive) -> None:
    gateway = await make(rate=(3, HOUR))
    assert (await gateway.call(ICE, json={"app_id": DIRECTOR})).status == 200
    sessions = [await opened_session(gateway) for _ in range(2)]
    await refused(await open_session(gateway), 429, "rate_limited")
    await refused(await gateway.call(ICE, json={"app_id": DIRECTOR}), 429, "rate_limited")
    for session in sessions * 3:
        assert await beat(gateway, session)
    assert live.opened == 2


async def test_a_session_is_under_way_until_its_heartbeats_end(make: Open, live: FakeLive) -> None:
    gateway = await make(concurrency=1)
    session = await opened_session(gateway)
    for _ in range(4):
        await refused(await open_session(gateway), 429, "concurrency_limited")
        await sweep_after(app_of(gateway), SESSION_LEASE - 5)
        assert await beat(gateway, session)
    assert await running(app_of(gateway), ME) == 1
    await sweep_after(app_of(gateway), SESSION_LEASE + 1)
    assert await running(app_of(gateway), ME) == 0
    await opened_session(gateway)
    assert live.opened == 2


async def test_asking_for_servers_is_not_under_way(make: Open) -> None:
    gateway = await make(concurrency=1)
    await opened_session(gateway)
    assert (await gateway.call(ICE, json={"app_id": DIRECTOR})).status == 200


async def test_a_session_that_fal_ends_is_not_under_way(
    make: Open, live: FakeLive, store_settings: dict[str, Any]
) -> None:
    gateway = await make(concurrency=1, budget=(100 * CENT, LONG), **store_settings)
    session = await opened_session(gateway)
    await refused(await open_session(gateway), 429, "concurrency_limited")
    live.clock.now += 58
    assert await beat(gateway, session)
    assert await spent(app_of(gateway), ME) == (FIRST_SECONDS + NEXT_SECONDS) * CENT
    live.over.add(session)
    assert not await beat(gateway, session)
    assert await running(app_of(gateway), ME) == 0
    assert await spent(app_of(gateway), ME) == 58 * CENT


async def test_a_session_at_its_maximum_is_not_under_way(make: Open, live: FakeLive) -> None:
    gateway = await make(concurrency=1, live_max_seconds=60.0)
    session = await opened_session(gateway)
    live.clock.now += 61
    assert not await beat(gateway, session)
    assert await running(app_of(gateway), ME) == 0


async def test_a_failed_session_is_not_under_way(make: Open, live: FakeLive) -> None:
    gateway = await make(concurrency=1, budget=(1_000_000, LONG))
    live.status = 500
    for _ in range(3):
        assert (await open_session(gateway)).status == 500
    assert await running(app_of(gateway), ME) == 0
    assert await spent(app_of(gateway), ME) == 0


async def test_sessions_at_once_never_exceed_the_concurrency(make: Open, live: FakeLive) -> None:
    gateway = await make(concurrency=3)
    statuses = [response.status for response in await asyncio.gather(
        *(open_session(gateway) for _ in range(10))
    )]  # fmt: skip
    assert sorted(statuses) == [200] * 3 + [429] * 7
    assert live.opened == 3


async def test_callers_are_limited_apart(make: Open) -> None:
    gateway = await make(concurrency=1, access_keys=KEYS)
    session = await opened_session(gateway, ANN)
    await opened_session(gateway, BOB)
    await refused(await open_session(gateway, ANN), 429, "concurrency_limited")
    assert await beat(gateway, session, ANN)


async def test_a_session_that_comes_back_late_counts_again(make: Open) -> None:
    gateway = await make(concurrency=1)
    first = await opened_session(gateway)
    await sweep_after(app_of(gateway), SESSION_LEASE + 1)
    assert await beat(gateway, first)
    assert await running(app_of(gateway), ME) == 1
    await sweep_after(app_of(gateway), SESSION_LEASE + 1)
    second = await opened_session(gateway)
    assert not await beat(gateway, first)
    assert await beat(gateway, second)


# --- Budgets ---


async def test_a_maximum_is_reserved_and_settled_to_the_length(make: Open, live: FakeLive) -> None:
    gateway = await make(budget=(100 * CENT, LONG), live_max_seconds=60.0)
    app = app_of(gateway)
    session = await opened_session(gateway)
    assert await spent(app, ME) == 60 * CENT
    await refused(await open_session(gateway), 402, "budget_exceeded")
    live.clock.now += 20
    assert await beat(gateway, session)
    assert await spent(app, ME) == 60 * CENT
    live.clock.now += 38  # to the last heartbeat before the maximum
    assert await beat(gateway, session)
    assert await spent(app, ME) == 60 * CENT
    await sweep_after(app, SESSION_LEASE + 1)
    assert await spent(app, ME) == 58 * CENT


async def test_without_a_maximum_a_session_ends_with_the_budget(make: Open, live: FakeLive) -> None:
    gateway = await make(budget=(100 * CENT, LONG))
    app = app_of(gateway)
    session = await opened_session(gateway)
    assert await spent(app, ME) == FIRST_SECONDS * CENT
    live.clock.now += 50
    assert await beat(gateway, session)
    assert await spent(app, ME) == FIRST_SECONDS * CENT
    live.clock.now += 8
    assert await beat(gateway, session)
    assert await spent(app, ME) == (FIRST_SECONDS + NEXT_SECONDS) * CENT
    live.clock.now += 20
    assert await beat(gateway, session)
    sent = len(live.calls)
    live.clock.now += 10  # 88 seconds: the next step does not fit into the budget
    assert not await beat(gateway, session)
    assert len(live.calls) == sent
    assert await spent(app, ME) == 78 * CENT
    assert await open_reservations(app) == 0


async def test_a_long_session_costs_its_length(make: Open, live: FakeLive) -> None:
    gateway = await make(budget=(1000 * CENT, LONG))
    session = await opened_session(gateway)
    for _ in range(30):
        live.clock.now += 5
        assert await beat(gateway, session)
    await sweep_after(app_of(gateway), SESSION_LEASE + 1)
    assert await spent(app_of(gateway), ME) == 150 * CENT


async def test_a_session_of_unknown_price_is_refused_under_a_budget(
    make: Open, live: FakeLive
) -> None:
    live.price = None
    gateway = await make(budget=(100 * CENT, LONG))
    await refused(await open_session(gateway), 402, "price_unknown")
    assert live.calls == []


async def test_a_price_can_be_set_for_sessions_of_unknown_price(make: Open, live: FakeLive) -> None:
    live.price = None
    gateway = await make(budget=(100 * CENT, LONG), unknown_price=60 * CENT)
    session = await opened_session(gateway)
    live.clock.now += 1000
    assert await beat(gateway, session)
    assert await spent(app_of(gateway), ME) == 60 * CENT
    await refused(await open_session(gateway), 402, "budget_exceeded")


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        pytest.param({"max_cost": 50 * CENT}, True, id="the first minute is too much"),
        pytest.param({"max_cost": 61 * CENT}, False, id="the first minute is not"),
        pytest.param({"max_cost": 61 * CENT, "live_max_seconds": 100.0}, True, id="the maximum is"),
        pytest.param({"max_cost": 61 * CENT, "live_max_seconds": 10.0}, False, id="a small one"),
    ],
)
async def test_a_session_may_not_cost_more_than_a_single_call(
    make: Open, settings: dict[str, Any], is_refused: bool
) -> None:
    gateway = await make(**settings)
    response = await open_session(gateway)
    assert response.status == (402 if is_refused else 200)


async def test_a_session_ends_at_the_maximum_cost(make: Open, live: FakeLive) -> None:
    gateway = await make(max_cost=100 * CENT)
    session = await opened_session(gateway)
    live.clock.now += 94
    assert await beat(gateway, session)
    live.clock.now += 2
    assert not await beat(gateway, session)


async def test_a_lost_response_to_a_session_counts_as_spent(make: Open, live: FakeLive) -> None:
    live.delay = asyncio.Event()
    gateway = await make(budget=(100 * CENT, LONG), upstream_timeout=0.2)
    await refused(await open_session(gateway), 504, "upstream_timeout")
    assert await spent(app_of(gateway), ME) == FIRST_SECONDS * CENT
    assert live.opened == 1


async def test_without_the_limits_store_sessions_go_on(make: Open, live: FakeLive) -> None:
    gateway = await make(concurrency=1, budget=(100 * CENT, LONG))
    session = await opened_session(gateway)
    store: Any = app_of(gateway)[LIMITER]._store
    store._file, connection, store._connection = store._file.parent, store._connection, None
    connection and await asyncio.get_running_loop().run_in_executor(
        store._executor, connection.close
    )
    assert await beat(gateway, session)
    await refused(await open_session(gateway), 503, "limits_unavailable")
    assert live.opened == 1


# --- Ledger ---


async def test_the_ledger_has_sessions_with_their_length_and_cost(
    make: Open, live: FakeLive
) -> None:
    gateway = await make(access_keys=KEYS, live_max_seconds=60.0)
    await gateway.call(ICE, json={"app_id": DIRECTOR}, headers=[ANN])
    session = await opened_session(gateway, ANN)
    ice, opened = await records(gateway)
    assert (ice.operation, ice.endpoint, ice.principal, ice.settled) == ("ice", DIRECTOR, "ann", 0)
    assert (opened.operation, opened.endpoint, opened.status) == ("session", DIRECTOR, 200)
    assert (opened.request_id, opened.settled) == (session, None)
    live.clock.now += 12
    assert await beat(gateway, session, ANN)
    async with asyncio.timeout(SOON):  # the price is asked for in the background
        while (record := (await records(gateway))[1]).settled is None:
            await asyncio.sleep(0.01)
    assert record.units == 12
    assert record.settled == 12 * CENT
    live.clock.now += 30
    assert await beat(gateway, session, ANN)
    record = (await records(gateway))[1]
    assert record.units == 42
    assert record.settled == 42 * CENT
    live.over.add(session)
    live.clock.now += 10
    assert not await beat(gateway, session, ANN)
    assert len(await records(gateway)) == 2
    assert (await records(gateway))[1].settled == record.settled


async def test_a_session_that_was_opened_without_a_price_has_none(
    make: Open, live: FakeLive
) -> None:
    live.price = None
    gateway = await make()
    session = await opened_session(gateway)
    live.clock.now += 12
    assert await beat(gateway, session)
    (record,) = await records(gateway)
    assert record.settled is None
    assert record.units == 12


async def test_a_refused_session_is_in_the_ledger_and_costs_nothing(
    make: Open, live: FakeLive
) -> None:
    gateway = await make(concurrency=1)
    await opened_session(gateway)
    await open_session(gateway)
    refusal = (await records(gateway))[1]
    assert (refusal.status, refusal.error, refusal.settled) == (429, "concurrency_limited", 0)
    assert (refusal.operation, refusal.endpoint) == ("session", DIRECTOR)


async def test_the_cost_of_sessions_is_in_the_metrics(make: Open, live: FakeLive) -> None:
    gateway = await make(budget=(1000 * CENT, LONG))
    session = await opened_session(gateway)
    for _ in range(3):
        live.clock.now += 5
        assert await beat(gateway, session)
    spent_by_endpoint = app_of(gateway)[METRICS]._spent
    assert spent_by_endpoint[DIRECTOR] == 15 * CENT


async def test_the_estimate_is_in_the_response(make: Open) -> None:
    gateway = await make(budget=(1000 * CENT, LONG), live_max_seconds=90.0)
    response = await open_session(gateway)
    assert response.headers["x-falproxy-cost"] == "0.90"
    servers = await gateway.call(ICE, json={"app_id": DIRECTOR})
    assert servers.headers["x-falproxy-cost"] == "0.00"


def test_the_first_reservation_covers_the_steps_after_it() -> None:
    """Otherwise a session that ends early could not be settled to its length."""
    assert FIRST_SECONDS >= NEXT_SECONDS + SESSION_LEASE
