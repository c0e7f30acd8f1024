"""The examples of the proxy in FastAPI, Starlette and Django, called with fal's client."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import ClientSession, CookieJar
from aiohttp.test_utils import TestServer
from yarl import URL

from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.support.js_world import JS, check_credentials, need
from tests.support.key_search import CANARY
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow(seconds=10)

EXAMPLES = ROOT / "examples"
TIMEOUT = 60.0  # seconds
PASSWORD = "a-long-example"
UVICORN = ("uvicorn", "main:app", "--fd", "{fd}")
HYPERCORN = ("hypercorn", "asgi:application", "--bind", "fd://{fd}")


async def sign_in(session: ClientSession, origin: str) -> None:
    async with session.post(f"{origin}/login", params={"name": "ada"}) as response:
        assert response.status == 200


async def sign_in_to_django(session: ClientSession, origin: str) -> None:
    url = f"{origin}/admin/login/"
    async with session.get(url) as response:
        field = re.search(r'csrfmiddlewaretoken" value="(\w+)"', await response.text())
        assert field is not None
    form = {"username": "ada", "password": PASSWORD, "csrfmiddlewaretoken": field[1]}
    async with session.post(url, data=form, params={"next": "/admin/"}) as response:
        assert response.url.path == "/admin/"


@dataclass(frozen=True, slots=True)
class Example:
    """name: of its folder. cookie: of its session."""

    name: str
    command: tuple[str, ...]
    sign_in: Callable[[ClientSession, str], Awaitable[None]]
    cookie: str


ALL = (
    Example("fastapi", UVICORN, sign_in, "session"),
    Example("starlette", UVICORN, sign_in, "session"),
    Example("django", HYPERCORN, sign_in_to_django, "sessionid"),
)


def prepare_django(folder: Path, env: dict[str, str]) -> None:
    user = {"DJANGO_SUPERUSER_PASSWORD": PASSWORD, "DJANGO_SUPERUSER_USERNAME": "ada"}
    create = ("createsuperuser", "--no-input", "--email", "ada@example.com")
    for arguments in (("migrate", "--verbosity", "0"), create):
        command = [sys.executable, "-m", "django", *arguments]
        subprocess.run(command, cwd=folder, env=env | user, check=True, capture_output=True)


@asynccontextmanager
async def run_example(example: Example, folder: Path, fal: str) -> AsyncIterator[str]:
    """Start an example. Returns its origin. Afterwards it must stop without an error."""
    env = os.environ | {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal,
        "FALPROXY_DATA_DIR": str(folder / "data"),
        "DJANGO_SETTINGS_MODULE": "settings",
        "PYTHONPATH": os.pathsep.join((str(EXAMPLES / example.name), str(ROOT))),
        "PYTHONWARNINGS": "ignore",
    }
    if example.name == "django":
        prepare_django(folder, env)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [part.format(fd=listener.fileno()) for part in example.command]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *command, cwd=folder, env=env, pass_fds=[listener.fileno()],
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield origin
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(TIMEOUT):
                output, _ = await process.communicate()
        except BaseException:
            process.kill()
            raise
    assert b"Traceback" not in output, output.decode()


async def play(proxy: str, cookie: str) -> object:
    process = await asyncio.create_subprocess_exec(
        "node", str(JS / "mounted.mjs"), env=os.environ | {"PROXY": proxy, "COOKIE": cookie},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(TIMEOUT):
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return json.loads(output)


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.name)
async def test_an_example_serves_fal_s_client_for_its_users(
    example: Example, tmp_path: Path
) -> None:
    need(Path("node"), JS / "node_modules")
    sandbox = Sandbox(speed=50)
    async with TestServer(create_sandbox(sandbox)) as fal:
        sandbox.public_url = f"http://127.0.0.1:{fal.port}"
        async with (
            run_example(example, tmp_path, sandbox.public_url) as origin,
            ClientSession(cookie_jar=CookieJar(unsafe=True)) as session,
        ):
            proxy = f"{origin}/fal/api/fal/proxy"
            headers = {"x-fal-target-url": "https://fal.run/fal-ai/flux/dev"}
            async with session.post(proxy, json={"prompt": "a"}, headers=headers) as response:
                assert response.status == 401
            assert sandbox.seen == []
            await example.sign_in(session, origin)
            cookie = session.cookie_jar.filter_cookies(URL(origin))[example.cookie].value
            result = await play(proxy, f"{example.cookie}={cookie}")
            assert result == {"images": [1, 1, 1], "last": "COMPLETED"}
            async with session.get(f"{origin}/fal/api/usage") as response:
                assert response.status == 200
    for call in sandbox.seen:
        check_credentials(call)
