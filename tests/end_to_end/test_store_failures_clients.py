"""fal's own clients behind a balancer over two proxies, while their Redis fails.

STORE_FAILURE_CALLS=30 makes as many calls with each client.
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp.pytest_plugin import AiohttpServer
from redis.asyncio import Redis

from falproxy.sandbox import Sandbox, create_app
from tests.support.balancer import balancing
from tests.support.cache_processes import Fal, folder, serving
from tests.support.fal_client_world import ROOT, clean_environment
from tests.support.js_world import JS, need
from tests.support.key_search import CANARY
from tests.support.redis_server import RedisServer, redis_server
from tests.support.tcp_forwarder import TcpForwarder

pytestmark = pytest.mark.slow(seconds=4)

CALLS = int(os.environ.get("STORE_FAILURE_CALLS", "6"))
FREEZE_SECONDS = 4.0
FILL_VALUE = b"x" * 100_000
ACCESS_KEY = "an-access-key-of-the-proxy"
LOCKED = {"FAL_KEY": CANARY, "FALPROXY_ACCESS_KEYS": f"ann:{ACCESS_KEY}"}
SEVERAL_KEYS = {"AI_KEYS": f"{CANARY},{CANARY}2"}
SHARED = LOCKED | {"FALPROXY_CACHE_ENDPOINTS": "fal-ai/flux/dev"}
SHARED_BY = 3  # equal calls of each client
ENDPOINTS = {"FAL_KEY": CANARY, "FALPROXY_ALLOWED_ENDPOINTS": "fal-ai/flux/dev"}
CLIENT_TIMEOUT = 100.0  # seconds


@dataclass(frozen=True, slots=True)
class Servers:
    """The Redis of the proxies, an empty one that may replace it, and the address of both."""

    first: RedisServer
    second: RedisServer
    address: TcpForwarder


@pytest.fixture
def pair() -> Iterator[tuple[RedisServer, RedisServer]]:
    # The policy of docker-compose.yml.
    options = {"maxmemory": "16mb", "maxmemory_policy": "volatile-lru"}
    with redis_server(**options) as first, redis_server(**options) as second:
        yield first, second


async def freeze(servers: Servers) -> None:
    servers.first.freeze()
    await asyncio.sleep(FREEZE_SECONDS)
    servers.first.thaw()


async def replace(servers: Servers) -> None:
    servers.first.kill()
    servers.address.target = servers.second.port


async def empty(servers: Servers) -> None:
    async with Redis.from_url(servers.first.url) as redis:
        await redis.flushall()


async def fill(servers: Servers) -> None:
    """Store twice as much as fits."""
    async with Redis.from_url(servers.first.url) as redis:
        for number in range(320):
            await redis.set(f"other:{number}", FILL_VALUE, px=3_600_000)
        evicted = (await redis.info("stats"))["evicted_keys"]
        assert evicted > 100


Fault = Callable[[Servers], Awaitable[None]]
FAULTS = [
    pytest.param(freeze, LOCKED, id="frozen"),
    pytest.param(freeze, SEVERAL_KEYS, id="frozen, several fal keys"),
    pytest.param(freeze, ENDPOINTS, id="frozen, a list of endpoints"),
    pytest.param(replace, LOCKED, id="replaced by an empty one"),
    pytest.param(empty, LOCKED, id="emptied"),
    pytest.param(fill, LOCKED, id="evicting"),
    pytest.param(freeze, SHARED, id="frozen, shared jobs"),
    pytest.param(replace, SHARED, id="replaced, shared jobs"),
    pytest.param(empty, SHARED, id="emptied, shared jobs"),
    pytest.param(fill, SHARED, id="evicting, shared jobs"),
]


async def open_slow_fal(make_server: AiohttpServer) -> Fal:
    """Return a fal that runs all jobs at once."""
    fal = Fal()
    fal.sandbox = Sandbox(speed=100.0, runners=1000)
    app = create_app(fal.sandbox)
    app.on_response_prepare.append(fal.on_response)
    server = await make_server(app)
    fal.origin = fal.sandbox.public_url = f"http://127.0.0.1:{server.port}"
    return fal


async def run_client(*command: str, gateway: str, home: Path, shared_by: int) -> list[str | None]:
    """Run a client and return the error of each of its calls."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=clean_environment()
        | {"GATEWAY": gateway, "ACCESS_KEY": ACCESS_KEY, "CALLS": str(CALLS)}
        | {"SHARED_BY": str(shared_by)}
        | {"PYTHONPATH": str(ROOT), "HOME": str(home)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(CLIENT_TIMEOUT):
            output, log = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, log.decode()
    errors: list[str | None] = json.loads(output)
    return errors


@pytest.mark.parametrize(("fault", "settings"), FAULTS)
async def test_no_client_loses_a_paid_job(
    aiohttp_server: AiohttpServer,
    pair: tuple[RedisServer, RedisServer],
    tmp_path: Path,
    fault: Fault,
    settings: dict[str, str],
) -> None:
    need(Path("node"), JS / "node_modules")
    fal = await open_slow_fal(aiohttp_server)
    common = {"FALPROXY_UPSTREAM_ORIGIN": fal.origin, **settings}
    async with TcpForwarder(pair[0].port).running() as address:
        common["REDIS_URL"] = address.url
        async with (
            serving(FALPROXY_DATA_DIR=folder(tmp_path, "one"), **common) as first,
            serving(FALPROXY_DATA_DIR=folder(tmp_path, "two"), **common) as second,
            balancing(first.origin, second.origin) as gateway,
        ):
            clients = [
                [sys.executable, str(ROOT / "tests" / "fal_clients" / "subscribe_many.py")],
                ["node", str(JS / "subscribe_many.mjs")],
            ]
            shared_by = SHARED_BY if settings is SHARED else 0
            running = asyncio.gather(
                *(
                    run_client(*command, gateway=gateway, home=tmp_path, shared_by=shared_by)
                    for command in clients
                )
            )
            while len(fal.accepted) < CALLS // (2 if shared_by else 1) // max(shared_by, 1) + 1:
                await asyncio.sleep(0.05)
            await fault(Servers(*pair, address))
            results = await running
            errors = [error for result in results for error in result if error is not None]
            print(f"{len(errors)} of {2 * CALLS} calls raised, {fal.sandbox.jobs} jobs were paid")
            assert errors == []
            if not shared_by:
                assert fal.sandbox.jobs == 2 * CALLS
