"""Webhooks: signed as at fal, delivered to the local machine only."""

import asyncio
import hashlib
import json
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient, AiohttpServer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from multidict import CIMultiDictProxy
from yarl import URL

from falproxy.sandbox import Sandbox, create_app
from falproxy.sandbox.tokens import base64url_decode
from falproxy.sandbox.webhooks import is_loopback
from tests.support.offline_fal import DEV, KEY, SMALL, OfflineFal, offline_fal
from tests.support.waiting import wait_until

BODY = {"prompt": "x", "image_size": SMALL}


@dataclass(slots=True)
class Receiver:
    """A webhook server.

    statuses: statuses of the next responses, followed by 200.
    """

    url: str
    statuses: list[int] = field(default_factory=list)
    posts: list[tuple[CIMultiDictProxy[str], bytes]] = field(default_factory=list)

    async def wait(self, count: int = 1) -> None:
        await wait_until(lambda: len(self.posts) >= count, seconds=3)


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


@pytest.fixture
async def receiver(aiohttp_server: AiohttpServer) -> Receiver:
    receiver = Receiver("")

    async def receive(request: web.Request) -> web.Response:
        receiver.posts.append((request.headers, await request.read()))
        status = receiver.statuses.pop(0) if receiver.statuses else 200
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    app = web.Application()
    app.router.add_post("/{path:.*}", receive)
    server = await aiohttp_server(app)
    receiver.url = str(server.make_url("/hook?a=b"))
    return receiver


async def submit(fal: OfflineFal, url: str, body: object = BODY) -> str:
    query = str(URL.build(path="x", query={"fal_webhook": url}))[1:]
    return await fal.submit(DEV, body, query)


async def test_a_result_is_posted(fal: OfflineFal, receiver: Receiver) -> None:
    request_id = await submit(fal, receiver.url)
    await receiver.wait()
    document = json.loads(receiver.posts[0][1])
    result = await (await fal.get(request_id)).json()
    assert document == {
        "request_id": request_id,
        "gateway_request_id": request_id,
        "status": "OK",
        "payload": result,
    }


async def test_a_failure_is_posted_with_its_body(fal: OfflineFal, receiver: Receiver) -> None:
    body = {"prompt": "!error 422 content_policy_violation"}
    await submit(fal, receiver.url, body)
    await receiver.wait()
    document = json.loads(receiver.posts[0][1])
    assert document["status"] == "ERROR"
    assert document["error"] == "Invalid status code: 422"
    assert document["payload"]["detail"][0]["type"] == "content_policy_violation"


async def test_the_signature_matches_the_published_key(fal: OfflineFal, receiver: Receiver) -> None:
    request_id = await submit(fal, receiver.url)
    await receiver.wait()
    headers, body = receiver.posts[0]
    jwks = await (await fal.client.get("/rest.fal.ai/.well-known/jwks.json")).json()
    key = Ed25519PublicKey.from_public_bytes(base64url_decode(jwks["keys"][0]["x"]))
    message = "\n".join(
        (
            headers["X-Fal-Webhook-Request-Id"],
            headers["X-Fal-Webhook-User-Id"],
            headers["X-Fal-Webhook-Timestamp"],
            hashlib.sha256(body).hexdigest(),
        )
    )
    key.verify(bytes.fromhex(headers["X-Fal-Webhook-Signature"]), message.encode())
    assert headers["X-Fal-Webhook-Request-Id"] == request_id


async def test_a_failed_delivery_has_three_attempts(fal: OfflineFal, receiver: Receiver) -> None:
    receiver.statuses = [500, 500, 500, 500]
    request_id = await submit(fal, receiver.url)
    await receiver.wait(3)
    await fal.wait_completed(request_id)
    await asyncio.sleep(0.05)
    assert len(receiver.posts) == 3


async def test_a_successful_delivery_is_not_repeated(fal: OfflineFal, receiver: Receiver) -> None:
    receiver.statuses = [503]
    await submit(fal, receiver.url)
    await receiver.wait(2)
    await asyncio.sleep(0.05)
    assert len(receiver.posts) == 2


