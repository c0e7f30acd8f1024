"""`/v1/videos` and `/v1/audio/speech` with clients in Node and Chromium, and over a restart."""

import asyncio
import base64
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.media.content_type import sniff_content_type
from tests.support.ai_sdk import run
from tests.support.cache_processes import open_client, open_fal, serving
from tests.support.chromium import Chromium
from tests.support.js_world import JS, need
from tests.support.key_search import CANARY
from tests.support.offline_fal import png
from tests.support.sandbox_proxy import SandboxProxy, data_uri, open_sandbox_proxy
from tests.support.videos import HERON, KLING_I2V, KLING_T2V, SLOW, VIDEOS
from tests.support.waiting import wait_until

KEY = "s3cret"


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    """A proxy that requires an access key."""
    async with open_sandbox_proxy(tmp_path, access_key=KEY, rehost="disk") as opened:
        yield opened


async def play(proxy: SandboxProxy, scenario: str, **options: object) -> Any:
    need(Path("node"), JS / "node_modules" / "openai")
    output = await run(
        "node", str(JS / "openai.mjs"), scenario,
        given=json.dumps(options), GATEWAY=proxy.origin, ACCESS_KEY=KEY,
    )  # fmt: skip
    return json.loads(output.splitlines()[-1])


async def test_a_video_is_made_and_downloaded_in_node(proxy: SandboxProxy) -> None:
    played = await play(
        proxy, "video", model="kling-video", prompt=HERON, seconds="10", size="720x1280"
    )
    result = played["result"]
    assert result["created"]["status"] in ("queued", "in_progress", "completed")
    video = result["video"]
    assert (video["status"], video["progress"], video["seconds"]) == ("completed", 100, "10")
    assert [each["id"] for each in result["listed"]] == [video["id"]]
    assert base64.b64decode(result["content"])[4:8] == b"ftyp"
    assert result["deleted"] == {"id": video["id"], "object": "video.deleted", "deleted": True}
    assert proxy.inputs == [{"prompt": HERON, "duration": "10", "aspect_ratio": "9:16"}]


async def test_a_file_is_the_beginning_of_a_video_in_node(proxy: SandboxProxy) -> None:
    reference = base64.b64encode(png("blue")).decode()
    played = await play(proxy, "video", model=KLING_I2V, prompt=HERON, reference=reference)
    assert played["result"]["video"]["status"] == "completed"
    assert proxy.inputs == [{"prompt": HERON, "image_url": data_uri(png("blue"))}]


async def test_what_cannot_be_mapped_is_an_error_in_node(proxy: SandboxProxy) -> None:
    played = await play(proxy, "video", model=KLING_T2V, prompt=HERON, seconds="7")
    error = played["error"]
    assert (error["name"], error["status"], error["param"]) == ("BadRequestError", 400, "seconds")
    assert proxy.submits == 0


async def test_a_text_is_read_aloud_in_node(proxy: SandboxProxy) -> None:
    played = await play(
        proxy, "speech", model="kokoro-speech", input=HERON, voice="alloy", response_format="mp3"
    )
    assert played["result"]["type"] == "audio/mpeg"
    content = base64.b64decode(played["result"]["content"])
    assert sniff_content_type(content).content_type == "audio/mpeg"


@pytest.mark.parametrize("rehost", ["disk", "off"])
async def test_a_video_plays_in_chromium(chromium: Chromium, tmp_path: Path, rehost: str) -> None:
    """From the proxy's storage, and relayed from its host."""
    async with open_sandbox_proxy(tmp_path, rehost=rehost) as proxy:
        created = await proxy.request("POST", VIDEOS, json={"prompt": HERON})
        await wait_until(lambda: proxy.jobs()[0]["status"] == "completed")
        url = f"{proxy.origin}{VIDEOS}/{created.document['id']}/content"
        played = await chromium.play(
            scenario="media.play", url=url, kind="video", **{"from": f"{proxy.origin}/health/live"}
        )
        assert played["early"] > 0.3
        assert played["frames"] == 2  # the image has changed
        assert {response["status"] for response in played["responses"]} == {206}


async def test_a_video_outlives_a_restart(aiohttp_server: AiohttpServer, tmp_path: Path) -> None:
    fal = await open_fal(aiohttp_server)
    env = {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "FALPROXY_DATA_DIR": str(tmp_path),
    }
    async with open_client() as client:
        async with serving(**env) as first:
            body = {"prompt": SLOW, "seconds": "5"}
            async with client.post(first.origin + VIDEOS, json=body) as response:
                video = await response.json()
                assert response.status == 200, video
            await first.stop(signal.SIGKILL)
        async with serving(**env) as second:
            url = f"{second.origin}{VIDEOS}/{video['id']}"
            finished = await wait_finished(client, url)
            assert (finished["status"], finished["prompt"]) == ("completed", SLOW)
            assert finished["created_at"] == video["created_at"]
            async with client.get(f"{url}/content", headers={"Range": "bytes=4-7"}) as response:
                assert (response.status, await response.read()) == (206, b"ftyp")
    assert fal.sandbox.jobs == 1


async def wait_finished(client: ClientSession, url: str) -> Any:
    while True:
        async with client.get(url) as response:
            video = await response.json()
            assert response.status == 200, video
        if video["status"] in ("completed", "failed"):
            return video
        await asyncio.sleep(0.05)
