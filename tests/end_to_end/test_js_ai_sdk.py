"""Clients that cannot send a target header, through the base URLs: the AI SDK and curl."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.ai_sdk import ACCESS_SECRET, LOCKED, open_proxy, run
from tests.support.js_world import (
    DEV,
    JS,
    KONTEXT,
    PLAY_TIMEOUT,
    World,
    need,
)
from tests.support.key_search import CANARY
from tests.support.offline_fal import png

INPUTS = {"prompt": "a heron at dawn", "seed": 7, "size": "512x512"}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A proxy that requires an access key."""
    async with open_proxy(tmp_path, access_keys=LOCKED) as opened:
        yield opened


async def generate(world: World, endpoint: str, key: str, options: object) -> Any:
    """Return the result of the AI SDK's `generateImage` with these options."""
    need(Path("node"), JS / "node_modules" / "@ai-sdk" / "fal")
    command = ["node", str(JS / "ai_sdk.mjs"), endpoint]
    output = await run(*command, given=json.dumps(options), GATEWAY=world.gateway, ACCESS_KEY=key)
    return json.loads(output.splitlines()[-1])


def decode_image(result: Any) -> Image.Image:
    assert "error" not in result, result["error"]
    return Image.open(io.BytesIO(base64.b64decode(result["image"]))).convert("RGB")


async def generated_directly(world: World) -> Image.Image:
    size = {"width": 512, "height": 512}
    return await world.made_directly(
        DEV, prompt=INPUTS["prompt"], seed=INPUTS["seed"], image_size=size, num_images=1
    )


async def test_the_ai_sdk_gets_the_image_that_fal_generates(world: World) -> None:
    result = await generate(world, DEV, ACCESS_SECRET, INPUTS)
    image = decode_image(result)
    assert world.sandbox.jobs == 1
    assert world.sandbox.keys_seen == {f"Key {CANARY}"}
    assert image.size == (512, 512)
    assert image == await generated_directly(world)
    assert result["warnings"] == []
    assert result["headers"]["x-fal-request-id"]


async def test_the_ai_sdk_needs_no_access_key_if_the_proxy_has_none(tmp_path: Path) -> None:
    async with open_proxy(tmp_path) as world:
        result = await generate(world, DEV, "another:key", INPUTS)
        assert world.sandbox.keys_seen == {f"Key {CANARY}"}
        assert decode_image(result) == await generated_directly(world)


async def test_the_ai_sdk_edits_an_inline_image(world: World) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    prompt = {"images": [image], "text": "make it winter"}
    result = await generate(world, KONTEXT, ACCESS_SECRET, {"prompt": prompt, "seed": 21})
    inputs = {"prompt": "make it winter", "image_url": f"data:image/png;base64,{image}"}
    assert world.sandbox.jobs_by_endpoint == {KONTEXT: 1}
    assert decode_image(result) == await world.made_directly(KONTEXT, **inputs, seed=21)


def inputs_of(world: World) -> Any:
    """Return the inputs of the only job."""
    (paid,) = world.sandbox.paid
    return paid.input


async def generate_by_openai(world: World, model: str, options: object) -> Any:
    """Return the result of `generateImage` with the AI SDK's provider for OpenAI."""
    need(Path("node"), JS / "node_modules" / "@ai-sdk" / "openai")
    output = await run(
        "node", str(JS / "ai_sdk_openai.mjs"), model,
        given=json.dumps(options), GATEWAY=world.gateway, ACCESS_KEY=ACCESS_SECRET,
    )  # fmt: skip
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("name", ["gpt-image-1", "chatgpt-image-latest", "flux-dev"])
async def test_the_ai_sdk_generates_an_image_as_with_openai(tmp_path: Path, name: str) -> None:
    async with open_proxy(tmp_path, access_keys=LOCKED, models=((name, DEV),)) as world:
        result = await generate_by_openai(world, name, {"prompt": "a heron", "size": "512x512"})
        assert decode_image(result).size == (512, 512)
        assert world.sandbox.jobs_by_endpoint == {DEV: 1}


@pytest.mark.parametrize("name", ["gpt-image-1", "kontext"])
async def test_the_ai_sdk_edits_an_image_as_with_openai(tmp_path: Path, name: str) -> None:
    image = base64.b64encode(png("teal")).decode()
    async with open_proxy(tmp_path, access_keys=LOCKED, models=((name, KONTEXT),)) as world:
        options = {"prompt": {"images": [image], "text": "make it winter"}}
        result = await generate_by_openai(world, name, options)
        assert decode_image(result).width > 0
        assert inputs_of(world)["image_url"] == f"data:image/png;base64,{image}"