async def test_a_redirect_is_not_followed(fal: OfflineFal, receiver: Receiver) -> None:
    receiver.statuses = [307]
    await submit(fal, receiver.url)
    await receiver.wait()
    await asyncio.sleep(0.05)
    assert len(receiver.posts) == 1


async def test_webhooks_on_other_machines_are_not_called(
    fal: OfflineFal, caplog: pytest.LogCaptureFixture
) -> None:
    request_id = await submit(fal, "https://example.com/hook")
    await fal.wait_completed(request_id)
    assert "this machine only" in caplog.text


async def test_an_unreachable_receiver_does_not_affect_the_job(fal: OfflineFal) -> None:
    request_id = await submit(fal, "http://127.0.0.1:9/hook")
    assert "error" not in await fal.wait_completed(request_id)


@pytest.mark.parametrize(
    ("headers", "is_refused"),
    [
        pytest.param({}, False, id="a program"),
        pytest.param({"Origin": "https://evil.example"}, True, id="a page of another origin"),
        pytest.param({"Origin": "null"}, True, id="a page without an origin"),
        pytest.param({"Origin": "http://127.0.0.1:1"}, True, id="a page on another port"),
        pytest.param({"Sec-Fetch-Site": "cross-site"}, True, id="a cross-site request"),
        pytest.param({"Sec-Fetch-Site": "same-site"}, True, id="another subdomain"),
        pytest.param({"Sec-Fetch-Site": "same-origin"}, False, id="a page of the sandbox"),
        pytest.param({"Sec-Fetch-Site": "none"}, False, id="the address bar"),
    ],
)
async def test_pages_of_other_origins_cannot_ask_for_a_webhook(
    fal: OfflineFal, receiver: Receiver, headers: dict[str, str], is_refused: bool
) -> None:
    query = str(URL.build(path="x", query={"fal_webhook": receiver.url}))[1:]
    url = f"/queue.fal.run/{DEV}{query}"
    response = await fal.client.post(url, json=BODY, headers=KEY | headers)
    assert response.status == (403 if is_refused else 200)
    if not is_refused:
        await receiver.wait()
    assert fal.sandbox.jobs == (not is_refused)
    plain = await fal.client.post(f"/queue.fal.run/{DEV}", json=BODY, headers=KEY | headers)
    assert plain.status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8081", 200),
        ("[::1]:8081", 200),
        ("localhost", 200),
        ("a.localhost", 200),
        ("FAL.run", 200),
        ("queue.fal.run", 200),
        ("sandbox.example", 200),
        ("x.allowed.example:80", 200),
        ("evil.example", 403),
        ("evil.example:8081", 403),
        ("fal.run.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example/localhost", 403),
        ("localhost@evil.example", 403),
        ("", 403),
    ],
)
async def test_only_known_host_names_are_accepted(
    aiohttp_client: AiohttpClient, host: str, status: int
) -> None:
    sandbox = Sandbox("https://sandbox.example", 1000, hosts=("*.allowed.example",))
    client = await aiohttp_client(create_app(sandbox))
    url = f"/queue.fal.run/{DEV}" if not host.lower().endswith("fal.run") else f"/{DEV}"
    response = await client.post(url, json=BODY, headers=KEY | {"Host": host})
    assert response.status == status, await response.text()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("http://localhost:3000/x", True, id="by name"),
        pytest.param("https://127.0.0.1/x", True, id="by address"),
        pytest.param("http://127.9.9.9/x", True, id="all of 127"),
        pytest.param("http://[::1]:80/x", True, id="version 6"),
        pytest.param("https://example.com/x", False, id="the web"),
        pytest.param("http://10.0.0.1/x", False, id="private"),
        pytest.param("http://localhost.evil.tld/x", False, id="localhost as a subdomain"),
        pytest.param("http://127.0.0.1@evil.tld/x", False, id="user info"),
        pytest.param("ftp://localhost/x", False, id="another scheme"),
        pytest.param("http://[::1/x", False, id="cannot be parsed"),
        pytest.param("", False, id="empty"),
    ],
)
def test_loopback_urls_are_recognized(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected
