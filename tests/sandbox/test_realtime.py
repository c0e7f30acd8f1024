"""Tokens and realtime: msgpack over a WebSocket, by both clients' ways in."""

import asyncio
import io
import time
from typing import Any

import fal_client
import msgpack  # type: ignore[import-untyped] # it has no stubs
import pytest
from aiohttp import ClientWebSocketResponse, WSMsgType
from aiohttp.pytest_plugin import AiohttpClient
from PIL import Image

from falproxy.sandbox.tokens import Tokens, is_for
from tests.support.offline_fal import DEV, KEY, OfflineFal, offline_fal

LIGHTNING = "fal-ai/fast-lightning-sdxl"
ALIAS = "fast-lightning-sdxl"


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


async def mint(fal: OfflineFal, apps: list[str], seconds: float = 120) -> str:
    body = {"allowed_apps": apps, "token_expiration": seconds}
    response = await fal.client.post("/rest.fal.ai/tokens/", json=body, headers=KEY)
    assert response.status == 200
    return str(await response.json())


async def connect(fal: OfflineFal, token: str) -> ClientWebSocketResponse:
    url = f"/fal.run/{LIGHTNING}/realtime?fal_jwt_token={token}&max_buffering=10"
    return await fal.client.ws_connect(url)


async def ask(socket: ClientWebSocketResponse, body: dict[str, Any]) -> dict[str, Any]:
    await socket.send_bytes(msgpack.packb(body))
    answer: dict[str, Any] = msgpack.unpackb(await socket.receive_bytes())
    return answer


async def test_a_token_is_a_bare_string(fal: OfflineFal) -> None:
    token = await mint(fal, [ALIAS])
    assert len(token.split(".")) == 3


@pytest.mark.parametrize("key", ["allowed_apps", "app"])
async def test_the_newer_token_comes_in_an_object(fal: OfflineFal, key: str) -> None:
    apps = f"{LIGHTNING}/realtime"
    body = {key: [apps] if key == "allowed_apps" else apps, "duration": 60}
    response = await fal.client.post("/rest.fal.ai/tokens/realtime", json=body, headers=KEY)
    socket = await connect(fal, (await response.json())["token"])
    assert await ask(socket, {"prompt": "x"})


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({}, id="no apps"),
        pytest.param({"allowed_apps": [1]}, id="no names"),
        pytest.param({"allowed_apps": "x"}, id="no list"),
        pytest.param({"allowed_apps": ["x"], "token_expiration": -1}, id="negative time"),
        pytest.param([], id="no object"),
    ],
)
async def test_a_bad_token_request_is_422(fal: OfflineFal, body: object) -> None:
    response = await fal.client.post("/rest.fal.ai/tokens/", json=body, headers=KEY)
    assert response.status == 422


async def test_a_message_is_answered_with_a_picture(fal: OfflineFal) -> None:
    socket = await connect(fal, await mint(fal, [ALIAS]))
    answer = await ask(socket, {"prompt": "a cat", "seed": 7, "mine": "kept"})
    [image] = answer["images"]
    picture = Image.open(io.BytesIO(image["content"]))
    assert picture.size == (image["width"], image["height"]) == (512, 512)
    assert (image["content_type"], answer["seed"]) == ("image/jpeg", 7)
    assert (answer["prompt"], answer["mine"]) == ("a cat", "kept")


async def test_json_is_answered_in_msgpack(fal: OfflineFal) -> None:
    socket = await connect(fal, await mint(fal, [ALIAS]))
    await socket.send_json({"prompt": "a cat"})
    assert msgpack.unpackb(await socket.receive_bytes())["images"]


async def test_every_message_is_paid(fal: OfflineFal) -> None:
    socket = await connect(fal, await mint(fal, [ALIAS]))
    for _ in range(3):
        await ask(socket, {"prompt": "a cat"})
    assert fal.sandbox.jobs_by_endpoint == {LIGHTNING: 3}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        pytest.param(msgpack.packb({}), "MISSING", id="no prompt"),
        pytest.param(b"\xc1", "JSON_INVALID", id="no msgpack"),
        pytest.param(b"", "JSON_INVALID", id="nothing"),
    ],
)
async def test_a_bad_message_is_told_and_the_socket_stays(
    fal: OfflineFal, content: bytes, error: str
) -> None:
    socket = await connect(fal, await mint(fal, [ALIAS]))
    await socket.send_bytes(content)
    answer = await socket.receive_json()
    assert (answer["type"], answer["error"]) == ("x-fal-error", error)
    assert answer["reason"]
    assert await ask(socket, {"prompt": "x"})


