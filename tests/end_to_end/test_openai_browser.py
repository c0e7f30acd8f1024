"""OpenAI's client in Chromium, on a page of another origin."""

import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.support.ai_sdk import ACCESS_SECRET, LOCKED, open_proxy
from tests.support.chromium import Chromium
from tests.support.js_world import JS, World, need
from tests.support.openai_proxy import HERON, KONTEXT, SCHNELL, SMALL, decode_image
from tests.support.urls import PROXY

PAGE = '<!doctype html><script src="page.js" data-proxy-url="{}" data-access-key="{}"></script>'


@dataclass(frozen=True, slots=True)
class OpenAIPage:
    """A page with OpenAI's client. origin: its own; world: the proxy that it calls."""

    world: World
    origin: str
    chromium: Chromium

    async def play(self, scenario: str, **options: Any) -> Any:
        call = f"{scenario} {json.dumps(options)}"
        return await self.chromium.play(scenario=call, gateway=self.origin)

    @property
    def submits(self) -> int:
        hosts = ("queue.fal.run", "fal.run")
        seen = self.world.sandbox.seen
        return sum(each.method == "POST" and each.host in hosts for each in seen)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return openai_page.mjs, bundled as a script for browsers."""
    need(Path("node"), JS / "node_modules" / "openai")
    outfile = tmp_path_factory.mktemp("openai") / "page.js"
    esbuild = str(JS / "node_modules" / ".bin" / "esbuild")
    command = [esbuild, str(JS / "openai_page.mjs"), "--bundle", f"--outfile={outfile}"]
    subprocess.run([*command, "--log-level=warning"], check=True, timeout=60)
    return outfile


@asynccontextmanager
async def open_page(
    script: Path, chromium: Chromium, data_dir: Path, *, is_allowed: bool = True
) -> AsyncIterator[OpenAIPage]:
    html = ""

    async def index(request: web.Request) -> web.Response:
        return web.Response(text=html, content_type="text/html")

    async def page_script(request: web.Request) -> web.FileResponse:
        return web.FileResponse(script)

    app = web.Application()
    app.router.add_get("/scenarios/index.html", index)
    app.router.add_get("/scenarios/page.js", page_script)
    async with TestServer(app) as server:
        origin = f"http://localhost:{server.port}"
        origins = (origin,) if is_allowed else ()
        async with open_proxy(data_dir, access_keys=LOCKED, allowed_origins=origins) as world:
            html = PAGE.format(world.gateway + PROXY, ACCESS_SECRET)
            yield OpenAIPage(world, origin, chromium)


@pytest.fixture
async def page(script: Path, chromium: Chromium, tmp_path: Path) -> AsyncIterator[OpenAIPage]:
    async with open_page(script, chromium, tmp_path) as opened:
        yield opened


async def test_a_page_of_an_allowed_origin_generates_an_image(page: OpenAIPage) -> None:
    played = await page.play("generate", model="flux-dev", prompt=HERON, size=SMALL)
    (image,) = played["result"]["data"]
    assert await page.world.download(image["url"])
    assert page.submits == 1


async def test_a_page_of_an_allowed_origin_edits_a_file(page: OpenAIPage) -> None:
    played = await page.play("edit", model=KONTEXT, prompt="winter")
    assert decode_image(played["result"]["data"][0]["b64_json"]).width > 0
    assert page.submits == 1


async def test_a_page_of_an_allowed_origin_reads_a_stream(page: OpenAIPage) -> None:
    options = {"model": SCHNELL, "prompt": HERON, "size": SMALL, "partial_images": 1}
    played = await page.play("stream", **options)
    assert [name.rpartition(".")[2] for name in played["result"]] == ["partial_image", "completed"]


async def test_a_page_of_an_allowed_origin_lists_the_models(page: OpenAIPage) -> None:
    assert "kontext" in (await page.play("models"))["result"]


async def test_a_page_of_an_allowed_origin_reads_all_headers(page: OpenAIPage) -> None:
    played = await page.play("withHeaders", model="flux-dev", prompt=HERON, size=SMALL, style="x")
    headers = played["result"]
    assert {"server-timing", "x-request-id", "x-falproxy-ignored"} <= headers.keys()


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("500 internal_server_error", 500, "internal_server_error"),
        ("504 generation_timeout", 504, "generation_timeout"),
        ("502 nginx at=submit", 502, "upstream_failed"),
    ],
)
async def test_a_call_that_fal_may_have_charged_for_is_not_repeated(
    page: OpenAIPage, fault: str, status: int, code: str
) -> None:
    played = await page.play("generate", model="flux-dev", prompt=f"!error {fault}")
    assert (played["error"]["status"], played["error"]["code"]) == (status, code)
    assert page.submits == 1


async def test_a_page_reads_the_error_for_an_unknown_model(page: OpenAIPage) -> None:
    played = await page.play("generate", model="dall-e-3", prompt=HERON)
    assert (played["error"]["name"], played["error"]["status"]) == ("NotFoundError", 404)
    assert page.submits == 0


async def test_a_page_of_another_origin_cannot_call(
    script: Path, chromium: Chromium, tmp_path: Path
) -> None:
    async with open_page(script, chromium, tmp_path, is_allowed=False) as page:
        played = await page.play("models")
        assert played["error"]["message"] == "Connection error."
        assert page.world.sandbox.seen == []
