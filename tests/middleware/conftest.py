"""Fixtures: fal's queue, a proxy on each of the stores of the result cache, an issuer of tokens."""

from collections.abc import Iterator

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpServer
from redis import Redis

from tests.support.fake_fal import FakeFal
from tests.support.fake_queue import FakeQueue
from tests.support.gateway import Gateway, MakeGateway
from tests.support.jwks_issuer import EC, RSA, Issuer
from tests.support.redis_server import RedisServer, redis_server


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "redis"])
def store_settings(request: pytest.FixtureRequest) -> dict[str, object]:
    """Settings that select a store."""
    if request.param == "sqlite":
        return {}
    url = request.getfixturevalue("redis").url
    with Redis.from_url(url) as client:
        client.flushall()
    return {"redis_url": url}


@pytest.fixture
def fal_outlives_the_proxy(aiohttp_server: AiohttpServer) -> None:
    """Close the fake of fal last: fixtures are torn down in reverse order of their setup."""


@pytest.fixture
def queue(fal: FakeFal) -> Iterator[FakeQueue]:
    queue = FakeQueue(fal)
    yield queue
    queue.release()


@pytest.fixture
async def gateway(make_gateway: MakeGateway, queue: FakeQueue) -> Gateway:
    return await make_gateway(queue.fake.origin)


@pytest.fixture
async def issuer(aiohttp_server: AiohttpServer) -> Issuer:
    """A server of two public keys."""
    issuer = Issuer()
    issuer.keys = {"rsa": RSA, "ec": EC}
    app = web.Application()
    app.router.add_get("/{path}", issuer.serve)
    server = await aiohttp_server(app)
    issuer.origin = f"http://127.0.0.1:{server.port}"
    return issuer
