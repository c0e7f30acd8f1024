"""Tokens, and realtime calls over a WebSocket with a token or a key."""

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

from falproxy.sandbox.tokens import TokenIssuer, matches_endpoint
from tests.support.offline_fal import DEV, KEY, OfflineFal, offline_fal

LIGHTNING = "fal-ai/fast-lightning-sdxl"
ALIAS = "fast-lightning-sdxl"


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


async def create_token(fal: OfflineFal, apps: list[str], seconds: float = 120) -> str:
    body = {"allowed_apps": apps, "token_expiration": seconds}
    response = await fal.client.post("/rest.fal.ai/tokens/", json=body, headers=KEY)
    assert response.status == 200
    return str(await response.json())


async def connect(fal: OfflineFal, token: str) -> ClientWebSocketResponse:
    url = f"/fal.run/{LIGHTNING}/realtime?fal_jwt_token={token}&max_buffering=10"
    return await fal.client.ws_connect(url)


async def call(socket: ClientWebSocketResponse, body: dict[str, Any]) -> dict[str, Any]:
    await socket.send_bytes(msgpack.packb(body))
    result: dict[str, Any] = msgpack.unpackb(await socket.receive_bytes())
    return result


async def test_a_token_is_a_bare_json_string(fal: OfflineFal) -> None:
    token = await create_token(fal, [ALIAS])
    assert len(token.split(".")) == 3


@pytest.mark.parametrize("key", ["allowed_apps", "app"])
async def test_a_realtime_token_is_returned_in_an_object(fal: OfflineFal, key: str) -> None:
    apps = f"{LIGHTNING}/realtime"
    body = {key: [apps] if key == "allowed_apps" else apps, "duration": 60}
    response = await fal.client.post("/rest.fal.ai/tokens/realtime", json=body, headers=KEY)
    socket = await connect(fal, (await response.json())["token"])
    assert await call(socket, {"prompt": "x"})


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({}, id="no apps"),
        pytest.param({"allowed_apps": [1]}, id="apps that are not strings"),
        pytest.param({"allowed_apps": "x"}, id="not a list"),
        pytest.param({"allowed_apps": ["x"], "token_expiration": -1}, id="negative lifetime"),
        pytest.param([], id="not an object"),
    ],
)
async def test_a_bad_token_request_is_a_422(fal: OfflineFal, body: object) -> None:
    response = await fal.client.post("/rest.fal.ai/tokens/", json=body, headers=KEY)
    assert response.status == 422


async def test_the_response_to_a_message_has_an_image(fal: OfflineFal) -> None:
    socket = await connect(fal, await create_token(fal, [ALIAS]))
    result = await call(socket, {"prompt": "a cat", "seed": 7, "extra": "echoed"})
    [entry] = result["images"]
    image = Image.open(io.BytesIO(entry["content"]))
    assert image.size == (entry["width"], entry["height"]) == (512, 512)
    assert (entry["content_type"], result["seed"]) == ("image/jpeg", 7)
    assert (result["prompt"], result["extra"]) == ("a cat", "echoed")


async def test_the_response_to_a_json_message_is_msgpack(fal: OfflineFal) -> None:
    socket = await connect(fal, await create_token(fal, [ALIAS]))
    await socket.send_json({"prompt": "a cat"})
    assert msgpack.unpackb(await socket.receive_bytes())["images"]


async def test_every_message_is_billed(fal: OfflineFal) -> None:
    socket = await connect(fal, await create_token(fal, [ALIAS]))
    for _ in range(3):
        await call(socket, {"prompt": "a cat"})
    assert fal.sandbox.jobs_by_endpoint == {LIGHTNING: 3}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        pytest.param(msgpack.packb({}), "MISSING", id="no prompt"),
        pytest.param(b"\xc1", "JSON_INVALID", id="not msgpack"),
        pytest.param(b"", "JSON_INVALID", id="empty"),
    ],
)
async def test_a_bad_message_is_an_error_and_the_socket_stays_open(
    fal: OfflineFal, content: bytes, error: str
) -> None:
    socket = await connect(fal, await create_token(fal, [ALIAS]))
    await socket.send_bytes(content)
    response = await socket.receive_json()
    assert (response["type"], response["error"]) == ("x-fal-error", error)
    assert response["reason"]
    assert await call(socket, {"prompt": "x"})


