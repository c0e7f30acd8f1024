"""Requests to the usage API, and `falproxy usage`."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

from tests.support.cli_process import command
from tests.support.key_search import LEAKS


async def usage(*arguments: str, folder: Path, **env: str) -> tuple[int, str, str]:
    """Run `falproxy usage`; returns its exit code, standard output and standard error."""
    process = await command("usage", *arguments, FALPROXY_DATA_DIR=str(folder), **env)
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
    """Return a time that differs for each call, so that no cached response is used."""
    soon = datetime.now(UTC) + timedelta(seconds=1)
    return soon.isoformat(timespec="microseconds").replace("+00:00", "Z")


async def until(count: Callable[[], Any], expected: int) -> None:
    """Wait for the ledger, which is written shortly after the responses are sent."""
    async with asyncio.timeout(20):
        while await count() != expected:
            await asyncio.sleep(0.05)
