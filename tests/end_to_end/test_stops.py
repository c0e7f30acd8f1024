"""Processes that are stopped while their stores are dead, frozen, closing or locked.

STOPS=100 makes as many stops.
"""

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path

import pytest
from aiohttp import ClientSession
from aiohttp.pytest_plugin import AiohttpServer

from tests.support.cache_processes import Fal, folder, open_client, open_fal, serving
from tests.support.cli_process import CliProcess
from tests.support.key_search import CANARY
from tests.support.redis_server import redis_server
from tests.support.tcp_servers import stay_silent, tcp_server

STOPS = int(os.environ.get("STOPS", "9"))
CONCURRENCY = 4
DRAIN = 1.0  # seconds
STOP_MAX = DRAIN + 5.0  # seconds
MODEL = "fal-ai/flux/dev"
SUBMIT = f"https://queue.fal.run/{MODEL}"
ACCESS_KEY = "an-access-key-of-the-proxy"
LOCKED_FILES = ("results.sqlite", "submissions.sqlite", "ledger.sqlite")

Environment = dict[str, str]
# Contexts: yield the environment of a process, and a function that begins the fault.
Fault = Callable[[Path], AbstractAsyncContextManager[tuple[Environment, Callable[[], None]]]]


@asynccontextmanager
async def dead_redis(data: Path) -> AsyncIterator[tuple[Environment, Callable[[], None]]]:
    with redis_server() as server:
        yield {"REDIS_URL": server.url}, server.kill


@asynccontextmanager
async def frozen_redis(data: Path) -> AsyncIterator[tuple[Environment, Callable[[], None]]]:
    with redis_server() as server:
        yield {"REDIS_URL": server.url}, server.freeze


@asynccontextmanager
async def closing_redis(data: Path) -> AsyncIterator[tuple[Environment, Callable[[], None]]]:
    """A server that closes each connection as soon as it is open."""

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with tcp_server(close) as port:
        yield {"REDIS_URL": f"redis://127.0.0.1:{port}"}, lambda: None


@asynccontextmanager
async def silent_redis(data: Path) -> AsyncIterator[tuple[Environment, Callable[[], None]]]:
    async with tcp_server(stay_silent) as port:
        yield {"REDIS_URL": f"redis://127.0.0.1:{port}"}, lambda: None


@asynccontextmanager
async def silent_postgres(data: Path) -> AsyncIterator[tuple[Environment, Callable[[], None]]]:
    async with tcp_server(stay_silent) as port:
        yield {"DATABASE_URL": f"postgresql://user:pw@127.0.0.1:{port}/db"}, lambda: None


@asynccontextmanager
async def silent_supabase(data: Path) -> AsyncIterator[tuple[Environment, Callable[[], None]]]:
    async with tcp_server(stay_silent) as port:
        url = f"http://127.0.0.1:{port}"
        yield {"SUPABASE_URL": url, "SUPABASE_KEY": "sb_secret_of_a_test"}, lambda: None


@asynccontextmanager
async def locked_files(data: Path) -> AsyncIterator[tuple[Environment, Callable[[], None]]]:
    connections: list[sqlite3.Connection] = []

    def lock() -> None:
        for name in LOCKED_FILES:
            connections.append(sqlite3.connect(data / name, isolation_level=None))
            connections[-1].execute("BEGIN IMMEDIATE")

    yield {}, lock
    for connection in connections:
        with closing(connection):
            connection.execute("ROLLBACK")


FAULTS: list[Fault] = [
    dead_redis,
    frozen_redis,
    closing_redis,
    silent_redis,
    silent_postgres,
    silent_supabase,
    locked_files,
]


async def seconds_to_stop(process: CliProcess) -> float:
    started = time.monotonic()
    process.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        await process.process.wait()
    return time.monotonic() - started


async def stop_during_fault(fault: Fault, data: Path, fal: Fal, number: int) -> float:
    """Return the seconds of one stop. Some stops come right after the fault, others later, and
    calls are in progress."""
    async with fault(data) as (environment, begin), open_client() as session:
        common = {
            "FAL_KEY": CANARY,
            "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
            "FALPROXY_CACHE_ENDPOINTS": MODEL,
            "FALPROXY_ACCESS_KEYS": f"ann:{ACCESS_KEY}",
            "FALPROXY_DRAIN": str(DRAIN),
        }
        async with serving(FALPROXY_DATA_DIR=str(data), **common, **environment) as process:
            await submit(session, process, f"before {number}")
            begin()
            late = [
                asyncio.ensure_future(submit(session, process, f"{number} after {at}"))
                for at in range(3)
            ]
            await asyncio.sleep(0.15 * (number % 12))
            seconds = await seconds_to_stop(process)
            await asyncio.gather(*late, return_exceptions=True)
    return seconds


async def submit(session: ClientSession, process: CliProcess, prompt: str) -> None:
    body = {"prompt": prompt, "image_size": {"width": 64, "height": 64}}
    headers = {"x-fal-target-url": SUBMIT, "x-falproxy-key": ACCESS_KEY}
    url = f"{process.origin}/api/fal/proxy"
    async with session.post(url, json=body, headers=headers) as response:
        await response.read()


@pytest.mark.timeout(900)
async def test_every_stop_ends(aiohttp_server: AiohttpServer, tmp_path: Path) -> None:
    fal = await open_fal(aiohttp_server)
    slots = asyncio.Semaphore(CONCURRENCY)
    longest: dict[str, float] = {}

    async def stop(number: int) -> None:
        fault = FAULTS[number % len(FAULTS)]
        async with slots:
            data = Path(folder(tmp_path, f"stop-{number}"))
            seconds = await stop_during_fault(fault, data, fal, number)
        longest[fault.__name__] = max(longest.get(fault.__name__, 0.0), seconds)

    await asyncio.gather(*map(stop, range(STOPS)))
    print(f"{STOPS} stops, the longest: { ({k: round(v, 2) for k, v in longest.items()}) }")
    assert max(longest.values()) < STOP_MAX
