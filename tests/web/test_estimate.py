"""`POST /api/estimate`: the price of a call, which is not made; refused like the call."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.limits import HOUR, LONG
from tests.support.sandbox_proxy import Reply, SandboxProxy, open_sandbox_proxy

DEV, VIDEO = "fal-ai/flux/dev", "fal-ai/kling-video/v2.1/standard/image-to-video"
ANN = {"x-falproxy-key": "s3cret-of-ann"}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


async def estimate(proxy: SandboxProxy, document: object, **options: Any) -> Reply:
    return await proxy.request("POST", "/api/estimate", json=document, **options)


@pytest.mark.parametrize(
    ("endpoint", "inputs", "expected"),
    [
        pytest.param(DEV, {}, (0.025, "megapixels", 1, 0.025, "registry"), id="registry"),
        pytest.param(
            DEV, {"num_images": 3, "image_size": {"width": 1920, "height": 1080}},
            (0.025, "megapixels", 6, 0.15, "registry"), id="sizes",
        ),
        pytest.param(
            "fal-ai/fast-sdxl", {"num_images": 2}, (0.005, "images", 2, 0.01, "fal"),
            id="a model of the registry without a price",
        ),
        pytest.param(VIDEO, {"duration": "5"}, (0.05, "seconds", 5, 0.25, "fal"), id="seconds"),
        pytest.param(VIDEO, {}, (0.05, "seconds", None, None, "fal"), id="unknown duration"),
    ],
)  # fmt: skip
async def test_has_price_units_and_cost(
    proxy: SandboxProxy, endpoint: str, inputs: object, expected: tuple[object, ...]
) -> None:
    reply = await estimate(proxy, {"endpoint": endpoint, "input": inputs})
    names = ("price", "unit", "units", "cost", "source")
    document = dict(zip(names, expected, strict=True))
    assert reply.document == {"endpoint": endpoint, "currency": "USD", **document}
    assert (reply.status, reply.headers["Cache-Control"]) == (200, "no-store")


async def test_is_not_a_call(proxy: SandboxProxy) -> None:
    for _ in range(3):
        assert (await estimate(proxy, {"endpoint": DEV, "input": {}})).status == 200
    assert proxy.model_requests == []
    assert await proxy.records() == []
    metrics = await proxy.session.get(f"{proxy.origin}/metrics")
    assert 'operation="submit"' not in await metrics.text()


async def test_an_endpoint_that_fal_does_not_know_is_a_404(proxy: SandboxProxy) -> None:
    reply = await estimate(proxy, {"endpoint": "fal-ai/none/such", "input": {}})
    assert reply.error == (404, "endpoint_not_found")


async def test_without_a_response_of_fal_it_is_a_503(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path, upstream_origin="http://127.0.0.1:1") as proxy:
        reply = await estimate(proxy, {"endpoint": VIDEO, "input": {}})
        assert reply.error == (503, "price_unavailable")
        assert reply.headers["Retry-After"] == "5"
        assert (await estimate(proxy, {"endpoint": DEV})).status == 200


@pytest.mark.parametrize(
    "document",
    [{}, [], {"endpoint": 1}, {"endpoint": "x"}, {"endpoint": "fal-ai/flux/dev/stream"},
     {"endpoint": DEV, "input": []}, {"endpoint": DEV, "input": None},
     {"endpoint": DEV, "inputs": {}}, {"endpoint": "https://fal.run/fal-ai/flux/dev"}],
)  # fmt: skip
async def test_bad_input_is_a_400(proxy: SandboxProxy, document: object) -> None:
    assert (await estimate(proxy, document)).error == (400, "invalid_request")


async def test_other_methods_and_types_are_refused(proxy: SandboxProxy) -> None:
    assert (await proxy.request("GET", "/api/estimate")).error == (405, "method_not_allowed")
    reply = await proxy.request("POST", "/api/estimate", data=b"{}")
    assert reply.error == (415, "unsupported_media_type")


async def test_is_authenticated_and_subject_to_the_policy(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "access_keys": (("ann", ANN["x-falproxy-key"]),),
        "allowed_endpoints": (DEV,),
    }
    async with open_sandbox_proxy(tmp_path, **settings) as proxy:
        assert (await estimate(proxy, {"endpoint": DEV})).error == (401, "unauthenticated")
        assert (await estimate(proxy, {"endpoint": DEV}, headers=ANN)).status == 200
        refused = await estimate(proxy, {"endpoint": VIDEO}, headers=ANN)
        assert refused.error == (403, "target_forbidden")
    assert proxy.sandbox.calls == 0


# --- Limits ---


async def limits_of(proxy: SandboxProxy, inputs: object, endpoint: str = DEV) -> Any:
    reply = await estimate(proxy, {"endpoint": endpoint, "input": inputs})
    assert reply.status == 200
    return reply.document["limits"]


async def test_without_limits_there_is_nothing_to_report(proxy: SandboxProxy) -> None:
    assert "limits" not in (await estimate(proxy, {"endpoint": DEV})).document


async def test_reports_what_is_left_and_counts_nothing(tmp_path: Path) -> None:
    async with open_sandbox_proxy(
        tmp_path, rate=(3, HOUR), concurrency=2, budget=(60_000, LONG), total_budget=(10**6, LONG)
    ) as proxy:
        documents = [await limits_of(proxy, {}) for _ in range(4)]
        assert all(limits == documents[0] for limits in documents)
        limits = documents[0]
        assert limits["refusal"] is None
        assert limits["limits"] == [
            {"name": "rate", "maximum": 3, "remaining": 3, "window": 3600},
            {"name": "concurrency", "maximum": 2, "remaining": 2, "window": None},
            {"name": "budget", "maximum": 0.06, "remaining": 0.06, "window": 86_400_000},
        ]
        await proxy.request("POST", f"/api/fal/run/{DEV}", json={"prompt": "a cat"})
        left = {each["name"]: each["remaining"] for each in (await limits_of(proxy, {}))["limits"]}
        assert left == {"rate": 2, "concurrency": 2, "budget": 0.035}


@pytest.mark.parametrize(
    ("settings", "endpoint", "inputs"),
    [
        pytest.param({"rate": (0, HOUR)}, DEV, {}, id="rate"),
        pytest.param({"budget": (60_000, LONG)}, DEV, {"num_images": 3}, id="budget"),
        pytest.param({"total_budget": (60_000, LONG)}, DEV, {"num_images": 3}, id="total budget"),
        pytest.param({"max_cost": 60_000}, DEV, {"num_images": 3}, id="cost of the call"),
        pytest.param({"budget": (60_000, LONG)}, VIDEO, {}, id="unknown cost"),
    ],
)
async def test_a_refusal_is_that_of_the_call(
    tmp_path: Path, settings: dict[str, Any], endpoint: str, inputs: dict[str, object]
) -> None:
    async with open_sandbox_proxy(tmp_path, **settings) as proxy:
        refusal = (await limits_of(proxy, inputs, endpoint))["refusal"]
        call = await proxy.request("POST", f"/api/fal/run/{endpoint}", json=inputs)
    expected = (call.status, call.document["type"])
    assert (refusal["status"], refusal["type"]) == expected
    assert refusal["detail"].split("renewed")[0] == call.document["detail"].split("renewed")[0]
    assert call.status in (402, 429)


async def test_limits_that_cannot_be_read_are_a_503(tmp_path: Path) -> None:
    async with open_sandbox_proxy(
        tmp_path, rate=(3, HOUR), redis_url="redis://127.0.0.1:1"
    ) as proxy:
        reply = await estimate(proxy, {"endpoint": DEV})
        assert reply.error == (503, "limits_unavailable")
