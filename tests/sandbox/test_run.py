"""The sandbox's fal.run: results, input errors, streams, disconnecting clients."""

import base64
import io
import json
import uuid
from decimal import Decimal
from typing import Any

import pytest
from aiohttp import ClientTimeout
from aiohttp.pytest_plugin import AiohttpClient
from PIL import Image

from falproxy.sandbox.models import MODELS, InputType
from tests.support.offline_fal import (
    DEV,
    KEY,
    KONTEXT,
    SMALL,
    OfflineFal,
    offline_fal,
    png,
    result_image,
)
from tests.support.waiting import wait_until

URL = "https://example.com/cat.png"
NANO_EDIT = "fal-ai/nano-banana/edit"
SCHNELL = "fal-ai/flux/schnell"


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


def smallest_input(endpoint: str) -> dict[str, Any]:
    """Return the required inputs, and a small image size if the model has that input."""
    samples = {InputType.STRING: "a cat", InputType.IMAGE: URL, InputType.IMAGES: [URL, f"{URL}?2"]}
    inputs = MODELS[endpoint].inputs
    body = {name: samples[spec.type] for name, spec in inputs.items() if spec.is_required}
    return {**body, **({"image_size": SMALL} if "image_size" in inputs else {})}


@pytest.mark.parametrize(
    "endpoint", [endpoint for endpoint, model in MODELS.items() if model.kind == "image"]
)
async def test_every_image_model_returns_a_real_image(fal: OfflineFal, endpoint: str) -> None:
    response = await fal.run(endpoint, smallest_input(endpoint))
    image = await result_image(fal, response)
    document = await response.json()
    entry = document["images"][0] if "images" in document else document["image"]
    assert image.size == (entry["width"], entry["height"])
    assert image.format is not None
    assert entry["content_type"] == f"image/{image.format.lower()}"
    assert entry["url"].startswith(f"{fal.sandbox.public_url}/files/b/")


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        pytest.param(
            KONTEXT, {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}, id="flux"
        ),
        pytest.param("fal-ai/face-swap", {"image"}, id="a single image"),
        pytest.param("fal-ai/nano-banana", {"images", "description"}, id="no seed"),
    ],
)
async def test_the_output_has_the_fields_of_the_model(
    fal: OfflineFal, endpoint: str, fields: set[str]
) -> None:
    document = await (await fal.run(endpoint, smallest_input(endpoint))).json()
    assert set(document) == fields


async def test_a_result_has_the_headers_of_fal(fal: OfflineFal) -> None:
    response = await fal.run(DEV, {"prompt": "x", "image_size": SMALL, "num_images": 3})
    assert uuid.UUID(response.headers["x-fal-request-id"]).version == 4
    assert response.headers["X-Fal-Billable-Units"] == "3"
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize(
    ("endpoint", "inputs", "cost"),
    [
        pytest.param(KONTEXT, {"num_images": 2}, "0.08", id="per image"),
        pytest.param(f"{KONTEXT}/max", {}, "0.08", id="max"),
        pytest.param(DEV, {"image_size": "square_hd"}, "0.025", id="exactly one megapixel"),
        pytest.param(DEV, {"image_size": {"width": 1032, "height": 1024}}, "0.05", id="rounded up"),
    ],
)
async def test_a_job_is_billed_at_its_price(
    fal: OfflineFal, endpoint: str, inputs: dict[str, object], cost: str
) -> None:
    await fal.run(endpoint, {**smallest_input(endpoint), **inputs})
    assert fal.sandbox.cost == Decimal(cost)


async def test_a_billed_job_is_recorded_with_its_input(fal: OfflineFal) -> None:
    body = {"prompt": "x", "image_size": SMALL, "unknown": 1}
    response = await fal.run(DEV, body)
    assert fal.sandbox.paid == [(DEV, body, response.headers["x-fal-request-id"])]


