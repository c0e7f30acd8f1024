"""@fal-ai/client in Chromium through the proxy, and the page of examples/js-client."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.chromium import Chromium, chromium_player
from tests.support.js_scenarios import Scenarios
from tests.support.js_world import (
    JS,
    KONTEXT,
    Play,
    World,
    need,
    open_world,
    photo,
)
from tests.support.waiting import wait_until

DIST = JS.parent.parent / "examples" / "js-client" / "dist"


@pytest.fixture
async def world(bundle: Path, tmp_path: Path) -> AsyncIterator[World]:
    need(DIST)
    async with open_world(tmp_path, {"/scenarios": bundle, "/example": DIST}) as opened:
        yield opened


@pytest.fixture
def play(world: World, chromium: Chromium) -> Play:
    return chromium_player(world, chromium)


class TestInChromium(Scenarios):
    """@fal-ai/client in a page, with `proxyUrl: "/api/fal/proxy"`."""


SCREENS = pytest.mark.parametrize(
    ("width", "scheme"),
    [
        pytest.param(1440, "light", id="wide and light"),
        pytest.param(360, "dark", id="narrow and dark"),
    ],
)


@SCREENS
async def test_the_example_edits_an_image(
    world: World, play: Play, width: int, scheme: str
) -> None:
    async with asyncio.TaskGroup() as group, world.busy():
        playing = group.create_task(play("example.editImage", width=width, colorScheme=scheme))
        # The page shows its position in the queue now.
        await wait_until(
            lambda: any(call.path.endswith("/status") for call in world.sandbox.seen), seconds=90
        )
    shown = await playing
    assert shown["headline"] == "Done"
    phases = [phase.partition(":")[0] for phase in shown["phases"]]
    assert list(dict.fromkeys(phases)) == ["uploading", "submitting", "queued", "running", "done"]
    assert "queued: In the queue, 1 ahead of you" in shown["phases"]
    assert shown["logs"]
    # The proxy, and the CDN that fal sent it to: the page never calls fal itself.
    assert set(shown["origins"]) <= {world.gateway, world.fal}
    assert shown["image"]["alt"] == "!delay 1 make it winter"
    assert not shown["busy"]
    assert world.sandbox.jobs_by_endpoint[KONTEXT] == 1
    image = await world.download(shown["image"]["src"])
    assert image != photo()


async def test_the_example_generates_from_text_by_keyboard(world: World, play: Play) -> None:
    shown = await play("example.generateFromText", width=360)
    assert shown["headline"] == "Done"
    assert (shown["image"]["width"], shown["image"]["height"]) == (1024, 768)
    assert world.sandbox.jobs == 1


async def test_the_example_cancels_immediately_and_at_fal(world: World, play: Play) -> None:
    shown = await play("example.cancelJob", colorScheme="dark")
    assert shown["headline"] == "Cancelled"
    assert float(shown["clock"].removesuffix(" s")) < 10  # the job itself would take twenty seconds
    assert not shown["busy"]
    assert shown["focused"] == "Generate"
    cancels = [call for call in world.sandbox.seen if call.path.endswith("/cancel")]
    assert [(call.method, call.status) for call in cancels] == [("PUT", 202)]
    assert world.sandbox.jobs == 0


@SCREENS
async def test_the_example_explains_an_error(play: Play, width: int, scheme: str) -> None:
    shown = await play("example.causeAnError", width=width, colorScheme=scheme)
    assert shown["headline"] == "No image was generated"
    assert "The model does not accept this input" in shown["alert"]
    assert "422" in shown["alert"]
    assert shown["promptProblem"]
    assert shown["invalid"] == "true"


async def test_the_example_reports_an_unreachable_proxy(play: Play) -> None:
    shown = await play("example.loseTheProxy", width=360)
    assert "The proxy cannot be reached" in shown["alert"]
    assert not shown["busy"]


async def test_the_example_requires_an_image(world: World, play: Play) -> None:
    shown = await play("example.omitTheImage", width=360)
    assert shown["imageProblem"] == "Kontext edits an image: choose one."
    assert shown["focused"] == "input-image"
    assert world.sandbox.seen == []


async def test_the_example_works_by_keyboard_on_a_narrow_screen(play: Play) -> None:
    shown = await play("example.useKeyboard", width=360)
    assert shown["stops"] == [
        "falproxy", "Images", "Live video", "model", "input-image", "prompt", "generate",
    ]  # fmt: skip
    assert shown["overflow"] == 0
