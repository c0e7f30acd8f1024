"""@fal-ai/client in Chromium through the proxy, and a person at the page of examples/js-client."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_js_node import (
    JS,
    KONTEXT,
    PLAY_TIMEOUT,
    Play,
    Scenarios,
    World,
    need,
    open_world,
    photo,
    until,
)
from tests.support.key_search import SECRET

DIST = JS.parent.parent / "examples" / "js-client" / "dist"


@dataclass(frozen=True, slots=True)
class Chromium:
    """One browser.mjs: JSON requests go in and answers come out, one a line.

    A plain process and not one of asyncio, since it outlives the event loop of a test.
    """

    process: subprocess.Popen[str]

    async def play(self, **request: object) -> Any:
        try:
            async with asyncio.timeout(PLAY_TIMEOUT):
                line = await asyncio.to_thread(self.ask, json.dumps(request))
        except BaseException:
            self.process.kill()  # or the thread would wait for an answer forever
            raise
        assert line, "Chromium is gone"
        assert SECRET not in line
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """One browser for all tests here: each gets a profile and brings servers of its own."""
    need(Path("node"), JS / "node_modules", Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")))
    command = ["node", str(JS / "browser.mjs")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        try:
            yield Chromium(process)
            process.stdin.close()  # ends browser.mjs, which closes the browser
            process.wait(timeout=PLAY_TIMEOUT)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the scenarios as a page for browsers."""
    need(Path("node"), JS / "node_modules")
    directory = tmp_path_factory.mktemp("scenarios")
    esbuild = str(JS / "node_modules" / ".bin" / "esbuild")
    outfile = f"--outfile={directory / 'page.js'}"
    command = [esbuild, str(JS / "page.js"), "--bundle", outfile, "--log-level=warning"]
    subprocess.run(command, check=True, timeout=60)
    (directory / "index.html").write_text('<!doctype html><script src="page.js"></script>')
    return directory


@pytest.fixture
async def world(bundle: Path, tmp_path: Path) -> AsyncIterator[World]:
    need(DIST)
    async with open_world(tmp_path, {"/scenarios": bundle, "/example": DIST}) as opened:
        yield opened


@pytest.fixture
def play(world: World, chromium: Chromium) -> Play:
    async def play_in_chromium(scenario: str, **options: object) -> Any:
        return await chromium.play(
            scenario=scenario, gateway=world.gateway, sandbox=world.fal, **options
        )

    return play_in_chromium


class TestInChromium(Scenarios):
    """@fal-ai/client in a page, with `proxyUrl: "/api/fal/proxy"`."""


LOOKS = pytest.mark.parametrize(
    ("width", "scheme"),
    [
        pytest.param(1440, "light", id="wide and light"),
        pytest.param(360, "dark", id="narrow and dark"),
    ],
)


@LOOKS
async def test_the_example_edits_a_picture(
    world: World, play: Play, width: int, scheme: str
) -> None:
    async with asyncio.TaskGroup() as group, world.busy():
        playing = group.create_task(play("example.editsAPicture", width=width, colorScheme=scheme))
        # Now the page has its place in the queue to show.
        await until(lambda: any(call.path.endswith("/status") for call in world.sandbox.seen))
    seen = await playing
    assert seen["headline"] == "Done"
    phases = [phase.partition(":")[0] for phase in seen["phases"]]
    assert list(dict.fromkeys(phases)) == ["uploading", "submitting", "queued", "running", "done"]
    assert "queued: In the queue, 1 ahead of you" in seen["phases"]
    assert seen["logs"]
    # The proxy, and the CDN that fal sent it to: the page never calls fal itself.
    assert set(seen["origins"]) <= {world.gateway, world.fal}
    assert seen["picture"]["alt"] == "!delay 1 make it winter"
    assert not seen["busy"]
    assert world.sandbox.jobs_by_endpoint[KONTEXT] == 1
    picture = await world.download(seen["picture"]["src"])
    assert picture != photo()


async def test_the_example_paints_from_words_by_keyboard(world: World, play: Play) -> None:
    seen = await play("example.paintsFromWords", width=360)
    assert seen["headline"] == "Done"
    assert (seen["picture"]["width"], seen["picture"]["height"]) == (1024, 768)
    assert world.sandbox.jobs == 1


async def test_the_example_cancels_at_once_and_at_fal(world: World, play: Play) -> None:
    seen = await play("example.cancels", colorScheme="dark")
    assert seen["headline"] == "Cancelled"
    assert float(seen["clock"].removesuffix(" s")) < 10  # the job itself would take twenty seconds
    assert not seen["busy"]
    assert seen["focused"] == "Generate"
    cancels = [call for call in world.sandbox.seen if call.path.endswith("/cancel")]
    assert [(call.method, call.status) for call in cancels] == [("PUT", 202)]
    assert world.sandbox.jobs == 0


@LOOKS
async def test_the_example_tells_an_error_in_words(play: Play, width: int, scheme: str) -> None:
    seen = await play("example.meetsAnError", width=width, colorScheme=scheme)
    assert seen["headline"] == "No picture this time"
    assert "fal cannot work with this input" in seen["alert"]
    assert "422" in seen["alert"]
    assert seen["besidePrompt"]
    assert seen["invalid"] == "true"


async def test_the_example_says_when_the_proxy_is_away(play: Play) -> None:
    seen = await play("example.losesTheProxy", width=360)
    assert "The proxy cannot be reached" in seen["alert"]
    assert not seen["busy"]


async def test_the_example_asks_for_the_picture_that_is_missing(world: World, play: Play) -> None:
    seen = await play("example.forgetsThePicture", width=360)
    assert seen["besidePicture"] == "Kontext changes a picture: choose one."
    assert seen["focused"] == "picture"
    assert world.sandbox.seen == []


async def test_the_example_works_by_keyboard_on_a_narrow_screen(play: Play) -> None:
    seen = await play("example.worksByKeyboard", width=360)
    assert seen["stops"] == ["model", "picture", "prompt", "generate"]
    assert seen["overflow"] == 0