ONE_TO_SIX = {"expected": "'1', '2', '3', '4', '5' or '6'"}
BAD_INPUTS = [
    pytest.param(KONTEXT, {"prompt": "x"}, "image_url", "missing", None, id="missing image"),
    pytest.param(DEV, {"prompt": 3}, "prompt", "string_type", None, id="not a string"),
    pytest.param(DEV, {"prompt": None}, "prompt", "string_type", None, id="null"),
    pytest.param(DEV, {"num_images": 5}, "num_images", "less_than_equal", {"le": 4}, id="too many"),
    pytest.param(
        DEV, {"num_images": 0}, "num_images", "greater_than_equal", {"ge": 1}, id="too few"
    ),
    pytest.param(DEV, {"num_images": 1.5}, "num_images", "int_parsing", None, id="half an image"),
    pytest.param(
        DEV, {"num_images": [1]}, "num_images", "int_parsing", None, id="a list for a number"
    ),
    pytest.param(
        DEV, {"guidance_scale": "x"}, "guidance_scale", "float_parsing", None, id="not a number"
    ),
    pytest.param(
        DEV, {"sync_mode": "perhaps"}, "sync_mode", "bool_parsing", None, id="not a boolean"
    ),
    pytest.param(
        DEV,
        {"output_format": "gif"},
        "output_format",
        "literal_error",
        {"expected": "'jpeg' or 'png'"},
        id="not a choice",
    ),
    pytest.param(
        KONTEXT,
        {"safety_tolerance": 2},
        "safety_tolerance",
        "literal_error",
        ONE_TO_SIX,
        id="choices are strings",
    ),
    pytest.param(
        DEV, {"image_size": "huge"}, "image_size", "literal_error", None, id="not a preset"
    ),
    pytest.param(
        DEV,
        {"image_size": {"width": 0}},
        "width",
        "greater_than_equal",
        {"ge": 1},
        id="width of zero",
    ),
    pytest.param(NANO_EDIT, {"image_urls": "x"}, "image_urls", "list_type", None, id="not a list"),
    pytest.param(
        NANO_EDIT,
        {"image_urls": []},
        "image_urls",
        "sequence_too_short",
        {"min_length": 1},
        id="empty list",
    ),
    pytest.param(
        NANO_EDIT, {"image_urls": [1]}, 0, "string_type", None, id="not a URL in the list"
    ),
    pytest.param("fal-ai/flux-lora", {"loras": "x"}, "loras", "list_type", None, id="loras"),
    pytest.param("fal-ai/flux-lora", {"loras": ["x"]}, 0, "dict_type", None, id="lora"),
    pytest.param(
        "fal-ai/flux-lora", {"loras": [{}]}, "path", "missing", None, id="lora without path"
    ),
    pytest.param(
        "fal-ai/flux-lora",
        {"loras": [{"path": "x", "scale": 9}]},
        "scale",
        "less_than_equal",
        {"le": 4},
        id="lora scale",
    ),
    pytest.param(
        "fal-ai/fast-lightning-sdxl",
        {"num_inference_steps": 4},
        "num_inference_steps",
        "literal_error",
        None,
        id="steps are strings",
    ),
]


@pytest.mark.parametrize(("endpoint", "body", "field", "error_type", "ctx"), BAD_INPUTS)
async def test_an_invalid_input_has_fal_s_error(
    fal: OfflineFal,
    endpoint: str,
    body: dict[str, object],
    field: str,
    error_type: str,
    ctx: dict[str, object] | None,
) -> None:
    has_no_image = error_type == "missing" and field == "image_url"
    response = await fal.run(endpoint, body if has_no_image else smallest_input(endpoint) | body)
    [entry] = (await response.json())["detail"]
    assert response.status == 422
    assert response.headers["X-Fal-Billable-Units"] == "0"
    assert (entry["loc"][0], entry["loc"][-1], entry["type"]) == ("body", field, error_type)
    assert entry["url"].endswith(error_type)
    assert "input" in entry
    assert ctx is None or entry["ctx"] == ctx
    assert fal.sandbox.jobs == 0


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        pytest.param(b"", "missing", id="empty"),
        pytest.param(b"{", "json_invalid", id="cut off"),
        pytest.param(b'{"prompt": NaN}', "json_invalid", id="NaN is no JSON"),
        pytest.param(b"\xff", "json_invalid", id="not a string"),
        pytest.param(b"[" * 100_000, "json_invalid", id="too deep"),
        pytest.param(b"[]", "model_attributes_type", id="a list"),
    ],
)
async def test_a_body_that_is_no_object_is_refused(fal: OfflineFal, body: bytes, kind: str) -> None:
    response = await fal.client.post(f"/fal.run/{DEV}", data=body, headers=KEY)
    assert response.status == 422
    assert (await response.json())["detail"][0]["type"] == kind


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"num_images": "1"}, id="number as text"),
        pytest.param({"num_images": 1.0}, id="whole float"),
        pytest.param({"guidance_scale": 3}, id="integer for a float"),
        pytest.param({"sync_mode": "false"}, id="boolean as text"),
        pytest.param({"seed": None}, id="null where null is the default"),
        pytest.param({"strength": 1}, id="unknown keys are ignored"),
    ],
)
async def test_what_pydantic_takes_is_taken(fal: OfflineFal, extra: dict[str, object]) -> None:
    response = await fal.run(DEV, {"prompt": "x", "image_size": SMALL, **extra})
    assert response.status == 200


