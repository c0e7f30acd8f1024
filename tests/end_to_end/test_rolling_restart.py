"""Restarts of three nodes, one after the other, under load through nginx and Caddy as `deploy`
configures them.

RESTARTS=10 makes as many restarts.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.sandbox import Sandbox, create_app
from tests.support.cache_processes import Fal
from tests.support.fal_client_world import clean_environment
from tests.support.js_world import JS, need
from tests.support.key_search import CANARY
from tests.support.paths import ROOT
from tests.support.proxy_node import ProxyNode
from tests.support.redis_server import redis_server
from tests.support.reverse_proxies import caddy, nginx

NODES, WORKERS = 3, 2
RESTARTS = int(os.environ.get("RESTARTS", "3"))
CALLS = 40  # of each process of a client, ten in a second
# Longer than the 2 s in which nginx leaves a server out, and after which Caddy checks it again.
STOP_DELAY = 3
ACCESS_KEY = "an-access-key-of-the-proxy"
TIMEOUT = 120.0 + 30.0 * RESTARTS  # seconds, on a busy machine
CLIENTS = (
    [sys.executable, str(ROOT / "tests" / "fal_clients" / "subscribe_many.py")],
    ["node", str(JS / "subscribe_many.mjs")],
)

pytestmark = [
    pytest.mark.slow(seconds=15),
    pytest.mark.skipif(
        "RESTARTS" not in os.environ, reason="takes an idle machine: make rolling-restarts"
    ),
]
ReverseProxy = Callable[..., AbstractAsyncContextManager[str]]


async def run_client(command: Sequence[str], gateway: str, home: Path) -> list[str | None]:
    """Return the error of each call of a client."""
    values = {"GATEWAY": gateway, "ACCESS_KEY": ACCESS_KEY, "CALLS": str(CALLS), "SHARED_BY": "0"}
    process = await asyncio.create_subprocess_exec(
        *command,
        env=clean_environment() | values | {"PYTHONPATH": str(ROOT), "HOME": str(home)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT):
            output, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, log.decode()
    errors: list[str | None] = json.loads(output)
    return errors


async def call_until(
    ended: asyncio.Event, command: Sequence[str], gateway: str, home: Path
) -> list[str | None]:
    """Run one process of a client after the other. Return the error of each call."""
    errors = []
    while not ended.is_set():
        errors += await run_client(command, gateway, home)
    return errors


@asynccontextmanager
async def open_nodes(fal: Fal, tmp_path: Path) -> AsyncIterator[list[ProxyNode]]:
    """Context: running nodes that share a Redis."""
    with redis_server() as redis:
        env = {
            "FAL_KEY": CANARY,
            "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
            "FALPROXY_ACCESS_KEYS": f"ann:{ACCESS_KEY}",
            "FALPROXY_STOP_DELAY": str(STOP_DELAY),
            "REDIS_URL": redis.url,
        }
        nodes = []
        for number in range(NODES):
            folder = tmp_path / f"node-{number}"
            folder.mkdir()
            nodes.append(ProxyNode(folder, WORKERS, **env))
        try:
            for node in nodes:
                await node.start()
            yield nodes
        finally:
            for node in nodes:
                await node.kill()


def has_failed(line: dict[str, object]) -> bool:
    status = line.get("status")
    return isinstance(status, int) and status >= 500


async def open_parallel_fal(make_server: AiohttpServer) -> Fal:
    """Return a fal that runs all jobs at once."""
    fal = Fal()
    fal.sandbox = Sandbox(speed=100.0, runners=1000)
    app = create_app(fal.sandbox)
    app.on_response_prepare.append(fal.on_response)
    server = await make_server(app)
    fal.origin = fal.sandbox.public_url = f"http://127.0.0.1:{server.port}"
    return fal


@pytest.mark.timeout(TIMEOUT * 2)
@pytest.mark.parametrize(
    "reverse_proxy",
    [pytest.param(nginx, id="nginx"), pytest.param(caddy, id="caddy")],
)
async def test_no_call_fails_during_a_rolling_restart(
    aiohttp_server: AiohttpServer, tmp_path: Path, reverse_proxy: ReverseProxy
) -> None:
    need(Path("node"), JS / "node_modules")
    fal = await open_parallel_fal(aiohttp_server)
    async with (
        open_nodes(fal, tmp_path) as nodes,
        reverse_proxy(tmp_path, *(node.port for node in nodes)) as gateway,
    ):
        ended = asyncio.Event()
        running = asyncio.gather(
            *(call_until(ended, client, gateway, tmp_path) for client in CLIENTS)
        )
        while len(fal.accepted) < 2 * len(CLIENTS):
            await asyncio.sleep(0.05)
        exit_codes = []
        for number in range(RESTARTS):
            node = nodes[number % NODES]
            exit_codes.append(await node.stop())
            await node.start()
        ended.set()
        results = [error for result in await running for error in result]
    errors = [error for error in results if error is not None]
    lines = [line for node in nodes for log in node.logs for line in log]
    failed = [line for line in lines if line.get("complete") is False or has_failed(line)]
    assert errors == [], failed
    assert exit_codes == [0] * RESTARTS
    assert len(fal.accepted) == fal.sandbox.jobs == len(results)