async def test_a_key_on_the_handshake_is_enough(fal: OfflineFal) -> None:
    socket = await fal.client.ws_connect(f"/fal.run/{LIGHTNING}/realtime", headers=KEY)
    assert await ask(socket, {"prompt": "x"})


@pytest.mark.parametrize("apps", [["other"], ["fal-ai/flux"], None], ids=str)
async def test_without_a_good_token_the_socket_closes(
    fal: OfflineFal, apps: list[str] | None
) -> None:
    socket = await connect(fal, await mint(fal, apps) if apps else "forged.to.ken")
    assert await socket.receive_json() == {"status": "error", "error": "Unauthorized"}
    assert (await socket.receive()).type is WSMsgType.CLOSE


@pytest.mark.parametrize("endpoint", [DEV, "fal-ai/flux/none"])
async def test_other_models_have_no_socket(fal: OfflineFal, endpoint: str) -> None:
    response = await fal.client.get(f"/fal.run/{endpoint}/realtime", headers=KEY)
    assert response.status == 404


async def test_a_token_runs_its_apps_without_a_key(fal: OfflineFal) -> None:
    token = await mint(fal, ["flux"])
    url = f"/fal.run/{DEV}?fal_jwt_token={token}"
    assert (await fal.client.post(url, json={"prompt": "x"})).status == 200
    url = f"/fal.run/{LIGHTNING}?fal_jwt_token={token}"
    assert (await fal.client.post(url, json={"prompt": "x"})).status == 401


async def test_an_open_socket_does_not_hold_up_the_shutdown(fal: OfflineFal) -> None:
    socket = await connect(fal, await mint(fal, [ALIAS]))
    await ask(socket, {"prompt": "x"})
    closed = asyncio.ensure_future(socket.receive())
    async with asyncio.timeout(5):
        await fal.client.server.close()
        assert (await closed).type is WSMsgType.CLOSE


async def test_fal_client_talks_realtime(fal: OfflineFal, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fal.sandbox.public_url
    monkeypatch.setattr("fal_client.client.REST_URL", f"{root}/rest.fal.ai")
    url = f"{root}/fal.run/".replace("http", "ws")
    monkeypatch.setattr("fal_client.client.REALTIME_URL_FORMAT", url)
    client = fal_client.AsyncClient(key="id:secret")
    async with client.realtime(LIGHTNING) as connection:
        await connection.send({"prompt": "a cat"})
        answer = await connection.recv()
    await (await client._client).aclose()
    assert answer is not None
    assert answer["images"][0]["content"][:2] == b"\xff\xd8"


def test_a_token_names_its_account() -> None:
    tokens = Tokens()
    assert tokens.account(tokens.mint("me", ["flux"], 60), DEV) == "me"


def test_an_old_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens()
    token = tokens.mint("me", ["flux"], 60)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert tokens.account(token, DEV) is None


@pytest.mark.parametrize("token", ["", "a", "a.b", "a.b.c", "é.b.c"])
def test_a_forged_token_is_refused(token: str) -> None:
    assert Tokens().account(token, DEV) is None


def test_a_changed_token_is_refused() -> None:
    tokens = Tokens()
    token = tokens.mint("me", ["flux"], 60)
    assert tokens.account(token[:-2] + "xx", DEV) is None
    assert Tokens().account(token, DEV) is None


@pytest.mark.parametrize(
    ("app", "allowed"),
    [
        pytest.param("flux", True, id="alias"),
        pytest.param("fal-ai/flux", True, id="owner and alias"),
        pytest.param("fal-ai/flux/dev", True, id="full id"),
        pytest.param("fal-ai/flux/dev/realtime", True, id="with the path"),
        pytest.param("fal-ai/flux/schnell", False, id="another endpoint"),
        pytest.param("fal-ai", False, id="owner alone"),
        pytest.param("fal-ai/flu", False, id="part of a name"),
        pytest.param("*", False, id="wildcard"),
    ],
)
def test_a_token_is_for_its_apps(app: str, allowed: bool) -> None:
    assert is_for(app, DEV) is allowed
