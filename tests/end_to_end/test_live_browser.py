"""Live video in Chromium: RTCPeerConnection through the proxy, with the sandbox's runner."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from falproxy.sandbox.live_media import Color, background
from tests.support.chromium import Chromium, chromium_player
from tests.support.fake_live import DIRECTOR
from tests.support.js_world import JS, Play, World, need, open_world
from tests.support.waiting import wait_until

pytest.importorskip("aiortc", reason="not installed: falproxy[live]")

DIST = JS.parent.parent / "examples" / "js-client" / "dist"
WORLD = "fal-ai/lingbot-world-2"
TOLERANCE = 24  # of a color channel: the video is compressed


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    need(DIST)
    async with open_world(tmp_path, {"/example": DIST}) as opened:
        yield opened


@pytest.fixture
def play(world: World, chromium: Chromium) -> Play:
    return chromium_player(world, chromium)


def is_like(color: list[int], expected: Color) -> bool:
    pairs = zip(color, expected, strict=True)
    return all(abs(one - other) <= TOLERANCE for one, other in pairs)


@pytest.mark.parametrize("endpoint", [DIRECTOR, WORLD])
async def test_the_frames_of_the_runner_arrive(world: World, play: Play, endpoint: str) -> None:
    shown = await play("live.watch", endpoint=endpoint, frames=8)
    assert (shown["width"], shown["height"]) == (320, 240)
    for color in shown["colors"]:
        assert is_like(color, background(endpoint)), (color, background(endpoint))
    edges = shown["edges"]
    assert all(0 <= edge <= 260 for edge in edges), edges
    assert len({*edges}) > 4, edges
    live = [call.path for call in world.sandbox.seen if call.host == "wma.fal.run"]
    assert live[:2] == ["/ice", "/session"]
    assert live.count("/session") == 1
    # The page closes, and the session ends without heartbeats.
    world.sandbox.live.timeout = 0.1
    await wait_until(lambda: not world.sandbox.live.open, seconds=90)
    assert world.sandbox.jobs_by_endpoint == {endpoint: 1}
    fallback = [call.path for call in world.sandbox.seen if call.host == "fal.run"]
    assert fallback == ([f"/{WORLD}/ice"] if endpoint == WORLD else [])


async def test_a_prompt_changes_the_video(play: Play) -> None:
    shown = await play("live.sendPrompt", endpoint=DIRECTOR, prompt="a storm")
    assert is_like(shown["before"], background(DIRECTOR))
    assert is_like(shown["after"], background(DIRECTOR, "a storm"))
    assert shown["end"] == {"phase": "idle", "headline": "Stopped", "button": "Start"}


async def test_the_page_reports_the_end_of_a_session(world: World, play: Play) -> None:
    async with asyncio.TaskGroup() as group:
        playing = group.create_task(play("live.waitForEnd", endpoint=DIRECTOR))
        await wait_until(lambda: bool(world.sandbox.live.open), seconds=90)
        await world.sandbox.live.close()
    ended = {"phase": "ended", "headline": "The session has ended.", "button": "Start"}
    assert playing.result() == ended
    assert world.sandbox.jobs_by_endpoint == {DIRECTOR: 1}