async def test_sync_mode_gives_a_data_uri(fal: OfflineFal) -> None:
    body = {"prompt": "x", "image_size": SMALL, "sync_mode": True, "output_format": "png"}
    document = await (await fal.run(DEV, body)).json()
    head, _, content = document["images"][0]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (64, 64)


async def test_a_random_seed_is_returned(fal: OfflineFal) -> None:
    body = {"prompt": "x", "image_size": SMALL}
    seeds = {(await (await fal.run(DEV, body)).json())["seed"] for _ in range(3)}
    assert len(seeds) == 3


async def test_the_returned_seed_reproduces_the_image(fal: OfflineFal) -> None:
    body: dict[str, object] = {"prompt": "x", "image_size": SMALL, "output_format": "png"}
    first = await fal.run(DEV, body)
    body["seed"] = (await first.json())["seed"]
    again = await fal.run(DEV, body)
    assert (await result_image(fal, first)).tobytes() == (await result_image(fal, again)).tobytes()


async def test_a_call_is_not_billed_if_its_client_disconnects(fal: OfflineFal) -> None:
    with pytest.raises(TimeoutError):
        await fal.client.post(
            f"/fal.run/{DEV}",
            json={"prompt": "!delay 30"},
            headers=KEY,
            timeout=ClientTimeout(total=0.05),
        )
    await wait_until(lambda: fal.sandbox.seen, seconds=2)
    assert fal.sandbox.seen[-1].status == 499
    assert fal.sandbox.jobs == 0


async def test_a_call_that_cannot_start_in_time_is_a_504(aiohttp_client: AiohttpClient) -> None:
    fal = await offline_fal(aiohttp_client, speed=1)
    response = await fal.run(DEV, {"prompt": "x"}, **{"X-Fal-Request-Timeout": "0.01"})
    assert response.status == 504
    assert response.headers["X-Fal-Request-Timeout-Type"] == "user"
    assert (await response.json())["error_type"] == "request_timeout"


@pytest.mark.parametrize("value", ["30", "30.0", "soon"])
async def test_a_call_that_starts_in_time_succeeds(fal: OfflineFal, value: str) -> None:
    body = {"prompt": "x", "image_size": SMALL}
    assert (await fal.run(DEV, body, **{"X-Fal-Request-Timeout": value})).status == 200


async def read_events(fal: OfflineFal, endpoint: str, body: object) -> list[dict[str, Any]]:
    response = await fal.client.post(f"/fal.run/{endpoint}/stream", json=body, headers=KEY)
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    text = await response.text()
    return [json.loads(line.removeprefix("data: ")) for line in text.strip().split("\n\n")]


@pytest.mark.parametrize("endpoint", [SCHNELL, "fal-ai/flux-lora"])
async def test_a_stream_ends_with_the_result(fal: OfflineFal, endpoint: str) -> None:
    *partial, last = await read_events(fal, endpoint, {"prompt": "x", "image_size": SMALL})
    assert len(partial) == 3
    assert all(part["images"][0]["url"].startswith("data:image/jpeg") for part in partial)
    assert len({part["images"][0]["url"] for part in partial}) == 3
    assert last["images"][0]["url"].startswith(fal.sandbox.public_url)
    assert fal.sandbox.jobs == 1


async def test_an_input_error_of_a_stream_is_a_plain_response(fal: OfflineFal) -> None:
    response = await fal.run(f"{SCHNELL}/stream", {"prompt": "x", "num_images": 9})
    assert response.status == 422
    assert response.headers["Content-Type"] == "application/json"


async def test_partial_results_are_sent_immediately(aiohttp_client: AiohttpClient) -> None:
    fal = await offline_fal(aiohttp_client)
    body = {"prompt": "!delay 0.8", "image_size": SMALL}
    url = f"/fal.run/{SCHNELL}/stream"
    async with fal.client.post(url, json=body, headers=KEY) as response:
        await response.content.readuntil(b"\n\n")
        assert fal.sandbox.jobs == 0


async def test_a_stream_is_not_billed_if_its_client_disconnects(fal: OfflineFal) -> None:
    body = {"prompt": "!delay 1", "image_size": SMALL}
    url = f"/fal.run/{SCHNELL}/stream"
    async with fal.client.post(url, json=body, headers=KEY) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await wait_until(lambda: fal.sandbox.seen, seconds=2)
    assert fal.sandbox.seen[-1].status == 499
    assert fal.sandbox.jobs == 0


async def test_an_edit_keeps_the_size_of_its_input(fal: OfflineFal) -> None:
    image = f"data:image/png;base64,{base64.b64encode(png(size=(900, 300))).decode()}"
    response = await fal.run(KONTEXT, {"prompt": "x", "image_url": image})
    assert (await result_image(fal, response)).size == (900, 300)
