"""nginx and Caddy as `deploy` configures them: a POST that a proxy may have sent is not repeated,
neither by them nor by fal's clients."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import BaseTestServer, TestServer
from fal_client import FalClientHTTPError

from falproxy.client import AsyncClient
from tests.support.js_world import need
from tests.support.paths import JS
from tests.support.ports import free_port
from tests.support.reverse_proxies import caddy, nginx

pytestmark = [pytest.mark.slow(seconds=5)]
ReverseProxy = Callable[..., AbstractAsyncContextManager[str]]
MODEL = "/api/fal/run/fal-ai/flux/dev"


@pytest.fixture(params=[nginx, caddy], ids=["nginx", "caddy"])
def reverse_proxy(request: pytest.FixtureRequest) -> ReverseProxy:
    server: ReverseProxy = request.param
    return server


@dataclass(slots=True)
class LosingProxy:
    """A proxy that closes the connection after it has read a request, except for health checks.

    requests: the methods of those requests.
    """

    port: int = 0
    requests: list[str] = field(default_factory=list)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/health/ready":
            return web.Response()
        await request.read()
        self.requests.append(request.method)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


@asynccontextmanager
async def losing_proxy() -> AsyncIterator[LosingProxy]:
    proxy = LosingProxy()
    connections = web.Server(proxy.handle)
    server = await asyncio.get_running_loop().create_server(connections, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    async with server:
        yield proxy
        await connections.shutdown()


@asynccontextmanager
async def healthy_proxy() -> AsyncIterator[BaseTestServer]:
    """Context: a proxy that returns the fields of a request that a reverse proxy sets."""

    async def echo(request: web.Request) -> web.Response:
        names = ("Host", "X-Forwarded-Proto", "X-Forwarded-For")
        return web.json_response({name: request.headers.getall(name, []) for name in names})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", echo)
    async with TestServer(app) as server:
        yield server


async def test_a_lost_post_is_a_504_that_clients_do_not_repeat(
    reverse_proxy: ReverseProxy, tmp_path: Path
) -> None:
    async with (
        losing_proxy() as one,
        losing_proxy() as other,
        reverse_proxy(tmp_path, one.port, other.port) as origin,
        ClientSession() as session,
        session.post(origin + MODEL, json={"prompt": "a lighthouse"}) as response,
    ):
        assert response.status == 504
        assert response.headers["X-Fal-Request-Timeout-Type"] == "user"
        assert response.headers["X-Should-Retry"] == "false"
        assert response.content_type == "application/json"
        body = await response.json()
        assert body["type"] == "outcome_unknown"
        assert "nginx" not in await response.text()
    assert one.requests + other.requests == ["POST"]


async def test_the_python_client_sends_a_lost_post_once(
    reverse_proxy: ReverseProxy, tmp_path: Path
) -> None:
    async with (
        losing_proxy() as proxy,
        reverse_proxy(tmp_path, proxy.port) as origin,
    ):
        client = AsyncClient(origin)
        with pytest.raises(FalClientHTTPError, match="unknown whether fal received"):
            await client.submit("fal-ai/flux/dev", {"prompt": "a lighthouse"})
        await client.http_client().aclose()
    assert proxy.requests == ["POST"]


async def test_the_javascript_client_sends_a_lost_post_once(
    reverse_proxy: ReverseProxy, tmp_path: Path
) -> None:
    need(Path("node"), JS / "node_modules")
    async with (
        losing_proxy() as proxy,
        reverse_proxy(tmp_path, proxy.port) as origin,
    ):
        client = await asyncio.create_subprocess_exec(
            *("node", str(JS / "keyed_submit.mjs"), "fal-ai/flux/dev", "a lighthouse"),
            env={"GATEWAY": origin, "PATH": "/usr/local/bin:/usr/bin:/bin"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await client.communicate()
        assert client.returncode != 0
        assert b"unknown whether fal received" in errors
    assert proxy.requests == ["POST"]


async def test_a_lost_get_may_be_repeated(reverse_proxy: ReverseProxy, tmp_path: Path) -> None:
    async with (
        losing_proxy() as proxy,
        reverse_proxy(tmp_path, proxy.port) as origin,
        ClientSession() as session,
        session.get(origin + "/api/fal/queue/fal-ai/flux/requests/1/status") as response,
    ):
        assert response.status == 502
        assert "X-Fal-Request-Timeout-Type" not in response.headers
        assert "X-Should-Retry" not in response.headers


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_proxy_that_is_not_running_costs_no_call(
    reverse_proxy: ReverseProxy, method: str, tmp_path: Path
) -> None:
    async with (
        healthy_proxy() as proxy,
        reverse_proxy(tmp_path, free_port(), proxy.port) as origin,
        ClientSession() as session,
    ):
        for _ in range(6):
            async with session.request(method, origin + MODEL) as response:
                assert response.status == 200


async def test_the_scheme_and_the_host_are_those_of_the_client(
    reverse_proxy: ReverseProxy, tmp_path: Path
) -> None:
    forged = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.1"}
    async with (
        healthy_proxy() as proxy,
        reverse_proxy(tmp_path, proxy.port) as origin,
        ClientSession(headers=forged) as session,
        session.get(origin) as response,
    ):
        sent = await response.json()
    assert sent["X-Forwarded-Proto"] == ["http"]
    assert sent["X-Forwarded-For"] == ["127.0.0.1"]
    assert sent["Host"][0].startswith("127.0.0.1")
