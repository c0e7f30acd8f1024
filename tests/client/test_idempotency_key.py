"""falproxy.client sends an Idempotency-Key, the same when fal_client repeats a call."""

import asyncio
from typing import Any

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.client import AsyncClient, SyncClient

ENDPOINT = "fal-ai/flux/dev"
URL = "https://queue.fal.run/fal-ai/flux/requests/1"
DOCUMENT = {"request_id": "1", "response_url": URL, "status_url": URL, "cancel_url": URL}


class LossyProxy:
    """keys: of the requests so far. losses: responses that are lost."""

    def __init__(self) -> None:
        self.keys: list[str | None] = []
        self.losses = 0

    async def respond(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Idempotency-Key"))
        if len(self.keys) <= self.losses:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(DOCUMENT)


@pytest.fixture
def proxy() -> LossyProxy:
    return LossyProxy()


@pytest.fixture
async def origin(proxy: LossyProxy, aiohttp_server: AiohttpServer) -> str:
    app = web.Application()
    app.router.add_route("*", "/api/fal/proxy", proxy.respond)
    server = await aiohttp_server(app)
    return f"http://127.0.0.1:{server.port}"


async def call(origin: str, kind: str, method: str, **options: Any) -> None:
    arguments = {"prompt": "a"}
    await call_method(origin, kind, method, arguments, **options)


async def call_method(
    origin: str, kind: str, method: str, *arguments: object, **options: Any
) -> None:
    if kind == "async":
        client = AsyncClient(origin, "")
        await getattr(client, method)(ENDPOINT, *arguments, **options)
        await client.http_client().aclose()
    else:
        sync_client = SyncClient(origin, "")
        await asyncio.to_thread(getattr(sync_client, method), ENDPOINT, *arguments, **options)
        sync_client._client.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("method", ["run", "submit"])
async def test_a_repeated_call_has_the_same_key(
    proxy: LossyProxy, origin: str, kind: str, method: str
) -> None:
    proxy.losses = 2
    await call(origin, kind, method)
    assert len(proxy.keys) == 3
    assert len({*proxy.keys}) == 1
    await call(origin, kind, method, headers={"x-fal-note": "other"})
    assert None not in proxy.keys
    assert len({*proxy.keys}) == 2


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("name", ["Idempotency-Key", "idempotency-key"])
async def test_a_key_of_the_caller_is_kept(
    proxy: LossyProxy, origin: str, kind: str, name: str
) -> None:
    for method in ("run", "submit"):
        await call(origin, kind, method, headers={name: "mine"})
    assert proxy.keys == ["mine", "mine"]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_other_requests_have_no_key(proxy: LossyProxy, origin: str, kind: str) -> None:
    await call_method(origin, kind, "cancel", "1")
    assert proxy.keys == [None]
