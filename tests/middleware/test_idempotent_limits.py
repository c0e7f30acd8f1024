"""Limits of calls with an Idempotency-Key: a repeated call costs nothing, and a refusal gives the
key back."""

import asyncio
from collections.abc import Awaitable, Callable
from unittest.mock import AsyncMock

import pytest
from aiohttp import ClientResponse, web

from falproxy.middleware.limiter import LIMITER
from falproxy.stores.limits import LimitsError
from tests.support.fake_fal import FakeFal
from tests.support.fake_queue import CAT, DOG, RUN, SUBMIT, FakeQueue, send
from tests.support.gateway import Gateway, MakeGateway
from tests.support.limits import HOUR, LONG, running, spent
from tests.support.waiting import wait_until

ME, COST = "principal:address:127.0.0.1", 40_000
COST_HEADER, REPLAYED = "x-falproxy-cost", "Idempotency-Replayed"
Open = Callable[..., Awaitable[Gateway]]


@pytest.fixture
def queue(fal: FakeFal) -> FakeQueue:
    return FakeQueue(fal)


@pytest.fixture
def make(make_gateway: MakeGateway, queue: FakeQueue) -> Open:
    async def open_gateway(**settings: object) -> Gateway:
        return await make_gateway(queue.fake.origin, cache=False, **settings)

    return open_gateway


async def keyed(
    gateway: Gateway, target: str, key: str = "k", body: object = CAT
) -> ClientResponse:
    response = await send(gateway, target, body, Idempotency_Key=key)
    await response.read()
    return response


async def outcome(response: ClientResponse) -> tuple[int, str]:
    return response.status, (await response.json()).get("type", "")


def app_of(gateway: Gateway) -> web.Application:
    return gateway.client.server.app  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("target", [RUN, SUBMIT])
async def test_a_repeated_call_costs_nothing(make: Open, queue: FakeQueue, target: str) -> None:
    gateway = await make(budget=(COST, LONG), concurrency=1)
    responses = [await keyed(gateway, target) for _ in range(3)]
    assert [response.status for response in responses] == [200] * 3
    assert [REPLAYED in response.headers for response in responses] == [False, True, True]
    costs = [response.headers.getall(COST_HEADER) for response in responses]
    assert costs == [["0.04"], ["0.00"], ["0.00"]]
    assert await spent(app_of(gateway), ME) == COST
    assert await outcome(await keyed(gateway, target, "other")) in (
        (402, "budget_exceeded"),
        (429, "concurrency_limited"),
    )
    assert queue.posts == 1


@pytest.mark.parametrize("target", [RUN, SUBMIT])
async def test_a_repeated_call_counts_as_a_request(
    make: Open, queue: FakeQueue, target: str
) -> None:
    gateway = await make(rate=(2, HOUR))
    assert [(await keyed(gateway, target)).status for _ in range(3)] == [200, 200, 429]
    assert queue.posts == 1


async def test_a_refusal_gives_the_key_back(make: Open, queue: FakeQueue) -> None:
    gateway = await make(concurrency=1, max_cost=2 * COST)
    queue.hold()
    first = asyncio.ensure_future(keyed(gateway, RUN, "first"))
    await wait_until(lambda: queue.posts, seconds=30)
    for _ in range(2):
        assert await outcome(await keyed(gateway, RUN, "second", DOG)) == (
            429, "concurrency_limited",
        )  # fmt: skip
    queue.release()
    assert (await first).status == 200
    second = await keyed(gateway, RUN, "second", DOG)
    assert (second.status, REPLAYED in second.headers) == (200, False)
    many = {"prompt": "cats", "num_images": 3}
    for _ in range(2):
        refused = await keyed(gateway, RUN, "third", many)
        assert await outcome(refused) == (402, "call_too_expensive")
        assert REPLAYED not in refused.headers
    assert queue.posts == 2


async def test_a_failure_of_the_limits_store_gives_the_key_back(
    make: Open, queue: FakeQueue
) -> None:
    gateway = await make(budget=(9 * COST, LONG))
    limiter = app_of(gateway)[LIMITER]
    store, limiter._store = limiter._store, AsyncMock(reserve=AsyncMock(side_effect=LimitsError))
    assert await outcome(await keyed(gateway, SUBMIT)) == (503, "limits_unavailable")
    limiter._store = store
    limiter._breaker.reset()
    repeated = await keyed(gateway, SUBMIT)
    assert (repeated.status, REPLAYED in repeated.headers) == (200, False)
    assert queue.posts == 1


async def test_a_call_that_is_repeated_after_its_client_left_is_counted_once(
    make: Open, queue: FakeQueue
) -> None:
    gateway = await make(budget=(9 * COST, LONG), concurrency=1)
    queue.hold()
    first = asyncio.ensure_future(keyed(gateway, RUN))
    await wait_until(lambda: queue.posts, seconds=30)
    first.cancel()
    again = asyncio.ensure_future(keyed(gateway, RUN))
    await asyncio.sleep(0.05)
    queue.release()
    assert (await again).status == 200
    assert await spent(app_of(gateway), ME) == COST
    assert await running(app_of(gateway), ME) == 0
    assert queue.posts == 1
