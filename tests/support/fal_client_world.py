"""The proxy with the sandbox behind it, and processes that run fal's Python client."""

import asyncio
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from PIL import Image

import falproxy
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.sandbox.state import SeenRequest
from tests.support.empty_ledger import with_empty_ledger
from tests.support.js_world import World, need, origin_of
from tests.support.key_search import CANARY, SECRET
from tests.support.settings import make_settings
from tests.support.urls import PROXY

ROOT = Path(__file__).parent.parent.parent
SCENARIOS = ROOT / "tests" / "fal_clients" / "scenarios.py"
OLDEST = "1.0.0"
# `make` installs the oldest fal_client here. The newest is in the environment.
OLDEST_PATH = Path(sys.prefix) / "fal_client" / OLDEST
SCENARIO_TIMEOUT = 90.0  # seconds, for a slow machine
# FAL_KEY of the client's environment. It must never leave the client's process.
CLIENT_KEY = "client-id:client-secret"
# Runs a scenario by name and returns its result.
RunScenario = Callable[..., Coroutine[Any, Any, Any]]


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables of fal and falproxy."""
    return {name: value for name, value in os.environ.items() if "FAL" not in name}


@dataclass(slots=True)
class ScenarioProcess:
    """A process that runs scenarios with one version of fal_client."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, version: str, home: Path, **env: str) -> Self:
        """version: `oldest` or `newest`."""
        path = OLDEST_PATH if version == "oldest" else None
        if path is not None:
            need(path)
        paths = [str(directory) for directory in (path, ROOT) if directory]
        process = subprocess.Popen(
            [sys.executable, str(SCENARIOS)],
            env={
                **clean_environment(),
                **env,
                "PYTHONPATH": os.pathsep.join(paths),
                "HOME": str(home),
            },
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return cls(process)

    def run(self, command: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        assert SECRET not in line
        output = json.loads(line)
        assert "error" not in output, output["error"]
        return output["result"]

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True, slots=True)
class ClientWorld(World):
    """A world with a record of the requests to the proxy, in order."""

    proxy_requests: list[web.Request] = field(default_factory=list)


@asynccontextmanager
async def open_world(**options: Any) -> AsyncIterator[ClientWorld]:
    """Start a proxy and a sandbox. At the end, check the credentials of all requests.

    options: settings of the proxy.
    """
    sandbox = Sandbox(speed=50)
    proxy_requests: list[web.Request] = []

    @web.middleware
    async def record(request: web.Request, handler: Any) -> Any:
        proxy_requests.append(request)
        return await handler(request)

    app = web.Application(middlewares=[record], handler_args={"handler_cancellation": True})
    async with TestServer(create_sandbox(sandbox)) as fal:
        settings = make_settings(fal_key=CANARY, upstream_origin=origin_of(fal), **options)
        falproxy.setup(app, with_empty_ledger(settings), prefix="/ai")
        async with TestServer(app) as gateway, ClientSession() as session:
            sandbox.public_url = origin_of(fal)
            yield ClientWorld(
                f"{origin_of(gateway)}/ai", origin_of(fal), sandbox, session, proxy_requests
            )
    for call in sandbox.seen:
        check_credentials(call)
    for request in proxy_requests:
        check_request(request)


def check_credentials(call: SeenRequest) -> None:
    """Check a request to fal: the proxy's key, or a token for files and sockets; no other key."""
    keys = call.headers.getall("Authorization", [])
    if call.host.startswith("127.0.0.1"):
        assert [key.partition(" ")[0] for key in keys] in ([], ["Bearer"]), call.path
    else:
        is_public = "fal_jwt_token=" in call.query or call.path.endswith("/openapi.json")
        assert keys == ([] if is_public else [f"Key {CANARY}"]), call.path
    assert "client-secret" not in str(call.headers), call.path
    assert "x-falproxy-key" not in call.headers, call.path


def check_request(request: web.Request) -> None:
    """Check a request to the proxy: a target, the client's headers, and no fal key."""
    assert request.path == f"/ai{PROXY}"
    assert request.headers["x-fal-target-url"].startswith("https://")
    assert request.headers["Host"] == f"127.0.0.1:{request.url.port}"
    assert request.headers["User-Agent"].startswith("fal-client/1.")
    assert "Authorization" not in request.headers
    assert "client-" not in str(request.headers).replace("fal-client/", "")


def scenario_runner(
    process: ScenarioProcess, kind: str, proxy: str, key: str | None = None
) -> RunScenario:
    """Return a function that runs scenarios with one kind of client.

    kind: a key of `CLIENTS` in scenarios.py.
    proxy, key: arguments of the client, or of `install`.
    """

    async def run_scenario(
        scenario: str, /, *, env: dict[str, str] | None = None, loops: int = 1, **options: Any
    ) -> Any:
        command = {
            "scenario": scenario,
            "kind": kind,
            "proxy": options.pop("proxy", proxy),
            "key": options.pop("key", key),
            "env": env or {},
            "loops": loops,
            "options": options,
        }
        try:
            async with asyncio.timeout(SCENARIO_TIMEOUT):
                return await asyncio.to_thread(process.run, command)
        except TimeoutError:
            process.stop()
            raise

    return run_scenario


@cache
def photo() -> bytes:
    """Return a PNG of noise, 350 KB."""
    file = io.BytesIO()
    Image.frombytes("RGB", (400, 300), random.Random(1).randbytes(400 * 300 * 3)).save(file, "PNG")
    return file.getvalue()
