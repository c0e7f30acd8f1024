"""Clients that cannot name a target in a header, through the mounts: the AI SDK and curl."""

import asyncio
import base64
import io
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer
from PIL import Image

from falproxy import Settings, create_app
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.end_to_end.test_js_node import (
    DEV,
    JS,
    KONTEXT,
    PLAY_TIMEOUT,
    World,
    check_credentials,
    need,
    origin_of,
)
from tests.support.key_search import CANARY, SECRET

ACCESS_SECRET = "s3cret"
LOCKED = (("web", ACCESS_SECRET),)
INPUTS = {"prompt": "a heron at dawn", "seed": 7, "size": "512x512"}


@asynccontextmanager
async def open_proxy(data_dir: Path, **given: Any) -> AsyncIterator[World]:
    """The sandbox behind the proxy with these settings.

    Leaving it checks what every test owes: fal was called with the proxy's key, and no other.
    """
    sandbox = Sandbox(speed=50)
    async with TestServer(create_sandbox(sandbox)) as fal, ClientSession() as session:
        sandbox.public_url = origin_of(fal)
        settings = Settings(
            fal_key=CANARY, upstream_origin=origin_of(fal), data_dir=data_dir, **given
        )
        async with TestServer(create_app(settings)) as gateway:
            yield World(origin_of(gateway), origin_of(fal), sandbox, session)
    for call in sandbox.seen:
        check_credentials(call)
        assert ACCESS_SECRET not in str(call.headers), f"{call.method} {call.path}"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A proxy that wants an access key."""
    async with open_proxy(tmp_path, access_keys=LOCKED) as opened:
        yield opened


async def run(*command: str, given: str = "", **environment: str) -> str:
    """What a command prints for its input. It must end well, and never show fal's key."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PLAY_TIMEOUT):
            output, errors = await process.communicate(given.encode())
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, errors.decode()
    assert SECRET not in output.decode() + errors.decode()
    return output.decode()


async def generate(world: World, endpoint: str, key: str, options: object) -> Any:
    """What the AI SDK makes of the options of `generateImage`."""
    need(Path("node"), JS / "node_modules" / "@ai-sdk" / "fal")
    command = ["node", str(JS / "ai_sdk.mjs"), endpoint]
    given = json.dumps(options)
    output = await run(*command, given=given, GATEWAY=world.gateway, ACCESS_KEY=key)
    return json.loads(output.splitlines()[-1])


def decode(answer: Any) -> Image.Image:
    assert "error" not in answer, answer["error"]
    return Image.open(io.BytesIO(base64.b64decode(answer["picture"]))).convert("RGB")


async def made_directly(world: World) -> Image.Image:
    size = {"width": 512, "height": 512}
    return await world.made_directly(
        DEV, prompt=INPUTS["prompt"], seed=INPUTS["seed"], image_size=size, num_images=1
    )


async def test_the_ai_sdk_gets_the_picture_that_fal_makes(world: World) -> None:
    answer = await generate(world, DEV, ACCESS_SECRET, INPUTS)
    picture = decode(answer)
    assert world.sandbox.jobs == 1
    assert world.sandbox.keys_seen == {f"Key {CANARY}"}
    assert picture.size == (512, 512)
    assert picture == await made_directly(world)
    assert answer["warnings"] == []
    assert answer["headers"]["x-fal-request-id"]


async def test_the_ai_sdk_needs_no_key_of_a_proxy_that_is_open(tmp_path: Path) -> None:
    async with open_proxy(tmp_path) as world:
        answer = await generate(world, DEV, "somebody's:own", INPUTS)
        assert world.sandbox.keys_seen == {f"Key {CANARY}"}
        assert decode(answer) == await made_directly(world)


async def test_the_ai_sdk_edits_a_picture_that_it_sends_along(world: World) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    prompt = {"images": [picture], "text": "make it winter"}
    answer = await generate(world, KONTEXT, ACCESS_SECRET, {"prompt": prompt, "seed": 21})
    inputs = {"prompt": "make it winter", "image_url": f"data:image/png;base64,{picture}"}
    assert world.sandbox.jobs_by_endpoint == {KONTEXT: 1}
    assert decode(answer) == await world.made_directly(KONTEXT, **inputs, seed=21)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("another", id="a key of nobody"),
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
    """Status and document of an answer."""
    need(Path("curl"))
    key = f"Authorization: Key {ACCESS_SECRET}"
    command = ["curl", "-q", "--silent", "--show-error", "--noproxy", "*", "--header", key]
    output = await run(*command, "--write-out", "\n%{http_code}", *options, url)
    document, _, status = output.rpartition("\n")
    return int(status), json.loads(document)


async def submit(world: World, prompt: str) -> Any:
    """fal's answer to a submit through the mount, whose addresses are all below the mount."""
    url = f"{world.gateway}/api/fal/queue/{DEV}"
    body = json.dumps({"prompt": prompt, "seed": 3})
    status, submitted = await curl(url, "--json", body)
    assert status == 200
    check_addresses(world, submitted)
    return submitted


def check_addresses(world: World, document: Any) -> None:
    root = f"{world.gateway}/api/fal/queue/fal-ai/flux/requests/{document['request_id']}"
    assert document["status_url"] == f"{root}/status"
    assert document["response_url"] == root
    assert document["cancel_url"] == f"{root}/cancel"


async def follow(world: World, status_url: str, wanted: str) -> Any:
    """The first status that is the wanted one."""
    async with asyncio.timeout(PLAY_TIMEOUT):
        while True:
            _, document = await curl(status_url)
            check_addresses(world, document)
            if document["status"] == wanted:
                return document
            await asyncio.sleep(0.02)


async def test_curl_follows_the_addresses_of_a_submit_to_its_result(world: World) -> None:
    submitted = await submit(world, "a red kite")
    completed = await follow(world, submitted["status_url"], "COMPLETED")
    status, output = await curl(completed["response_url"])
    assert status == 200
    picture = await world.picture(output)
    assert picture == await world.made_directly(DEV, prompt="a red kite", seed=3)
    assert world.sandbox.keys_seen == {f"Key {CANARY}"}


async def test_curl_cancels_a_running_job_at_its_address(world: World) -> None:
    submitted = await submit(world, "!delay 5 a slow sunset")
    running = await follow(world, submitted["status_url"], "IN_PROGRESS")
    status, document = await curl(running["cancel_url"], "--request", "PUT")
    assert (status, document) == (202, {"status": "CANCELLATION_REQUESTED"})
    completed = await follow(world, submitted["status_url"], "COMPLETED")
    status, _ = await curl(completed["response_url"])
    assert status == 499
    assert world.sandbox.jobs == 0
