"""The proxy with the sandbox behind it, for fal's JavaScript client."""

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
from tests.support.empty_ledger import with_empty_ledger
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
    is_public = is_direct or call.path.endswith("/openapi.json")
    assert keys == ([] if is_public else [f"Key {CANARY}"]), f"{call.method} {call.path}"
    assert "client-secret" not in str(call.headers), f"{call.method} {call.path}"
    assert "x-fal-target-url" not in call.headers


def gateway_app(fal: str, pages: dict[str, Path], data_dir: Path) -> web.Application:
    """Return an application with the proxy, fixtures at /fixtures, and these static pages."""
    app = web.Application(handler_args={"handler_cancellation": True})
    settings = with_empty_ledger(
        make_settings(fal_key=CANARY, upstream_origin=fal, data_dir=data_dir)
    )
    falproxy.setup(app, settings)
    fixtures = {"photo.png": (photo, "image/png"), "large.bin": (large, "application/x-noise")}

    async def fixture(request: web.Request) -> web.Response:
        content, content_type = fixtures[request.match_info["name"]]
        return web.Response(body=content(), content_type=content_type)

    app.router.add_get("/fixtures/{name}", fixture)
    for path, directory in pages.items():
        app.router.add_static(path, directory)
    return app


def node_player(world: World) -> Play:
    """Return a function that runs a scenario of tests/js in Node."""
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
