"""Every operation of fal gives the same response directly and through the proxy."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import pytest
from aiohttp import ClientResponse, ClientSession
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.sandbox import Sandbox, create_app
from tests.support.gateway import Gateway, MakeGateway
from tests.support.header_names import ADDED, KEPT_BACK, OF_THE_CONNECTION
from tests.support.key_search import CANARY
from tests.support.urls import PROXY

pytestmark = pytest.mark.both_transports

DEV = "fal-ai/flux/dev"
SCHNELL = "fal-ai/flux/schnell"
QUEUE = "https://queue.fal.run"
REST = "https://rest.fal.ai"
# sync_mode puts the image into the response, so that its bytes are compared as well.
IMAGE_INPUT = {"prompt": "a heron", "seed": 7, "image_size": "square", "sync_mode": True}

# Values that differ in each response: ids, file names, times, durations.
NEW = (
    (re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "<id>"),
    (re.compile(r"/(?:files/b|upload)/[\w./-]+"), "/<file>"),
    (re.compile(r"\b[0-9a-f]{16}_\d"), "<name>"),
    (re.compile(r"signature=[0-9a-f]+"), "<signature>"),
    (re.compile(r'("(?:token|timestamp|expires_at)": ?)"[^"]+"'), r"\1<new>"),
    (re.compile(r'("inference(?:_time)?": ?)[^,}]+'), r"\1<seconds>"),
    (re.compile(r'^"[\w.=-]+"$'), "<token>"),
)


class Observed(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: str


# Sends method, URL and JSON input to fal, directly or through the proxy.
Send = Callable[..., Awaitable[Observed]]
Operation = Callable[[Send], Awaitable[Observed]]


def normalize(text: str) -> str:
    """Return the text of a response without the values that always differ."""
    for pattern, replacement in NEW:
        text = pattern.sub(replacement, text)
    return text


async def submit(send: Send, **inputs: object) -> str:
    """Submit, wait for the job, and return the URL of the request."""
    response = await send("POST", f"{QUEUE}/{DEV}", IMAGE_INPUT | inputs, raw=True)
    match = re.search(r'"request_id": ?"([^"]+)"', response.body)
    assert match is not None
    url = f"{QUEUE}/fal-ai/flux/requests/{match[1]}"
    await send("GET", f"{url}/status/stream?logs=1")
    return url


def one_request(method: str, url: str, inputs: object = None) -> Operation:
    async def operation(send: Send) -> Observed:
        return await send(method, url, inputs)

    return operation


def on_a_request(method: str, path: str, **inputs: object) -> Operation:
    async def operation(send: Send) -> Observed:
        return await send(method, await submit(send, **inputs) + path)

    return operation


async def cancel_a_running_job(send: Send) -> Observed:
    response = await send("POST", f"{QUEUE}/{DEV}", {"prompt": "!delay 20 slow"}, raw=True)
    match = re.search(r'"request_id": ?"([^"]+)"', response.body)
    assert match is not None
    return await send("PUT", f"{QUEUE}/fal-ai/flux/requests/{match[1]}/cancel")


def failing(error: str, endpoint: str = DEV) -> Operation:
    return one_request("POST", f"https://fal.run/{endpoint}", {"prompt": f"!error {error}"})


REALTIME = {"allowed_apps": ["fal-ai/fast-lightning-sdxl"], "duration": 60}
FILE = {"content_type": "image/png", "file_name": "a.png"}
OPERATIONS = [
    pytest.param(one_request("POST", f"https://fal.run/{DEV}", IMAGE_INPUT), id="run"),
    pytest.param(
        one_request("POST", f"https://fal.run/{SCHNELL}/stream", IMAGE_INPUT), id="stream"
    ),
    pytest.param(one_request("POST", f"{QUEUE}/{DEV}", IMAGE_INPUT), id="submit"),
    pytest.param(on_a_request("GET", "/status?logs=1"), id="status with logs"),
    pytest.param(on_a_request("GET", "/status?logs=0"), id="status"),
    pytest.param(on_a_request("GET", "/status/stream?logs=1"), id="status stream"),
    pytest.param(on_a_request("GET", ""), id="result"),
    pytest.param(on_a_request("PUT", "/cancel"), id="cancel too late"),
    pytest.param(cancel_a_running_job, id="cancel"),
    pytest.param(on_a_request("GET", "", prompt="!error 422 no_media_generated"), id="failed job"),
    pytest.param(
        one_request("GET", f"{QUEUE}/a/b/requests/{'0' * 36}/status"), id="unknown request"
    ),
    pytest.param(one_request("POST", "https://fal.run/unknown/app", {}), id="unknown app"),
    pytest.param(one_request("POST", f"https://fal.run/{DEV}", {"seed": "x"}), id="invalid input"),
    pytest.param(one_request("GET", f"https://fal.run/{DEV}"), id="a method that fal refuses"),
    pytest.param(one_request("POST", f"{REST}/storage/upload/initiate", FILE), id="initiate"),
    pytest.param(
        one_request("POST", f"{REST}/storage/upload/initiate-multipart", FILE), id="initiate parts"
    ),
    pytest.param(one_request("POST", f"{REST}/storage/auth/token", {}), id="CDN token"),
    pytest.param(one_request("POST", f"{REST}/tokens/", {"allowed_apps": ["flux"]}), id="token"),
    pytest.param(one_request("POST", f"{REST}/tokens/realtime", REALTIME), id="realtime token"),
    pytest.param(
        one_request("GET", f"https://fal.ai/api/openapi/queue/openapi.json?endpoint_id={DEV}"),
        id="OpenAPI document",
    ),
    *(
        pytest.param(failing(error), id=error)
        for error in (
            "422 content_policy_violation",
            "429 concurrent_requests_limit",
            "403 locked",
            "499 client_disconnected",
            "500 internal_server_error",
            "502 nginx",
            "503 runner_connection_error",
            "504 generation_timeout",
        )
    ),
]


@pytest.fixture
async def sandbox(aiohttp_server: AiohttpServer) -> Sandbox:
    sandbox = Sandbox(speed=1000)
    server = await aiohttp_server(create_app(sandbox))
    sandbox.public_url = f"http://127.0.0.1:{server.port}"
    return sandbox


def directly(sandbox: Sandbox, session: ClientSession) -> Send:
    async def send(method: str, url: str, inputs: object = None, *, raw: bool = False) -> Observed:
        address = f"{sandbox.public_url}/{url.removeprefix('https://')}"
        headers = {"Authorization": f"Key {CANARY}"}
        async with session.request(method, address, json=inputs, headers=headers) as response:
            return await observe(response, KEPT_BACK, raw)

    return send


def through(gateway: Gateway, session: ClientSession) -> Send:
    async def send(method: str, url: str, inputs: object = None, *, raw: bool = False) -> Observed:
        address, headers = gateway.origin + PROXY, {"x-fal-target-url": url}
        async with session.request(method, address, json=inputs, headers=headers) as response:
            return await observe(response, ADDED, raw)

    return send


async def observe(response: ClientResponse, dropped: set[str], raw: bool) -> Observed:
    content = await response.read()
    body = content.decode("latin-1" if "Content-Encoding" in response.headers else "utf-8")
    # Durations vary in their number of digits: the length must only fit the body.
    assert response.headers.get("Content-Length") in (None, str(len(content)))
    fields = [
        (name.decode().lower(), normalize(value.decode()))
        for name, value in response.raw_headers
        if name.decode().lower() not in OF_THE_CONNECTION | dropped | {"content-length"}
    ]
    return Observed(response.status, fields, body if raw else normalize(body))


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_operation_is_the_same_directly_and_through_the_proxy(
    sandbox: Sandbox, make_gateway: MakeGateway, session: ClientSession, operation: Operation
) -> None:
    gateway = await make_gateway(sandbox.public_url)
    async with asyncio.timeout(20):
        direct = await operation(directly(sandbox, session))
        proxied = await operation(through(gateway, session))
    assert proxied.status == direct.status
    assert proxied.headers == direct.headers
    assert proxied.body == direct.body
