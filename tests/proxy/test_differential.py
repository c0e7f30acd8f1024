"""Every operation of fal, asked directly and through the proxy: the answers are the same."""

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
# sync_mode puts the picture into the answer, so that its bytes are compared as well.
PICTURE = {"prompt": "a heron", "seed": 7, "image_size": "square", "sync_mode": True}

# What is new in each answer: ids, names of files, clock times, measured seconds.
NEW = (
    (re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "<id>"),
    (re.compile(r"/(?:files/b|upload)/[\w./-]+"), "/<file>"),
    (re.compile(r"\b[0-9a-f]{16}_\d"), "<name>"),
    (re.compile(r"signature=[0-9a-f]+"), "<signature>"),
    (re.compile(r'("(?:token|timestamp|expires_at)": ?)"[^"]+"'), r"\1<new>"),
    (re.compile(r'("inference(?:_time)?": ?)[^,}]+'), r"\1<seconds>"),
    (re.compile(r'^"[\w.=-]+"$'), "<token>"),
)


class Heard(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: str


# Sends method, URL and JSON input to fal; knows by which way.
Ask = Callable[..., Awaitable[Heard]]
Operation = Callable[[Ask], Awaitable[Heard]]


def settle(text: str) -> str:
    """Text of an answer without what is new in each."""
    for pattern, replacement in NEW:
        text = pattern.sub(replacement, text)
    return text


async def submit(ask: Ask, **inputs: object) -> str:
    """The URL of a request whose job has ended."""
    heard = await ask("POST", f"{QUEUE}/{DEV}", PICTURE | inputs, raw=True)
    match = re.search(r'"request_id": ?"([^"]+)"', heard.body)
    assert match is not None
    url = f"{QUEUE}/fal-ai/flux/requests/{match[1]}"
    await ask("GET", f"{url}/status/stream?logs=1")
    return url


def plainly(method: str, url: str, inputs: object = None) -> Operation:
    async def operation(ask: Ask) -> Heard:
        return await ask(method, url, inputs)

    return operation


def of_a_request(method: str, path: str, **inputs: object) -> Operation:
    async def operation(ask: Ask) -> Heard:
        return await ask(method, await submit(ask, **inputs) + path)

    return operation


async def cancel_a_running_job(ask: Ask) -> Heard:
    heard = await ask("POST", f"{QUEUE}/{DEV}", {"prompt": "!delay 20 slow"}, raw=True)
    match = re.search(r'"request_id": ?"([^"]+)"', heard.body)
    assert match is not None
    return await ask("PUT", f"{QUEUE}/fal-ai/flux/requests/{match[1]}/cancel")


def troubled(what: str, endpoint: str = DEV) -> Operation:
    return plainly("POST", f"https://fal.run/{endpoint}", {"prompt": f"!error {what}"})


REALTIME = {"allowed_apps": ["fal-ai/fast-lightning-sdxl"], "duration": 60}
FILE = {"content_type": "image/png", "file_name": "a.png"}
OPERATIONS = [
    pytest.param(plainly("POST", f"https://fal.run/{DEV}", PICTURE), id="run"),
    pytest.param(plainly("POST", f"https://fal.run/{SCHNELL}/stream", PICTURE), id="stream"),
    pytest.param(plainly("POST", f"{QUEUE}/{DEV}", PICTURE), id="submit"),
    pytest.param(of_a_request("GET", "/status?logs=1"), id="status with logs"),
    pytest.param(of_a_request("GET", "/status?logs=0"), id="status"),
    pytest.param(of_a_request("GET", "/status/stream?logs=1"), id="status stream"),
    pytest.param(of_a_request("GET", ""), id="result"),
    pytest.param(of_a_request("PUT", "/cancel"), id="cancel too late"),
    pytest.param(cancel_a_running_job, id="cancel"),
    pytest.param(of_a_request("GET", "", prompt="!error 422 no_media_generated"), id="failed job"),
    pytest.param(plainly("GET", f"{QUEUE}/a/b/requests/{'0' * 36}/status"), id="unknown request"),
    pytest.param(plainly("POST", "https://fal.run/nobody/nothing", {}), id="unknown app"),
    pytest.param(plainly("POST", f"https://fal.run/{DEV}", {"seed": "x"}), id="invalid input"),
    pytest.param(plainly("GET", f"https://fal.run/{DEV}"), id="a method that fal refuses"),
    pytest.param(plainly("POST", f"{REST}/storage/upload/initiate", FILE), id="initiate"),
    pytest.param(
        plainly("POST", f"{REST}/storage/upload/initiate-multipart", FILE), id="initiate parts"
    ),
    pytest.param(plainly("POST", f"{REST}/storage/auth/token", {}), id="CDN token"),
    pytest.param(plainly("POST", f"{REST}/tokens/", {"allowed_apps": ["flux"]}), id="token"),
    pytest.param(plainly("POST", f"{REST}/tokens/realtime", REALTIME), id="realtime token"),
    pytest.param(
        plainly("GET", f"https://fal.ai/api/openapi/queue/openapi.json?endpoint_id={DEV}"),
        id="OpenAPI document",
    ),
    *(
        pytest.param(troubled(what), id=what)
        for what in (
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


def directly(sandbox: Sandbox, session: ClientSession) -> Ask:
    async def ask(method: str, url: str, inputs: object = None, *, raw: bool = False) -> Heard:
        address = f"{sandbox.public_url}/{url.removeprefix('https://')}"
        headers = {"Authorization": f"Key {CANARY}"}
        async with session.request(method, address, json=inputs, headers=headers) as response:
            return await hear(response, KEPT_BACK, raw)

    return ask


def through(gateway: Gateway, session: ClientSession) -> Ask:
    async def ask(method: str, url: str, inputs: object = None, *, raw: bool = False) -> Heard:
        address, headers = gateway.origin + PROXY, {"x-fal-target-url": url}
        async with session.request(method, address, json=inputs, headers=headers) as response:
            return await hear(response, ADDED, raw)

    return ask


async def hear(response: ClientResponse, dropped: set[str], raw: bool) -> Heard:
    body = await response.text()
    # Measured seconds may have a digit more or less: the length is right when it fits the body.
    assert response.headers.get("Content-Length") in (None, str(len(body.encode())))
    fields = [
        (name.decode().lower(), settle(value.decode()))
        for name, value in response.raw_headers
        if name.decode().lower() not in OF_THE_CONNECTION | dropped | {"content-length"}
    ]
    return Heard(response.status, fields, body if raw else settle(body))


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
