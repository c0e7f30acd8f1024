"""The same image by all APIs of the proxy: fal charges once."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cache_world import open_world
from tests.support.fal_client_world import ClientWorld, photo
from tests.support.js_world import Play
from tests.support.openai_client import create_openai_client

SEED = 21
EDIT = {"prompt": "make it winter", "seed": SEED}
SLOW = {"prompt": "!delay 1.2 make it winter", "seed": SEED}
# No parameters with default values: a default that is sent makes another call.


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ClientWorld]:
    async with open_world(tmp_path) as opened:
        yield opened


async def post(world: ClientWorld, path: str, body: object) -> Any:
    async with world.session.post(world.gateway + path, json=body) as response:
        document = await response.json()
        assert response.status == 200, document
        return document


async def edit_by_kontext(world: ClientWorld, edit: dict[str, Any]) -> str:
    body = {**edit, "image_data": base64.b64encode(photo()).decode()}
    return str((await post(world, "/kontext", body))["images"][0]["url"])


async def edit_by_openai(world: ClientWorld, edit: dict[str, Any]) -> str:
    file = ("photo.png", photo(), "image/png")
    async with create_openai_client(world.gateway) as client:
        response = await client.images.edit(
            model="kontext",
            image=file,
            prompt=edit["prompt"],
            response_format="url",
            extra_body={"seed": edit["seed"]},
        )
    assert response.data is not None
    return str(response.data[0].url)


async def edit_by_generate(world: ClientWorld, edit: dict[str, Any]) -> str:
    image_url = f"data:image/png;base64,{base64.b64encode(photo()).decode()}"
    body = {"model": "kontext", "inputs": {**edit, "image_url": image_url}}
    return str((await post(world, "/api/images/generate", body))["imageUrl"])


Edit = Callable[[ClientWorld, dict[str, Any]], Awaitable[str]]
EDIT_FUNCTIONS: list[Edit] = [edit_by_kontext, edit_by_openai, edit_by_generate]


@pytest.mark.parametrize("first", EDIT_FUNCTIONS)
async def test_an_image_of_one_api_is_shared_by_all(
    world: ClientWorld, play_js: Play, first: Edit
) -> None:
    urls = [await first(world, EDIT)]
    urls += [await edit(world, EDIT) for edit in EDIT_FUNCTIONS]
    # Uploaded, as a data URI and as a blob; polled, streamed, submitted and run.
    urls += [result["data"]["images"][0]["url"] for result in await play_js("editInAllWays")]
    assert len(urls) == 1 + len(EDIT_FUNCTIONS) + 12
    assert len(set(urls)) == 1
    assert world.sandbox.jobs == 1
    (paid,) = world.sandbox.paid
    assert isinstance(paid.input, dict)
    assert paid.input.keys() == {"prompt", "seed", "image_url"}


async def test_an_image_of_the_javascript_client_is_shared_by_all(
    world: ClientWorld, play_js: Play
) -> None:
    results = await play_js("editInAllWays")
    (url,) = {result["data"]["images"][0]["url"] for result in results}
    assert [await edit(world, EDIT) for edit in EDIT_FUNCTIONS] == [url] * 3
    assert world.sandbox.jobs == 1


async def test_concurrent_edits_share_a_job(world: ClientWorld, play_js: Play) -> None:
    edits = (edit(world, SLOW) for edit in EDIT_FUNCTIONS for _ in range(3))
    results, *urls = await asyncio.gather(play_js("editInAllWaysAtOnce"), *edits)
    urls += [result["data"]["images"][0]["url"] for result in results]
    assert len(urls) == 9 + 4
    assert len(set(urls)) == 1
    assert world.sandbox.jobs == 1


@pytest.mark.parametrize("edit", EDIT_FUNCTIONS)
async def test_another_seed_gives_another_image(world: ClientWorld, edit: Edit) -> None:
    assert await edit(world, EDIT) != await edit(world, EDIT | {"seed": 22})
    assert world.sandbox.jobs == 2


async def test_equal_edits_without_a_seed_share_a_job(world: ClientWorld) -> None:
    edit = {"prompt": "make it winter"}
    image_url = f"data:image/png;base64,{base64.b64encode(photo()).decode()}"
    body = {"model": "kontext", "inputs": {**edit, "image_url": image_url}}
    generated = (await post(world, "/api/images/generate", body))["imageUrl"]
    assert await edit_by_kontext(world, edit) == generated
    assert world.sandbox.jobs == 1