async def test_the_ai_sdk_sends_a_mask_as_with_openai(tmp_path: Path) -> None:
    image, mask = (base64.b64encode(png(color)).decode() for color in ("teal", "white"))
    models = (("gpt-image-1", "fal-ai/flux-lora/inpainting"),)
    async with open_proxy(tmp_path, access_keys=LOCKED, models=models) as world:
        options = {"prompt": {"images": [image], "mask": mask, "text": "a heron"}}
        assert decode_image(await generate_by_openai(world, "gpt-image-1", options)).width > 0
        assert inputs_of(world)["mask_url"] == f"data:image/png;base64,{mask}"


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("another", id="an unknown key"),
        pytest.param(f"{ACCESS_SECRET}x", id="a longer key"),
        pytest.param("", id="an empty key"),
    ],
)
async def test_a_wrong_access_key_is_a_401_that_names_the_reason(world: World, key: str) -> None:
    error = (await generate(world, DEV, key, INPUTS))["error"]
    assert (error["name"], error["statusCode"]) == ("AI_APICallError", 401)
    assert "access key of this proxy" in error["message"]
    assert not error["isRetryable"]
    assert world.sandbox.seen == []


async def test_a_wrong_input_is_fals_422_that_names_its_field(world: World) -> None:
    options = {**INPUTS, "size": "99999x512"}
    error = (await generate(world, DEV, ACCESS_SECRET, options))["error"]
    assert (error["name"], error["statusCode"]) == ("AI_APICallError", 422)
    (field_error,) = error["data"]["detail"]
    assert field_error["loc"] == ["body", "image_size", "width"]
    assert error["message"].startswith("body.image_size.width: ")
    assert world.sandbox.jobs == 0


async def curl(url: str, *options: str) -> tuple[int, Any]:
    """Return the status and the document of a response."""
    need(Path("curl"))
    key = f"Authorization: Key {ACCESS_SECRET}"
    command = ["curl", "-q", "--silent", "--show-error", "--noproxy", "*", "--header", key]
    output = await run(*command, "--write-out", "\n%{http_code}", *options, url)
    document, _, status = output.rpartition("\n")
    return int(status), json.loads(document)


async def submit(world: World, prompt: str) -> Any:
    """Submit through the base URL. Return the response, after a check of its URLs."""
    url = f"{world.gateway}/api/fal/queue/{DEV}"
    body = json.dumps({"prompt": prompt, "seed": 3})
    status, submitted = await curl(url, "--json", body)
    assert status == 200
    check_queue_urls(world, submitted)
    return submitted


def check_queue_urls(world: World, document: Any) -> None:
    root = f"{world.gateway}/api/fal/queue/fal-ai/flux/requests/{document['request_id']}"
    assert document["status_url"] == f"{root}/status"
    assert document["response_url"] == root
    assert document["cancel_url"] == f"{root}/cancel"


async def poll_until(world: World, status_url: str, wanted: str) -> Any:
    """Poll the status until it is the wanted one."""
    async with asyncio.timeout(PLAY_TIMEOUT):
        while True:
            _, document = await curl(status_url)
            check_queue_urls(world, document)
            if document["status"] == wanted:
                return document
            await asyncio.sleep(0.02)


async def test_curl_gets_the_result_by_the_urls_of_a_submit(world: World) -> None:
    submitted = await submit(world, "a red kite")
    completed = await poll_until(world, submitted["status_url"], "COMPLETED")
    status, output = await curl(completed["response_url"])
    assert status == 200
    image = await world.result_image(output)
    assert image == await world.made_directly(DEV, prompt="a red kite", seed=3)
    assert world.sandbox.keys_seen == {f"Key {CANARY}"}


async def test_curl_cancels_a_running_job_by_its_url(world: World) -> None:
    submitted = await submit(world, "!delay 5 a slow sunset")
    running = await poll_until(world, submitted["status_url"], "IN_PROGRESS")
    status, document = await curl(running["cancel_url"], "--request", "PUT")
    assert (status, document) == (202, {"status": "CANCELLATION_REQUESTED"})
    completed = await poll_until(world, submitted["status_url"], "COMPLETED")
    status, _ = await curl(completed["response_url"])
    assert status == 499
    assert world.sandbox.jobs == 0
