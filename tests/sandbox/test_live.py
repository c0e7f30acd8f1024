"""Signalling of live video in the sandbox, and the billing of its sessions."""

import asyncio
import sys
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp.pytest_plugin import AiohttpClient

from falproxy.sandbox.live_media import (
    HEIGHT,
    SQUARE,
    SQUARE_COLOR,
    WIDTH,
    background,
    draw_frame,
    read_prompt,
    square_position,
    without_local_names,
)
from falproxy.sandbox.live_models import LIVE_MODELS
from falproxy.sandbox.live_sessions import CHECK_INTERVAL, HEARTBEAT_TIMEOUT
from tests.support.fake_clock import FakeClock
from tests.support.fake_live import DIRECTOR, HEARTBEAT, ICE, SESSION
from tests.support.offline_fal import KEY, OfflineFal, offline_fal
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy
from tests.support.waiting import SOON, wait_until

WORLD = "fal-ai/lingbot-world-2"
# The first lines of a browser's offer for one video and a data channel.
OFFER = "\r\n".join([
    "v=0", "o=- 1 2 IN IP4 127.0.0.1", "s=-", "t=0 0", "a=group:BUNDLE 0 1",
    "m=video 9 UDP/TLS/RTP/SAVPF 96", "c=IN IP4 0.0.0.0", "a=mid:0", "a=recvonly",
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel", "c=IN IP4 0.0.0.0", "a=mid:1", "",
])  # fmt: skip


@pytest.fixture(autouse=True)
def without_aiortc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiortc", None)
    monkeypatch.delitem(sys.modules, "falproxy.sandbox.live_video", raising=False)


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


@pytest.fixture
def clock(fal: OfflineFal) -> FakeClock:
    """Return the clock of the sessions, which stands still."""
    fal.sandbox.live.clock = clock = FakeClock()
    return clock


async def post(
    fal: OfflineFal, target: str, body: object, headers: Any = KEY
) -> tuple[int, str, Any]:
    """Return status, content type, and the document or the text."""
    path = "/" + target.removeprefix("https://")
    async with fal.client.post(path, json=body, headers=headers) as response:
        is_json = response.content_type == "application/json"
        return (
            response.status,
            response.content_type,
            await response.json() if is_json else await response.text(),
        )


async def open_session(fal: OfflineFal, endpoint: str = DIRECTOR) -> str:
    status, _, document = await post(
        fal, SESSION, {"app_id": endpoint, "sdp": OFFER, "type": "offer"}
    )
    assert status == 200, document
    return str(document["session_id"])


async def beat(fal: OfflineFal, session: object, headers: Any = KEY) -> bool:
    status, _, document = await post(fal, HEARTBEAT, {"session_id": session}, headers)
    assert status == 200
    return bool(document["alive"])


async def test_servers_are_those_of_fal_or_of_the_app(fal: OfflineFal) -> None:
    assert (await post(fal, ICE, {"app_id": DIRECTOR}))[2] == {"ice_servers": []}
    managed = (await post(fal, f"{ICE}/", {"app_id": WORLD}))[2]
    assert managed["status"] == "app_managed"
    fallback = await post(fal, f"https://fal.run/{WORLD}/ice", {})
    assert fallback[2] == {"ice_servers": []}


@pytest.mark.parametrize(
    ("target", "body", "status"),
    [
        pytest.param(ICE, {}, 422, id="servers of no app"),
        pytest.param(ICE, {"app_id": "a/b"}, 404, id="servers of another app"),
        pytest.param(SESSION, {}, 422, id="a session of no app"),
        pytest.param(SESSION, {"app_id": DIRECTOR}, 422, id="no offer"),
        pytest.param(
            SESSION, {"app_id": DIRECTOR, "sdp": "x", "type": "offer"}, 422, id="a bad offer"
        ),
        pytest.param(SESSION, [], 422, id="a list"),
        pytest.param("https://fal.run/fal-ai/flux/dev/ice", {}, 404, id="of an image model"),
        pytest.param(f"{SESSION}/more", {}, 404, id="another path"),
    ],
)
async def test_wrong_calls_are_refused(
    fal: OfflineFal, target: str, body: object, status: int
) -> None:
    got, content_type, _ = await post(fal, target, body)
    assert got == status
    assert content_type == ("text/plain" if status == 422 else "application/json")
    assert fal.sandbox.jobs == 0


@pytest.mark.parametrize("target", [ICE, SESSION, HEARTBEAT])
async def test_a_key_is_required(fal: OfflineFal, target: str) -> None:
    refused = await post(fal, target, {"app_id": DIRECTOR}, headers={})
    assert refused == (401, "application/json", {"error": "missing Authorization header"})


async def test_without_aiortc_all_media_are_rejected(fal: OfflineFal) -> None:
    _, _, document = await post(fal, SESSION, {"app_id": DIRECTOR, "sdp": OFFER, "type": "offer"})
    assert document["type"] == "answer"
    media = [line for line in document["sdp"].split("\r\n") if line.startswith("m=")]
    assert media == [
        "m=video 0 UDP/TLS/RTP/SAVPF 96", "m=application 0 UDP/DTLS/SCTP webrtc-datachannel",
    ]  # fmt: skip


