"""@fal-ai/client in Node through the proxy: the scenarios of tests/js.

`Scenarios` is the contract; test_js_browser.py runs it in Chromium as well.
"""

import asyncio
import io
import json
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import BaseTestServer, TestServer
from PIL import Image

import falproxy
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.sandbox.state import RUNNERS, SeenRequest
from tests.support.key_search import CANARY, SECRET
from tests.support.settings import make_settings

JS = Path(__file__).parent.parent / "js"
DEV = "fal-ai/flux/dev"
KONTEXT = "fal-ai/flux-pro/kontext"
PLAY_TIMEOUT = 90.0  # seconds for one scenario, on a slow machine
MIB = 2**20

# Plays a scenario by its name and returns its result.
Play = Callable[..., Coroutine[Any, Any, Any]]


def need(*paths: Path) -> None:
    """Skip the test if a program or directory is missing. In CI the test fails instead."""
    missing = ", ".join(str(path) for path in paths if not shutil.which(path) and not path.is_dir())
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"not installed: {missing}")
    if missing:
        pytest.skip(f"not installed: {missing}")


@cache
def photo() -> bytes:
    """Return a PNG of noise with a little over 5 MB."""
    side = 1330
    noise = random.Random(1).randbytes(side * side * 3)
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), noise).save(file, "PNG", compress_level=1)
    return file.getvalue()


@cache
def large() -> bytes:
    """Return 95 MiB of noise. The client uploads such a file in parts."""
    return random.Random(2).randbytes(95 * MIB)


