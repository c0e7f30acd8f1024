"""Fixtures of the tests of the result cache: fal's queue, and a proxy on each of the stores."""

from collections.abc import Iterator

import pytest
from aiohttp.pytest_plugin import AiohttpServer
from redis import Redis

from tests.support.fake_fal import FakeFal
from tests.support.fake_queue import FakeQueue
from tests.support.gateway import Gateway, MakeGateway
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
