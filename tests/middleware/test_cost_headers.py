"""`x-falproxy-cost` and `x-falproxy-saved` on the responses of model calls, in every API."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from falproxy.fal.pricing import format_usd
from falproxy.proxy.prices import COST_HEADER, SAVED_HEADER
from tests.support.fake_fal import FakeFal
from tests.support.gateway import MakeGateway
from tests.support.sandbox_proxy import (
    ASYNC,
    Reply,
    SandboxProxy,
    data_uri,
    open_sandbox_proxy,
)

DEV, SCHNELL, SDXL = "fal-ai/flux/dev", "fal-ai/flux/schnell", "fal-ai/fast-sdxl"
TEXT = "fal-ai/flux-pro/kontext/text-to-image"
HERON = "!delay 0 a heron at dawn"
SIZE = {"width": 64, "height": 48}
DRAW: dict[str, Any] = {"prompt": HERON, "image_size": SIZE}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


def costs(reply: Reply) -> tuple[str | None, str | None]:
    assert reply.status < 300, reply
    assert len(reply.headers.getall(COST_HEADER, ())) <= 1
    return reply.headers.get(COST_HEADER), reply.headers.get(SAVED_HEADER)


async def submit(proxy: SandboxProxy, endpoint: str, body: object) -> Reply:
    return await proxy.call_target(f"https://queue.fal.run/{endpoint}", body)


async def finish(proxy: SandboxProxy, submitted: Reply) -> tuple[list[Reply], Reply]:
    """Return the polls of a job, and its result."""
    url = submitted.document["response_url"]
    polls = [await proxy.call_target(f"{url}/status")]
    while polls[-1].document["status"] != "COMPLETED":
        await asyncio.sleep(0.01)
        polls.append(await proxy.call_target(f"{url}/status"))
    return polls, await proxy.call_target(url)


async def test_a_run_has_its_cost(proxy: SandboxProxy) -> None:
    reply = await proxy.call_target(f"https://fal.run/{DEV}", DRAW | {"num_images": 3})
    assert costs(reply) == ("0.075", None)


async def test_a_submit_has_the_estimate_and_the_result_what_fal_charged(
    proxy: SandboxProxy,
) -> None:
    body = {"prompt": HERON, "image_url": data_uri(), "num_images": 2}
    submitted = await submit(proxy, "fal-ai/flux/dev/image-to-image", body)
    assert costs(submitted) == ("0.06", None)
    polls, result = await finish(proxy, submitted)
    assert costs(result) == ("0.06", None)
    assert {costs(poll) for poll in polls} == {(None, None)}


async def test_repeated_submits_have_the_cost_of_their_own_input(proxy: SandboxProxy) -> None:
    for count in (1, 2, 3, 4, 2):
        reply = await submit(proxy, DEV, DRAW | {"num_images": count})
        assert costs(reply) == (format_usd(25_000 * count), None)


async def test_a_submit_on_the_fast_path_has_the_cost_of_its_own_input(
    fal: FakeFal, make_gateway: MakeGateway
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.json_response({"request_id": "r", "status": "IN_QUEUE"})

    fal.respond = respond
    gateway = await make_gateway(fal.origin)
    for count, cost in [(1, "0.025"), (2, "0.05"), (3, "0.075"), (1, "0.025")]:
        body = {"prompt": "x", "num_images": count}
        async with await gateway.call(f"https://queue.fal.run/{DEV}", json=body) as response:
            assert response.headers.getall(COST_HEADER) == [cost]


async def test_a_stream_has_the_estimate(proxy: SandboxProxy) -> None:
    reply = await proxy.call_target(f"https://fal.run/{SCHNELL}/stream", DRAW)
    assert costs(reply) == ("0.003", None)


async def test_a_hit_costs_nothing_and_has_what_it_saved(proxy: SandboxProxy) -> None:
    body = {"prompt": HERON, "seed": 1, "num_images": 2}
    assert costs(await proxy.call_target(f"https://fal.run/{TEXT}", body)) == ("0.08", None)
    assert costs(await proxy.call_target(f"https://fal.run/{TEXT}", body)) == ("0.00", "0.08")
    submitted = await submit(proxy, TEXT, body)
    assert costs(submitted) == ("0.00", "0.08")
    polls, result = await finish(proxy, submitted)
    assert costs(result) == ("0.00", "0.08")
    assert {costs(poll) for poll in polls} == {(None, None)}
    assert proxy.sandbox.jobs == 1


async def test_only_one_of_equal_calls_has_a_cost(proxy: SandboxProxy) -> None:
    body = {"prompt": "!delay 0.4 a heron at dawn", "seed": 1}
    first, *others = [await submit(proxy, TEXT, body) for _ in range(3)]
    assert [costs(reply)[0] for reply in (first, *others)] == ["0.04", "0.00", "0.00"]
    results = [(await finish(proxy, reply))[1] for reply in (first, *others)]
    assert [costs(reply)[0] for reply in results] == ["0.04", "0.00", "0.00"]


@pytest.mark.parametrize(
    ("path", "body", "cost"),
    [
        pytest.param("/kontext", {"prompt": HERON, "image_url": data_uri()}, "0.04", id="kontext"),
        pytest.param(
            "/v1/images/generations", {"model": DEV, "prompt": HERON, "size": "64x64", "n": 6},
            "0.15", id="openai, two calls",
        ),
        pytest.param(
            "/v1/images/generations",
            {"model": SCHNELL, "prompt": HERON, "size": "64x64", "stream": True}, "0.003",
            id="openai, stream",
        ),
        pytest.param(
            "/api/images/generate", {"model": "flux-dev", "inputs": DRAW}, "0.025", id="generate"
        ),
        pytest.param(
            "/api/templates/product-shot", {"variables": {"product": HERON}}, "0.025",
            id="template",
        ),
        pytest.param(f"/api/fal/run/{DEV}", DRAW, "0.025", id="base URL"),
    ],
)  # fmt: skip
async def test_every_api_has_the_cost(
    proxy: SandboxProxy, path: str, body: object, cost: str
) -> None:
    assert costs(await proxy.request("POST", path, json=body)) == (cost, None)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/kontext", {"prompt": HERON, "image_url": data_uri()}, id="kontext"),
        pytest.param(
            "/v1/images/generations",
            {"model": TEXT, "prompt": HERON, "seed": 1, "response_format": "url"}, id="openai",
        ),
        pytest.param(
            "/api/images/generate",
            {"model": "kontext-text-to-image", "inputs": {"prompt": HERON, "seed": 1}},
            id="generate",
        ),
    ],
)  # fmt: skip
async def test_every_api_has_what_a_hit_saved(proxy: SandboxProxy, path: str, body: object) -> None:
    assert costs(await proxy.request("POST", path, json=body)) == ("0.04", None)
    assert costs(await proxy.request("POST", path, json=body)) == ("0.00", "0.04")


async def test_a_refused_call_has_no_cost(proxy: SandboxProxy) -> None:
    for prompt in ("!error 403 locked at=submit", "!error 429 queue_full at=submit"):
        reply = await submit(proxy, DEV, {"prompt": prompt})
        assert (reply.status >= 400, COST_HEADER in reply.headers) == (True, False)
    reply = await proxy.request("POST", "/kontext", json={})
    assert (reply.status, COST_HEADER in reply.headers) == (400, False)


async def test_a_failed_job_cost_nothing(proxy: SandboxProxy) -> None:
    submitted = await submit(proxy, DEV, {"prompt": "!error 422 content_policy_violation"})
    result = (await finish(proxy, submitted))[1]
    assert (result.status, result.headers[COST_HEADER]) == (422, "0.00")


async def test_a_job_that_was_cancelled_counts_nothing(proxy: SandboxProxy) -> None:
    submitted = await submit(proxy, DEV, DRAW | {"prompt": "!delay 60 a heron"})
    url = submitted.document["response_url"]
    assert (await proxy.call_target(f"{url}/cancel", method="PUT")).status == 202
    result = (await finish(proxy, submitted))[1]
    assert (result.status, result.headers[COST_HEADER]) == (499, "0.00")
    (record,) = await proxy.records()
    assert (record.status, record.settled) == (499, 0)


async def test_a_price_of_fal_is_known_at_the_result(proxy: SandboxProxy) -> None:
    submitted = await submit(proxy, SDXL, {"prompt": "!delay 0.3 a heron", "num_images": 2})
    assert costs(submitted) == (None, None)  # fal is asked in the background
    assert costs((await finish(proxy, submitted))[1]) == ("0.01", None)
    assert costs(await submit(proxy, SDXL, DRAW | {"num_images": 3})) == ("0.015", None)
    *_, first = await proxy.records()
    assert (first.units, first.settled) == (Decimal(2), 10_000)


async def test_a_run_of_a_new_endpoint_is_settled_when_its_price_arrives(
    proxy: SandboxProxy,
) -> None:
    await proxy.call_target(f"https://fal.run/{SDXL}", DRAW)
    async with asyncio.timeout(5):
        while (await proxy.records())[0].settled is None:
            await asyncio.sleep(0.02)
    assert (await proxy.records())[0].settled == 5_000


async def test_fal_is_asked_for_a_price_once(proxy: SandboxProxy) -> None:
    submitted = await submit(proxy, SDXL, DRAW)
    await finish(proxy, submitted)
    for _ in range(3):
        await submit(proxy, SDXL, DRAW)
    asked = [seen.query for seen in proxy.sandbox.seen if seen.path == "/v1/models/pricing"]
    assert asked == ["endpoint_id=fal-ai%2Ffast-sdxl"]


async def test_an_accepted_job_of_generate_has_no_cost_yet(proxy: SandboxProxy) -> None:
    body = {"model": "flux-dev", "inputs": DRAW}
    reply = await proxy.request("POST", "/api/images/generate", json=body, headers=ASYNC)
    assert (reply.status, reply.document["cost"]) == (202, None)
    assert (await proxy.wait_finished(reply.document["jobId"]))["cost"] == 0.025


async def test_pages_of_allowed_origins_may_read_the_headers(tmp_path: Path) -> None:
    origin = "https://app.example.com"
    async with open_sandbox_proxy(tmp_path, allowed_origins=(origin,)) as proxy:
        reply = await proxy.call_target(f"https://fal.run/{DEV}", DRAW, headers={"Origin": origin})
    exposed = reply.headers["Access-Control-Expose-Headers"].split(", ")
    assert {COST_HEADER, SAVED_HEADER} <= {*exposed}
    assert reply.headers[COST_HEADER] == "0.025"
