"""Videos and sounds of the sandbox in Chromium, through the proxy's `/files/`."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.chromium import Chromium
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy

KLING = "fal-ai/kling-video/v2.5-turbo/pro/text-to-video"
VEO = "fal-ai/veo3.1/fast"
KOKORO = "fal-ai/kokoro/american-english"
MINIMAX = "fal-ai/minimax/speech-02-turbo"
TEXT = "a heron stands in the shallows and waits"


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path, rehost="disk", sandbox=True) as opened:
        yield opened


async def stored_url(
    proxy: SandboxProxy, endpoint: str, body: dict[str, object], key: str = "video"
) -> str:
    """Run a model and return the URL of its stored file."""
    reply = await proxy.call_target(f"https://fal.run/{endpoint}", body)
    assert reply.status == 200, reply
    assert reply.headers["x-falproxy-rehost"] == "stored; count=1"
    url = str(reply.document[key]["url"])
    assert url.startswith(f"{proxy.origin}/files/")
    return url


@pytest.mark.parametrize(
    ("endpoint", "body", "seconds", "size"),
    [
        pytest.param(KLING, {"prompt": TEXT}, 5, [1280, 720], id="silent"),
        pytest.param(
            VEO, {"prompt": TEXT, "duration": "4s", "aspect_ratio": "9:16"}, 4, [720, 1280],
            id="with sound",
        ),
    ],
)  # fmt: skip
async def test_a_video_plays_and_seeks(
    proxy: SandboxProxy,
    chromium: Chromium,
    endpoint: str,
    body: dict[str, object],
    seconds: int,
    size: list[int],
) -> None:
    url = await stored_url(proxy, endpoint, body)
    played = await chromium.play(scenario="media.play", url=url, kind="video")
    assert played["early"] > 0.3
    assert played["late"] > seconds - 0.6
    assert played["duration"] == pytest.approx(seconds, abs=0.1)
    assert played["size"] == size
    assert played["frames"] == 2  # different ones
    assert {response["status"] for response in played["responses"]} == {206}
    assert all(response["range"] for response in played["responses"])


async def test_a_video_plays_when_its_url_is_opened(
    proxy: SandboxProxy, chromium: Chromium
) -> None:
    url = await stored_url(proxy, KLING, {"prompt": TEXT})
    assert await chromium.play(scenario="media.open", url=url) > 0.3


@pytest.mark.parametrize(
    ("endpoint", "body", "content_type"),
    [
        pytest.param(KOKORO, {"prompt": TEXT}, "audio/wav", id="WAV"),
        pytest.param(MINIMAX, {"text": TEXT}, "audio/mpeg", id="MP3"),
    ],
)
async def test_a_sound_plays_and_is_decoded(
    proxy: SandboxProxy,
    chromium: Chromium,
    endpoint: str,
    body: dict[str, object],
    content_type: str,
) -> None:
    url = await stored_url(proxy, endpoint, body, "audio")
    played = await chromium.play(scenario="media.play", url=url, kind="audio")
    assert played["early"] > 0.3
    assert played["duration"] == pytest.approx(len(TEXT) / 15, abs=0.1)
    decoded = await chromium.play(scenario="media.decode", url=url)
    assert decoded["duration"] == pytest.approx(len(TEXT) / 15, abs=0.1)
    assert decoded["type"] == content_type
    assert decoded["loudest"] > 0.1


async def test_scripts_of_other_origins_can_read_parts(
    proxy: SandboxProxy, chromium: Chromium
) -> None:
    url = await stored_url(proxy, KLING, {"prompt": TEXT})
    part = await chromium.play(scenario="media.fetchRange", url=url, range="bytes=100-199")
    assert (part["status"], part["size"], part["acceptRanges"]) == (206, 100, "bytes")
    assert part["contentRange"].startswith("bytes 100-199/")
    assert part["etag"]