async def test_heartbeats_keep_a_session_open(fal: OfflineFal, clock: FakeClock) -> None:
    session = await open_session(fal)
    for _ in range(3):
        clock.now += 0.7 * HEARTBEAT_TIMEOUT
        assert await beat(fal, session)
        await asyncio.sleep(1.5 * CHECK_INTERVAL)
    assert not await beat(fal, session, {"Authorization": "Key other:secret"})
    assert not await beat(fal, "another")
    assert not await beat(fal, None)
    clock.now += 0.7 * HEARTBEAT_TIMEOUT
    await asyncio.sleep(1.5 * CHECK_INTERVAL)
    assert [*fal.sandbox.live.open] == [session]
    clock.now += 0.7 * HEARTBEAT_TIMEOUT
    await wait_until(lambda: not fal.sandbox.live.open)
    assert not await beat(fal, session)


async def test_a_session_is_billed_until_its_last_heartbeat(
    fal: OfflineFal, clock: FakeClock
) -> None:
    session = await open_session(fal)
    clock.now += 2.5
    assert await beat(fal, session)
    clock.now += 2 * HEARTBEAT_TIMEOUT
    await wait_until(lambda: fal.sandbox.jobs)
    assert fal.sandbox.jobs_by_endpoint == {DIRECTOR: 1}
    assert fal.sandbox.cost == LIVE_MODELS[DIRECTOR].price * Decimal("2.5")
    assert fal.sandbox.paid[0].request_id == session


async def test_prices_are_per_second(fal: OfflineFal) -> None:
    path = f"/api.fal.ai/v1/models/pricing?endpoint_id={DIRECTOR}"
    async with fal.client.get(path, headers=KEY) as response:
        (price,) = (await response.json())["prices"]
    assert (price["unit_price"], price["unit"]) == (0.02, "seconds")


# --- Through the proxy ---


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path, live_max_seconds=100.0) as opened:
        yield opened


async def test_a_session_through_the_proxy_is_in_its_ledger(proxy: SandboxProxy) -> None:
    assert (await proxy.call_target(ICE, {"app_id": DIRECTOR})).document == {"ice_servers": []}
    offer = {"app_id": DIRECTOR, "sdp": OFFER, "type": "offer"}
    session = (await proxy.call_target(SESSION, offer)).document["session_id"]
    await asyncio.sleep(1.1)
    assert (await proxy.call_target(HEARTBEAT, {"session_id": session})).document["alive"]
    async with asyncio.timeout(SOON):  # the price is asked for in the background
        while (record := (await proxy.records())[0]).settled is None:
            await asyncio.sleep(0.02)
    assert (record.endpoint, record.request_id) == (DIRECTOR, session)
    assert 20_000 <= record.settled <= 60_000


# --- Images ---


def test_names_that_hide_addresses_are_left_out_of_an_offer() -> None:
    kept = [
        "v=0\r\n",
        "a=candidate:1 1 udp 2113937151 192.0.2.7 46433 typ host\r\n",
        "a=candidate:2 1 udp 2113937151 local.example.com 46433 typ host\r\n",
        "a=candidate:3\r\n",
        "a=mid:0\r\n",
    ]
    hidden = "a=candidate:4 1 udp 2113937151 339f3a3f-8d4b-444a-bd2c.LOCAL 46433 typ host\r\n"
    assert without_local_names("".join([*kept[:3], hidden, *kept[3:]])) == "".join(kept)


def test_the_image_depends_on_endpoint_and_prompt() -> None:
    colors = {background(DIRECTOR), background(WORLD), background(DIRECTOR, "a storm")}
    assert len(colors) == 3
    assert background(DIRECTOR, "a storm") == background(DIRECTOR, "a storm")


def test_the_square_moves_within_the_image() -> None:
    positions = [square_position(number) for number in range(500)]
    assert {left for left, _ in positions} >= {0, WIDTH - SQUARE}
    assert all(
        0 <= left <= WIDTH - SQUARE and 0 <= top <= HEIGHT - SQUARE for left, top in positions
    )
    left, top = positions[17]
    image = draw_frame(17, background(DIRECTOR))
    assert image.getpixel((left + 5, top + 5)) == SQUARE_COLOR
    assert image.getpixel((1, 1)) == background(DIRECTOR)


@pytest.mark.parametrize(
    ("message", "prompt"),
    [
        ('{"prompt": "a storm"}', "a storm"),
        (b'{"prompt": "a storm"}', "a storm"),
        ('{"prompt": 1}', None),
        ("[]", None),
        ("a storm", None),
    ],
)
def test_a_prompt_is_read_from_a_message(message: str | bytes, prompt: str | None) -> None:
    assert read_prompt(message) == prompt
