"""One picture by every way that the proxy has: fal is paid once."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.cache_world import open_world
from tests.support.fal_client_world import ClientWorld, photo
from tests.support.js_world import Play

SEED = 21
EDIT = {"prompt": "make it winter", "seed": SEED}
SLOW = {"prompt": "!delay 1.2 make it winter", "seed": SEED}
# Nothing that says what the model does anyway: a default that is sent is another call to fal.


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ClientWorld]:
    async with open_world(tmp_path) as opened:
        yield opened


async def post(world: ClientWorld, path: str, body: object) -> Any:
    async with world.session.post(world.gateway + path, json=body) as response:
        document = await response.json()
        assert response.status == 200, document
        return document


async def by_kontext(world: ClientWorld, edit: dict[str, Any]) -> str:
    body = {**edit, "image_data": base64.b64encode(photo()).decode()}
    return str((await post(world, "/kontext", body))["images"][0]["url"])


async def by_openai(world: ClientWorld, edit: dict[str, Any]) -> str:
    file = ("photo.png", photo(), "image/png")
    async with openai.AsyncOpenAI(base_url=f"{world.gateway}/v1", api_key="none") as client:
        made = await client.images.edit(
            model="kontext", image=file, prompt=edit["prompt"], extra_body={"seed": edit["seed"]}
        )
    assert made.data is not None
    return str(made.data[0].url)


async def by_generate(world: ClientWorld, edit: dict[str, Any]) -> str:
    image_url = f"data:image/png;base64,{base64.b64encode(photo()).decode()}"
    body = {"model": "kontext", "inputs": {**edit, "image_url": image_url}}
    return str((await post(world, "/api/images/generate", body))["imageUrl"])


By = Callable[[ClientWorld, dict[str, Any]], Awaitable[str]]
FACADES: list[By] = [by_kontext, by_openai, by_generate]


@pytest.mark.parametrize("first", FACADES)
async def test_a_picture_that_was_made_by_one_way_is_there_by_all(
    world: ClientWorld, play_js: Play, first: By
) -> None:
    urls = [await first(world, EDIT)]
    urls += [await by(world, EDIT) for by in FACADES]
    # Uploaded, as a data URI and as a blob; polled, streamed, submitted and run.
    urls += [edit["data"]["images"][0]["url"] for edit in await play_js("editInAllWays")]
    assert len(urls) == 1 + len(FACADES) + 12
    assert len(set(urls)) == 1
    assert world.sandbox.jobs == 1
    (paid,) = world.sandbox.paid
    assert isinstance(paid.input, dict)
    assert paid.input.keys() == {"prompt", "seed", "image_url"}


async def test_a_picture_that_javascript_made_is_there_by_all(
    world: ClientWorld, play_js: Play
) -> None:
    edits = await play_js("editInAllWays")
    (url,) = {edit["data"]["images"][0]["url"] for edit in edits}
    assert [await by(world, EDIT) for by in FACADES] == [url] * 3
    assert world.sandbox.jobs == 1


async def test_all_at_once_share_the_job(world: ClientWorld, play_js: Play) -> None:
    asking = (by(world, SLOW) for by in FACADES for _ in range(3))
    edits, *urls = await asyncio.gather(play_js("editInAllWaysAtOnce"), *asking)
    urls += [edit["data"]["images"][0]["url"] for edit in edits]
    assert len(urls) == 9 + 4
    assert len(set(urls)) == 1
    assert world.sandbox.jobs == 1


@pytest.mark.parametrize("by", FACADES)
async def test_another_seed_is_another_picture(world: ClientWorld, by: By) -> None:
    assert await by(world, EDIT) != await by(world, EDIT | {"seed": 22})
    assert world.sandbox.jobs == 2


async def test_without_a_seed_equal_calls_are_one_as_well(world: ClientWorld) -> None:
    edit = {"prompt": "make it winter"}
    image_url = f"data:image/png;base64,{base64.b64encode(photo()).decode()}"
    body = {"model": "kontext", "inputs": {**edit, "image_url": image_url}}
    generated = (await post(world, "/api/images/generate", body))["imageUrl"]
    assert await by_kontext(world, edit) == generated
    assert world.sandbox.jobs == 1
