"""Calls of the usage API."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

from tests.support.cli_process import command
from tests.support.key_search import LEAKS


async def usage(*words: str, folder: Path, **env: str) -> tuple[int, str, str]:
    """The exit code of a real process, and what it prints and complains."""
    process = await command("usage", *words, FALPROXY_DATA_DIR=str(folder), **env)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    LEAKS.look((out + err).decode(), "falproxy usage")
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def counted(session: ClientSession, origin: str, **headers: str) -> int:
    query = {"since": "1h", "by": "route", "until": now()}
    async with session.get(f"{origin}/api/usage", params=query, headers=headers) as response:
        calls: int = (await response.json())["totals"]["calls"]
        return calls


def now() -> str:
    """Another word each time, for which no answer is kept."""
    when = datetime.now(UTC) + timedelta(seconds=1)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


async def until(ask: Callable[[], Any], expected: int) -> None:
    """Waits for the ledger, which is written a little later than the answers."""
    async with asyncio.timeout(20):
        while await ask() != expected:
            await asyncio.sleep(0.05)
