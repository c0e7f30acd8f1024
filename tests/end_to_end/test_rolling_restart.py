"""Restarts of three nodes, one after the other, under load through a load balancer.

RESTARTS=10 makes as many restarts.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.sandbox import Sandbox, create_app
from tests.support.balancer import Balancer, open_balancer
from tests.support.cache_processes import Fal, folder
from tests.support.cli_process import CliProcess, run_server, start_command
from tests.support.fal_client_world import ROOT, clean_environment
from tests.support.js_world import JS, need
from tests.support.key_search import CANARY
from tests.support.ports import free_port
from tests.support.redis_server import redis_server

pytestmark = pytest.mark.slow

NODES = 3
RESTARTS = int(os.environ.get("RESTARTS", "3"))
CALLS = 25 * RESTARTS  # of each client, ten in a second
ACCESS_KEY = "an-access-key-of-the-proxy"
TIMEOUT = 60.0 + 20.0 * RESTARTS  # seconds
CLIENTS = {
    "py": [sys.executable, str(ROOT / "tests" / "fal_clients" / "subscribe_many.py")],
    "js": ["node", str(JS / "subscribe_many.mjs")],
}


class Node:
    """A proxy with a fixed port."""

    def __init__(self, workers: int, env: dict[str, str]) -> None:
        self.port = free_port()
        self.origin = f"http://127.0.0.1:{self.port}"
        self._arguments = ("serve", "--workers", str(workers), "--port", str(self.port))
        self._env = env
        self._running: asyncio.Task[None] | None = None
        self._process: CliProcess | None = None

    async def start(self) -> None:
        started = asyncio.Event()

        async def run() -> None:
            start = start_command(*self._arguments, CWD=self._env["FALPROXY_DATA_DIR"], **self._env)
            async with run_server(start) as self._process:
                started.set()
                await self._process.process.wait()

        self._running = asyncio.ensure_future(run())
        async with asyncio.timeout(20):
            await started.wait()

    async def stop(self) -> None:
        assert self._process is not None
        assert self._running is not None
        self._process.process.terminate()
        assert await self._process.process.wait() == 0, self._process.log
        await self._running

    async def kill(self) -> None:
        if self._process is not None and self._process.process.returncode is None:
            self._process.process.kill()
        if self._running is not None:
            await self._running


async def run_client(name: str, gateway: str, home: Path) -> list[str | None]:
    """Return the error of each call of a client."""
    values = {"GATEWAY": gateway, "ACCESS_KEY": ACCESS_KEY, "CALLS": str(CALLS), "SHARED_BY": "0"}
    process = await asyncio.create_subprocess_exec(
        *CLIENTS[name],
        env=clean_environment() | values | {"PYTHONPATH": str(ROOT), "HOME": str(home)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT):
        output, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    errors: list[str | None] = json.loads(output)
    return errors


@asynccontextmanager
async def open_nodes(
    fal: Fal, tmp_path: Path, workers: int
) -> AsyncIterator[tuple[list[Node], str, Balancer]]:
    with redis_server() as redis:
        env = {
            "FAL_KEY": CANARY,
            "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
            "FALPROXY_ACCESS_KEYS": f"ann:{ACCESS_KEY}",
            "FALPROXY_STOP_DELAY": "1",
            "FALPROXY_DRAIN": "10",
            "REDIS_URL": redis.url,
        }
        nodes = [
            Node(workers, env | {"FALPROXY_DATA_DIR": folder(tmp_path, f"node-{number}")})
            for number in range(NODES)
        ]
        try:
            for node in nodes:
                await node.start()
            origins = [node.origin for node in nodes]
            async with open_balancer(*origins, checks_health=True) as (gateway, balancer):
                yield nodes, gateway, balancer
        finally:
            for node in nodes:
                await node.kill()


async def until_ready(node: Node, session: ClientSession) -> None:
    async with session.get(f"{node.origin}/health/ready") as response:
        assert response.status == 200
    await asyncio.sleep(0.3)  # the balancer sees it too


@pytest.mark.timeout(TIMEOUT * 2)
@pytest.mark.parametrize("workers", [1, 2])
async def test_no_call_fails_during_a_rolling_restart(
    aiohttp_server: AiohttpServer, tmp_path: Path, workers: int
) -> None:
    need(Path("node"), JS / "node_modules")
    fal = Fal()
    fal.sandbox = Sandbox(speed=100.0, runners=1000)
    app = create_app(fal.sandbox)
    app.on_response_prepare.append(fal.on_response)
    server = await aiohttp_server(app)
    fal.origin = fal.sandbox.public_url = f"http://127.0.0.1:{server.port}"
    async with open_nodes(fal, tmp_path, workers) as (nodes, gateway, balancer):
        running = asyncio.gather(*(run_client(name, gateway, tmp_path) for name in CLIENTS))
        while len(fal.accepted) < 4:
            await asyncio.sleep(0.05)
        async with ClientSession() as session:
            for number in range(RESTARTS):
                node = nodes[number % NODES]
                await node.stop()
                await node.start()
                await until_ready(node, session)
        is_loaded = not running.done()
        errors = [error for result in await running for error in result if error is not None]
        assert errors == []
        assert balancer.failures == []
        assert fal.sandbox.jobs == 2 * CALLS
        assert is_loaded, "the calls ended before the restarts"
