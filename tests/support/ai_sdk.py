"""The proxy with the sandbox behind it, for the AI SDK in Node."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession
from aiohttp.test_utils import TestServer

from falproxy import create_app
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.support.empty_ledger import with_empty_ledger
from tests.support.js_world import (
    PLAY_TIMEOUT,
    World,
    check_credentials,
    origin_of,
)
from tests.support.key_search import CANARY, SECRET
from tests.support.settings import make_settings

ACCESS_SECRET = "s3cret"
LOCKED = (("web", ACCESS_SECRET),)


@asynccontextmanager
async def open_proxy(data_dir: Path, **given: Any) -> AsyncIterator[World]:
    """Start a proxy with these settings and a sandbox behind it.

    At exit all calls to fal are checked: they have the proxy's key and no other.
    """
    sandbox = Sandbox(speed=50)
    async with TestServer(create_sandbox(sandbox)) as fal, ClientSession() as session:
        sandbox.public_url = origin_of(fal)
        settings = make_settings(
            fal_key=CANARY, upstream_origin=origin_of(fal), data_dir=data_dir, **given
        )
        async with TestServer(create_app(with_empty_ledger(settings))) as gateway:
            yield World(origin_of(gateway), origin_of(fal), sandbox, session)
    for call in sandbox.seen:
        check_credentials(call)
        assert ACCESS_SECRET not in str(call.headers), f"{call.method} {call.path}"


async def run(*command: str, given: str = "", **environment: str) -> str:
    """Run a command with `given` as its input and return its output.

    Asserts that it succeeds and that its output does not contain fal's key.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PLAY_TIMEOUT):
            output, errors = await process.communicate(given.encode())
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, errors.decode()
    assert SECRET not in output.decode() + errors.decode()
    return output.decode()
