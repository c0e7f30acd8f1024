"""The sandbox's account: prices, billable units, a balance that runs out, and request tags."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from falproxy.sandbox.inference import billable_units
from falproxy.sandbox.models import FURTHER_PRICES, MODELS
from falproxy.sandbox.request import parse_tags
from tests.support.sandbox_proxy import Reply, SandboxProxy, open_sandbox_proxy
from tests.support.waiting import wait_until

DEV = "fal-ai/flux/dev"
DRAW = {"prompt": "!delay 0 a heron", "image_size": "square"}
LOCKED = (
    "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing."
)


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


async def run(proxy: SandboxProxy, **headers: str) -> Reply:
    return await proxy.call_target(f"https://fal.run/{DEV}", DRAW, headers=headers)


@pytest.mark.parametrize(
    ("unit", "sizes", "values", "units"),
    [
        ("images", [(4000, 4000)], {}, "1"),
        ("images", [(1, 1), (1, 1)], {}, "2"),
        ("megapixels", [(1024, 1024)], {}, "1"),
        ("megapixels", [(1025, 1024)], {}, "2"),
        ("megapixels", [(1, 1), (1, 1)], {}, "2"),
        ("videos", [], {"duration": "10"}, "1"),
        ("audios", [], {"seconds_total": 190}, "1"),
        ("seconds", [], {"duration": 5}, "5"),
        ("seconds", [], {"duration": "8s"}, "8"),
        ("seconds", [], {"duration": 2.5}, "2.5"),
        ("seconds", [], {"duration": 240.0}, "240"),
        ("1000 characters", [], {"text": "x" * 1500}, "1.5"),
        ("1000 characters", [], {"prompt": "x"}, "0.001"),
    ],
)
def test_units(
    unit: str, sizes: list[tuple[int, int]], values: dict[str, object], units: str
) -> None:
    model = replace(MODELS[DEV], unit=unit)
    assert str(billable_units(model, values, sizes)) == units


async def test_an_account_runs_out_of_balance(proxy: SandboxProxy) -> None:
    submit = f"https://queue.fal.run/{DEV}"
    running = (await proxy.call_target(submit, DRAW)).document["response_url"]
    while (await proxy.call_target(running)).status != 200:
        await asyncio.sleep(0.01)
    proxy.sandbox.balance = Decimal("0.04")
    assert [(await run(proxy)).status for _ in range(3)] == [200, 200, 403]
    assert proxy.sandbox.balance == Decimal("-0.01")
    for reply in (
        await run(proxy),
        await proxy.call_target(submit, DRAW),
        await proxy.call_target(running),
        await proxy.call_target(f"{running}/status"),
    ):
        assert (reply.status, reply.document) == (403, {"detail": LOCKED})
    proxy.sandbox.balance = Decimal(5)
    assert (await run(proxy)).status == 200


async def test_costs_are_shown_by_tag(proxy: SandboxProxy) -> None:
    await run(proxy, **{"X-Fal-Tags": "team=a, user=ann"})
    await run(proxy, **{"X-Fal-Tags": "team=a"})
    await proxy.call_target(
        f"https://queue.fal.run/{DEV}", DRAW, headers={"X-Fal-Tags": "team=b, bad"}
    )
    await wait_until(lambda: proxy.sandbox.jobs >= 3, seconds=5)
    async with proxy.session.get(f"{proxy.fal_origin}/sandbox/state") as response:
        state = await response.json()
    assert state["spent_by_tag"] == {"team=a": 0.05, "user=ann": 0.025, "team=b": 0.025}


@pytest.mark.parametrize(
    ("headers", "tags"),
    [
        ([], ()),
        (["a=1"], ("a=1",)),
        ([" a = 1 , b=2"], ("a=1", "b=2")),
        (["a=1=2"], ("a=1=2",)),
        (["a=1,a=2"], ("a=2",)),
        (["a,=1,b="], ("b=",)),
        (["fal.x=1,FAL.y=1,b=2"], ("b=2",)),
        ([",".join(f"k{number}=v" for number in range(12))],
         tuple(f"k{number}=v" for number in range(10))),
        (["a=" + "x" * 1023], ()),
        (["a=1", "b=2"], ("a=1", "b=2")),
    ],
)  # fmt: skip
def test_tags_are_validated_and_bad_ones_dropped(headers: list[str], tags: tuple[str, ...]) -> None:
    assert parse_tags(headers) == tags


@pytest.mark.parametrize("endpoint", FURTHER_PRICES)
async def test_prices_of_further_endpoints_can_be_asked_for(
    proxy: SandboxProxy, endpoint: str
) -> None:
    reply = await proxy.request("POST", "/api/estimate", json={"endpoint": endpoint, "input": {}})
    price, _ = FURTHER_PRICES[endpoint]
    assert (reply.status, reply.document["price"]) == (200, float(price))
