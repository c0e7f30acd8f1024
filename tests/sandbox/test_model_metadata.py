"""Published model metadata of the sandbox: OpenAPI documents and prices."""

from typing import Any

import pytest
from aiohttp.pytest_plugin import AiohttpClient

from falproxy.sandbox.models import MODELS
from tests.support.offline_fal import DEV, KEY, KONTEXT, OfflineFal, offline_fal

OPENAPI = "/fal.ai/api/openapi/queue/openapi.json"
PRICING = "/api.fal.ai/v1/models/pricing"


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


async def get_schema(fal: OfflineFal, endpoint: str) -> dict[str, Any]:
    response = await fal.client.get(f"{OPENAPI}?endpoint_id={endpoint}")
    assert response.status == 200
    document: dict[str, Any] = await response.json()
    return document


def input_schema(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    [name] = [name for name in schemas if name.endswith("Input")]
    schema: dict[str, Any] = schemas[name]
    return schema


def find_refs(value: object) -> set[str]:
    """Return every `$ref` in a document."""
    if isinstance(value, dict):
        refs = {str(value["$ref"])} if "$ref" in value else set()
        return refs.union(*(find_refs(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(find_refs(item) for item in value))
    return set()


@pytest.mark.parametrize("endpoint", MODELS)
async def test_every_model_has_a_schema(fal: OfflineFal, endpoint: str) -> None:
    document = await get_schema(fal, endpoint)
    schemas = document["components"]["schemas"]
    assert document["openapi"] == "3.0.4"
    assert document["servers"] == [{"url": "https://queue.fal.run"}]
    assert document["info"]["x-fal-metadata"]["endpointId"] == endpoint
    assert set(document["paths"]) == {
        f"/{endpoint}",
        f"/{endpoint}/requests/{{request_id}}",
        f"/{endpoint}/requests/{{request_id}}/status",
        f"/{endpoint}/requests/{{request_id}}/cancel",
    }
    assert {ref.rpartition("/")[2] for ref in find_refs(document)} <= set(schemas)
    assert set(input_schema(document)["properties"]) == set(MODELS[endpoint].inputs)


async def test_an_input_has_its_bounds_and_default(fal: OfflineFal) -> None:
    schema = input_schema(await get_schema(fal, DEV))
    assert schema["required"] == ["prompt"]
    assert schema["properties"]["num_inference_steps"] == {
        "title": "Num Inference Steps",
        "type": "integer",
        "minimum": 1,
        "maximum": 50,
        "default": 28,
    }


async def test_an_input_has_its_choices(fal: OfflineFal) -> None:
    properties = input_schema(await get_schema(fal, KONTEXT))["properties"]
    assert properties["safety_tolerance"]["enum"] == ["1", "2", "3", "4", "5", "6"]
    assert "default" not in properties["aspect_ratio"]


async def test_an_image_size_is_a_preset_or_an_object(fal: OfflineFal) -> None:
    size = input_schema(await get_schema(fal, DEV))["properties"]["image_size"]
    assert size["default"] == "landscape_4_3"
    assert size["anyOf"][0] == {"$ref": "#/components/schemas/ImageSize"}
    assert "square_hd" in size["anyOf"][1]["enum"]


@pytest.mark.parametrize("query", ["", "?endpoint_id=fal-ai/none"])
async def test_an_unknown_model_has_no_schema(fal: OfflineFal, query: str) -> None:
    response = await fal.client.get(OPENAPI + query)
    assert (response.status, await response.text()) == (404, "null")


async def test_a_price_has_its_unit(fal: OfflineFal) -> None:
    response = await fal.client.get(f"{PRICING}?endpoint_id={KONTEXT}", headers=KEY)
    price = {"endpoint_id": KONTEXT, "unit_price": 0.04, "unit": "images", "currency": "USD"}
    assert await response.json() == {"prices": [price], "next_cursor": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "count"),
    [
        pytest.param(f"?endpoint_id={DEV}&endpoint_id={KONTEXT}", 2, id="repeated"),
        pytest.param(f"?endpoint_id={DEV},{KONTEXT}", 2, id="separated by commas"),
        pytest.param("", len(MODELS), id="all"),
    ],
)
async def test_prices_can_be_requested_for_several_models(
    fal: OfflineFal, query: str, count: int
) -> None:
    response = await fal.client.get(PRICING + query, headers=KEY)
    assert len((await response.json())["prices"]) == count


async def test_an_unknown_model_has_no_price(fal: OfflineFal) -> None:
    response = await fal.client.get(f"{PRICING}?endpoint_id=fal-ai/none", headers=KEY)
    assert response.status == 404
    assert (await response.json())["error"]["type"] == "not_found"