async def test_a_key_in_the_handshake_is_accepted(fal: OfflineFal) -> None:
    socket = await fal.client.ws_connect(f"/fal.run/{LIGHTNING}/realtime", headers=KEY)
    assert await call(socket, {"prompt": "x"})


@pytest.mark.parametrize("apps", [["other"], ["fal-ai/flux"], None], ids=str)
async def test_a_socket_with_a_bad_token_is_closed(fal: OfflineFal, apps: list[str] | None) -> None:
    socket = await connect(fal, await create_token(fal, apps) if apps else "forged.to.ken")
    assert await socket.receive_json() == {"status": "error", "error": "Unauthorized"}
    assert (await socket.receive()).type is WSMsgType.CLOSE


@pytest.mark.parametrize("endpoint", [DEV, "fal-ai/flux/none"])
async def test_other_models_have_no_realtime_endpoint(fal: OfflineFal, endpoint: str) -> None:
    response = await fal.client.get(f"/fal.run/{endpoint}/realtime", headers=KEY)
    assert response.status == 404


async def test_a_token_allows_calls_of_its_apps_without_a_key(fal: OfflineFal) -> None:
    token = await create_token(fal, ["flux"])
    url = f"/fal.run/{DEV}?fal_jwt_token={token}"
    assert (await fal.client.post(url, json={"prompt": "x"})).status == 200
    url = f"/fal.run/{LIGHTNING}?fal_jwt_token={token}"
    assert (await fal.client.post(url, json={"prompt": "x"})).status == 401


async def test_an_open_socket_does_not_delay_the_shutdown(fal: OfflineFal) -> None:
    socket = await connect(fal, await create_token(fal, [ALIAS]))
    await call(socket, {"prompt": "x"})
    closed = asyncio.ensure_future(socket.receive())
    async with asyncio.timeout(5):
        await fal.client.server.close()
        assert (await closed).type is WSMsgType.CLOSE


async def test_fal_client_makes_realtime_calls(
    fal: OfflineFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fal.sandbox.public_url
    monkeypatch.setattr("fal_client.client.REST_URL", f"{root}/rest.fal.ai")
    url = f"{root}/fal.run/".replace("http", "ws")
    monkeypatch.setattr("fal_client.client.REALTIME_URL_FORMAT", url)
    client = fal_client.AsyncClient(key="id:secret")
    async with client.realtime(LIGHTNING) as connection:
        await connection.send({"prompt": "a cat"})
        result = await connection.recv()
    await (await client._client).aclose()
    assert result is not None
    assert result["images"][0]["content"][:2] == b"\xff\xd8"


def test_a_token_returns_its_account() -> None:
    tokens = TokenIssuer()
    assert tokens.verify(tokens.issue("me", ["flux"], 60), DEV) == "me"


def test_an_expired_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TokenIssuer()
    token = tokens.issue("me", ["flux"], 60)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert tokens.verify(token, DEV) is None


@pytest.mark.parametrize("token", ["", "a", "a.b", "a.b.c", "é.b.c"])
def test_a_forged_token_is_refused(token: str) -> None:
    assert TokenIssuer().verify(token, DEV) is None


def test_a_modified_token_is_refused() -> None:
    tokens = TokenIssuer()
    token = tokens.issue("me", ["flux"], 60)
    assert tokens.verify(token[:-2] + "xx", DEV) is None
    assert TokenIssuer().verify(token, DEV) is None


@pytest.mark.parametrize(
    ("app", "expected"),
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
def test_a_token_allows_only_its_apps(app: str, expected: bool) -> None:
    assert matches_endpoint(app, DEV) is expected
