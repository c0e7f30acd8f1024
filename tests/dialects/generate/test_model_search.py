"""`/api/images/models?search=` and `/api/templates`."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from falproxy.fal.registry import read_registry
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy

MODELS = "/api/images/models"
SCHEMA = "https://fal.ai/api/openapi/queue/openapi.json?endpoint_id=fal-ai%2Fimagen4%2Fpreview"


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


async def search(proxy: SandboxProxy, query: str) -> Any:
    reply = await proxy.request("GET", f"{MODELS}?{query}")
    assert (reply.status, {*reply.document}) == (200, {"models", "nextCursor"}), reply
    return reply.document


async def test_a_search_finds_models_with_price_and_schema(proxy: SandboxProxy) -> None:
    document = await search(proxy, "search=imagen")
    (model,) = document["models"]
    assert model == {
        "name": "fal-ai/imagen4/preview",
        "endpoint": "fal-ai/imagen4/preview",
        "title": "Imagen4 Preview",
        "description": "Imagen4 Preview, drawn by the falproxy sandbox.",
        "category": "text-to-image",
        "price": 0.05,
        "unit": "images",
        "schemaUrl": SCHEMA,
        "modelUrl": "https://fal.ai/models/fal-ai/imagen4/preview",
    }
    assert document["nextCursor"] is None
    reply = await proxy.generate(model["name"], {"prompt": "!delay 0 x"})
    assert (reply.status, reply.document["cost"]) == (200, 0.05)
    reply = await proxy.call_target(model["schemaUrl"])
    assert reply.status == 200


async def test_nothing_found_is_an_empty_list(proxy: SandboxProxy) -> None:
    assert await search(proxy, "search=there-is-none") == {"models": [], "nextCursor": None}


async def test_models_are_searched_without_the_key_and_priced_by_one_request(
    proxy: SandboxProxy,
) -> None:
    assert len((await search(proxy, "search=fal-ai&limit=10"))["models"]) == 10
    assert [seen.path for seen in proxy.sandbox.seen] == ["/v1/models", "/v1/models/pricing"]
    assert "Authorization" not in proxy.sandbox.seen[0].headers


async def test_pages_lead_through_all_models(proxy: SandboxProxy) -> None:
    names: list[str] = []
    cursor = ""
    while True:
        document = await search(proxy, f"search=flux&limit=4{cursor}")
        names += [model["name"] for model in document["models"]]
        if document["nextCursor"] is None:
            break
        cursor = f"&cursor={document['nextCursor']}"
    assert len(names) == len({*names}) > 8
    assert all("flux" in name for name in names)


async def test_a_category_limits_the_search(proxy: SandboxProxy) -> None:
    models = (await search(proxy, "search=nano&category=image-to-image"))["models"]
    assert [model["name"] for model in models] == ["fal-ai/nano-banana/edit"]


async def test_only_allowed_models_are_found(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path, allowed_endpoints=("fal-ai/nano-banana",)) as proxy:
        models = (await search(proxy, "search=nano"))["models"]
        assert [model["name"] for model in models] == ["fal-ai/nano-banana"]


async def test_without_a_search_the_registry_is_listed(proxy: SandboxProxy) -> None:
    reply = await proxy.request("GET", MODELS)
    assert [model["name"] for model in reply.document["models"]] == list(read_registry().models)
    assert proxy.sandbox.seen == []


@pytest.mark.parametrize(
    "query",
    ["search=x&limit=0", "search=x&limit=51", "search=x&limit=x", "search=x&sort=price",
     f"search={'x' * 501}", "search=x&cursor=!"],
)  # fmt: skip
async def test_an_invalid_search_is_a_400(proxy: SandboxProxy, query: str) -> None:
    reply = await proxy.request("GET", f"{MODELS}?{query}")
    assert reply.error == (400, "invalid_request")


@pytest.mark.parametrize(
    ("status", "body"),
    [(503, b""), (429, b"{}"), (200, b"<html>"), (200, b"[]"), (404, b"null")],
)
async def test_a_fal_that_cannot_be_asked_is_a_503(
    tmp_path: Path, fal: FakeFal, status: int, body: bytes
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body)

    fal.respond = respond
    async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
        reply = await proxy.request("GET", f"{MODELS}?search=flux")
        assert reply.error == (503, "models_unavailable")
        assert reply.headers["Retry-After"] == "5"


async def test_entries_of_another_shape_are_left_out(tmp_path: Path, fal: FakeFal) -> None:
    entries: list[object] = [
        5, {}, {"endpoint_id": 5}, {"endpoint_id": "not an id"}, {"endpoint_id": "a/b/requests/c"},
        {"endpoint_id": "a/b", "metadata": {"display_name": 5, "category": "x"}},
    ]  # fmt: skip

    async def respond(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/pricing"):
            return web.Response(status=500)
        return web.json_response({"models": entries, "next_cursor": "n", "has_more": True})

    fal.respond = respond
    async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
        document = await search(proxy, "search=x")
        (model,) = document["models"]
        assert (model["name"], model["title"], model["category"]) == ("a/b", "a/b", "x")
        assert (model["price"], model["unit"], document["nextCursor"]) == (None, None, "n")
        assert CANARY not in str(fal.seen[0].headers)


async def test_templates_are_listed_with_their_variables(proxy: SandboxProxy) -> None:
    reply = await proxy.request("GET", "/api/templates")
    assert (reply.status, {*reply.document}) == (200, {"templates"})
    templates = {each["name"]: each for each in reply.document["templates"]}
    assert list(templates) == ["billboard", "discount-banner", "product-shot"]
    models = await proxy.request("GET", MODELS)
    assert reply.document["templates"] == models.document["templates"]
    for name, template in templates.items():
        assert {"headline", "background_style", "avatar_lora"} <= {
            variable["name"] for variable in template["variables"]
        }, name


async def test_templates_of_models_that_are_not_allowed_are_left_out(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path, allowed_endpoints=("fal-ai/nano-banana",)) as proxy:
        reply = await proxy.request("GET", "/api/templates")
        assert reply.document == {"templates": []}