@dataclass(frozen=True, slots=True)
class World:
    """The proxy with the sandbox behind it. gateway, fal: their origins."""

    gateway: str
    fal: str
    sandbox: Sandbox
    session: ClientSession

    async def download(self, url: str) -> bytes:
        async with self.session.get(url) as response:
            assert response.status == 200, f"{url} is a {response.status}"
            return await response.read()

    async def result_image(self, result: Any) -> Image.Image:
        """Download and decode the only image of a model's result."""
        (entry,) = result["images"]
        image = Image.open(io.BytesIO(await self.download(entry["url"])))
        assert image.size == (entry["width"], entry["height"])
        return image.convert("RGB")

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Keep each of fal's runners busy, with one more job in the queue."""
        queue = f"{self.fal}/queue.fal.run/fal-ai/flux"
        headers = {"Authorization": f"Key {CANARY}"}
        body = {"prompt": f"!delay {PLAY_TIMEOUT} an image of another user"}
        jobs = []
        for _ in range(RUNNERS + 1):
            async with self.session.post(f"{queue}/dev", json=body, headers=headers) as response:
                jobs.append((await response.json())["request_id"])
        yield
        for job in jobs:
            await self.session.put(f"{queue}/requests/{job}/cancel", headers=headers)

    async def made_directly(self, endpoint: str, **inputs: object) -> Image.Image:
        """Return the image that fal generates from these inputs without the proxy."""
        url = f"{self.fal}/fal.run/{endpoint}"
        headers = {"Authorization": f"Key {CANARY}"}
        async with self.session.post(url, json=inputs, headers=headers) as response:
            assert response.status == 200
            return await self.result_image(await response.json())


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` is true. Raises TimeoutError after PLAY_TIMEOUT."""
    async with asyncio.timeout(PLAY_TIMEOUT):
        while not condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def open_world(data_dir: Path, pages: dict[str, Path]) -> AsyncIterator[World]:
    """Start a proxy with a new sandbox. pages: directories that the gateway also serves, by path.

    At exit all calls to fal are checked: they have the proxy's key and no other.
    """
    sandbox = Sandbox(speed=50)
    async with (
        TestServer(create_sandbox(sandbox)) as fal,
        TestServer(gateway_app(origin_of(fal), pages, data_dir)) as gateway,
        ClientSession() as session,
    ):
        sandbox.public_url = origin_of(fal)
        yield World(origin_of(gateway), origin_of(fal), sandbox, session)
    for call in sandbox.seen:
        check_credentials(call)


def origin_of(server: BaseTestServer) -> str:
    return f"http://127.0.0.1:{server.port}"


def check_credentials(call: SeenRequest) -> None:
    """Assert that a call to fal has the proxy's key and no other; files and sockets have none."""
    keys = call.headers.getall("Authorization", [])
    is_direct = call.host.startswith("127.0.0.1") or "fal_jwt_token=" in call.query
    assert keys == ([] if is_direct else [f"Key {CANARY}"]), f"{call.method} {call.path}"
    assert "client-secret" not in str(call.headers), f"{call.method} {call.path}"
    assert "x-fal-target-url" not in call.headers


def gateway_app(fal: str, pages: dict[str, Path], data_dir: Path) -> web.Application:
    """Return an application with the proxy, fixtures at /fixtures, and these static pages."""
    app = web.Application(handler_args={"handler_cancellation": True})
    settings = make_settings(fal_key=CANARY, upstream_origin=fal, data_dir=data_dir)
    falproxy.setup(app, settings)
    fixtures = {"photo.png": (photo, "image/png"), "large.bin": (large, "application/x-noise")}

    async def fixture(request: web.Request) -> web.Response:
        content, content_type = fixtures[request.match_info["name"]]
        return web.Response(body=content(), content_type=content_type)

    app.router.add_get("/fixtures/{name}", fixture)
    for path, directory in pages.items():
        app.router.add_static(path, directory)
    return app


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path, {}) as opened:
        yield opened


@pytest.fixture
def play(world: World) -> Play:
    need(Path("node"), JS / "node_modules")

    async def play_in_node(scenario: str) -> Any:
        process = await asyncio.create_subprocess_exec(
            "node",
            str(JS / "run.mjs"),
            scenario,
            env={**os.environ, "GATEWAY": world.gateway, "SANDBOX": world.fal},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(PLAY_TIMEOUT):
                output, errors = await process.communicate()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        assert process.returncode == 0, errors.decode()
        assert SECRET not in output.decode() + errors.decode()
        return json.loads(output.splitlines()[-1])

    return play_in_node


class Scenarios:
    """The contract of @fal-ai/client in every environment."""

    async def test_a_run_returns_the_image_that_fal_generates(
        self, world: World, play: Play
    ) -> None:
        result = await play("run")
        assert world.sandbox.jobs == 1
        assert world.sandbox.keys_seen == {f"Key {CANARY}"}
        assert result["requestId"]
        image = await world.result_image(result["data"])
        assert image.size == (512, 512)
        inputs = {"prompt": "a heron at dawn", "seed": 7, "image_size": "square"}
        assert image == await world.made_directly(DEV, **inputs)
        assert image != await world.made_directly(DEV, **{**inputs, "seed": 8})

    @pytest.mark.parametrize("scenario", ["subscribeByPolling", "subscribeByStreaming"])
    async def test_a_subscription_receives_queue_status_logs_and_result(
        self, world: World, play: Play, scenario: str
    ) -> None:
        result = await play(scenario)
        assert world.sandbox.jobs == 1
        assert result["enqueued"]
        updates = result["updates"]
        statuses = list(dict.fromkeys(update["status"] for update in updates))
        assert statuses[-2:] == ["IN_PROGRESS", "COMPLETED"]
        assert statuses[:-2] in ([], ["IN_QUEUE"])  # a runner may be free before the first poll
        assert updates[-1]["logs"]
        image = await world.result_image(result["data"])
        assert image == await world.made_directly(
            DEV, prompt="!delay 0.4 a paper boat on a river", seed=11
        )

    async def test_submit_status_and_result_are_three_calls_for_one_job(
        self, world: World, play: Play
    ) -> None:
        result = await play("submitStatusResult")
        assert world.sandbox.jobs == 1
        request_id = result["submitted"]["request_id"]
        # The header route returns fal's own URLs: the client uses none of them.
        assert result["submitted"]["status_url"].startswith("https://queue.fal.run/")
        assert result["last"]["request_id"] == request_id
        assert result["result"]["requestId"] == request_id
        assert result["result"]["data"]["seed"] == 3

    @pytest.mark.timed
    async def test_a_running_job_can_be_cancelled(self, world: World, play: Play) -> None:
        result = await play("cancelRunning")
        assert result["milliseconds"] < 2000  # the job itself would take five seconds
        assert result["error"]["name"] == "ApiError"
        assert result["error"]["status"] == 499
        assert world.sandbox.jobs == 0

    async def test_a_cancel_after_completion_is_a_400(self, play: Play) -> None:
        error = await play("cancelTooLate")
        assert (error["status"], error["body"]) == (400, {"status": "ALREADY_COMPLETED"})

    async def test_events_of_a_stream_arrive_while_it_runs(self, world: World, play: Play) -> None:
        result = await play("stream")
        arrivals = result["arrivals"]
        assert len(arrivals) > 2
        # If a buffer held them back, they would all arrive at the end.
        assert arrivals[0] < arrivals[-1] / 2
        assert (await world.result_image(result["data"])).size == (1024, 768)
        assert world.sandbox.jobs == 1

    async def test_an_error_response_to_a_stream_is_raised(self, play: Play) -> None:
        error = await play("streamedError")
        assert (error["name"], error["status"]) == ("ValidationError", 422)

    async def test_an_upload_arrives_unchanged(self, world: World, play: Play) -> None:
        assert await world.download(await play("uploadPhoto")) == photo()

    async def test_a_large_upload_in_parts_arrives_unchanged(
        self, world: World, play: Play
    ) -> None:
        assert await world.download(await play("uploadInParts")) == large()

    async def test_an_uploaded_image_can_be_edited(self, world: World, play: Play) -> None:
        result = await play("editUpload")
        assert world.sandbox.jobs == 1
        inputs = {"prompt": "make it winter", "image_url": result["imageUrl"], "seed": 21}
        image = await world.result_image(result["data"])
        assert image == await world.made_directly(KONTEXT, **inputs)
        assert image != await world.made_directly(KONTEXT, **{**inputs, "seed": 22})

    async def test_a_blob_as_input_is_uploaded_by_the_client(
        self, world: World, play: Play
    ) -> None:
        result = await play("editBlob")
        assert world.sandbox.jobs == 1
        assert (await world.result_image(result["data"])).width > 0

    async def test_realtime_works_with_a_token_from_the_proxy(
        self, world: World, play: Play
    ) -> None:
        result = await play("realtime")
        assert len(result["images"]) == 1
        assert result["seed"] == 9

    async def test_a_wrong_input_names_its_field(self, world: World, play: Play) -> None:
        error = await play("invalidField")
        assert (error["name"], error["status"]) == ("ValidationError", 422)
        (field_error,) = error["fieldErrors"]
        assert field_error["loc"] == ["body", "guidance_scale"]
        assert field_error["type"] == "less_than_equal"
        assert world.sandbox.jobs == 0

    @pytest.mark.parametrize("scenario", ["contentPolicy", "contentPolicyInQueue"])
    async def test_a_refused_prompt_is_a_validation_error(self, play: Play, scenario: str) -> None:
        error = await play(scenario)
        assert (error["name"], error["status"]) == ("ValidationError", 422)
        assert error["fieldErrors"][0]["type"] == "content_policy_violation"

    @pytest.mark.parametrize(
        ("scenario", "statuses"),
        [
            pytest.param("retryOf429", [429, 200], id="one 429"),
            pytest.param("retryOf503", [503, 503, 200], id="two 503"),
        ],
    )
    async def test_temporary_errors_of_fal_are_retried_by_the_client(
        self, world: World, play: Play, scenario: str, statuses: list[int]
    ) -> None:
        result = await play(scenario)
        assert result["statuses"] == statuses
        assert world.sandbox.jobs == 1
        assert (await world.result_image(result["data"])).size == (1024, 768)

    @pytest.mark.timed
    async def test_an_aborted_run_ends_at_once(self, world: World, play: Play) -> None:
        result = await play("abort")
        assert result["error"]["name"] == "AbortError"
        assert result["milliseconds"] < 2000
        # The request to fal is aborted as well.
        await until(lambda: [seen.status for seen in world.sandbox.seen] == [499])
        assert world.sandbox.jobs == 0

    async def test_fifty_concurrent_requests_each_get_their_own_image(
        self, world: World, play: Play
    ) -> None:
        played = await play("fiftyAtOnce")
        results = played["results"]
        assert world.sandbox.jobs == 50
        assert played["longestWait"] > 0
        assert [result["data"]["seed"] for result in results] == list(range(1000, 1050))
        images = [await world.result_image(result["data"]) for result in results]
        assert len({image.tobytes() for image in images}) == 50
        assert images[17] == await world.made_directly(
            DEV, prompt="image number 1017", seed=1017, image_size="square"
        )

    async def test_a_lookalike_of_fals_host_is_refused_with_a_message(
        self, world: World, play: Play
    ) -> None:
        error = await play("lookalikeHost")
        assert (error["name"], error["status"]) == ("ApiError", 412)
        assert error["body"]["type"] == "target_not_fal"
        assert error["message"] == error["body"]["detail"]
        assert world.sandbox.seen == []


class TestInNode(Scenarios):
    """@fal-ai/client with `proxyUrl: {url, when: "always"}`."""
