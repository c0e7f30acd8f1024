"""Usage reports of a running proxy and of the command."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

from tests.support.cli_process import start_command
from tests.support.key_search import LEAKS


async def run_usage(*arguments: str, folder: Path, **env: str) -> tuple[int, str, str]:
    """Run the command. Return its exit code, output and error output."""
    process = await start_command("usage", *arguments, FALPROXY_DATA_DIR=str(folder), **env)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    LEAKS.search((out + err).decode(), "falproxy usage")
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def count_calls(session: ClientSession, origin: str, **headers: str) -> int:
    query = {"since": "1h", "by": "route", "until": now()}
    async with session.get(f"{origin}/api/usage", params=query, headers=headers) as response:
        calls: int = (await response.json())["totals"]["calls"]
        return calls


def now() -> str:
    """Return a different text each time, for which no report is cached."""
    when = datetime.now(UTC) + timedelta(seconds=1)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


async def wait_until_equal(read: Callable[[], Any], expected: int) -> None:
    """Wait for the ledger, which is written after the responses."""
    async with asyncio.timeout(20):
        while await read() != expected:
            await asyncio.sleep(0.05)
