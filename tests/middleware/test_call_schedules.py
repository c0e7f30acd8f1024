"""Equal calls over several processes, in generated schedules: which are sent, and how all end.

Leaders fail, lose fal's response, die, and are left by their clients; the store has outages. fal's
side counts the calls. A failing schedule is printed with its seed; `SCHEDULE_SEED=<seed>` plays
only that one.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import pytest

from falproxy.stores.cache import CacheStore
from falproxy.stores.cache.redis import RedisStore
from falproxy.stores.cache.sqlite import SqliteStore
from tests.support.call_schedules import Play, generate
from tests.support.redis_server import RedisServer, redis_server
from tests.support.virtual_time import run_in_virtual_time

pytestmark = pytest.mark.slow

SEED = os.environ.get("SCHEDULE_SEED")
SQLITE_SCHEDULES, REDIS_SCHEDULES = 1600, 400
CHUNK = 200
CONCURRENT = 40
PROCESSES = 3


def seeds(start: int, count: int) -> list[int]:
    return [int(SEED)] if SEED else [*range(start, start + count)]


CHUNKS = [0] if SEED else [*range(0, SQLITE_SCHEDULES, CHUNK)]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.mark.parametrize("first_seed", CHUNKS)
def test_equal_calls_are_sent_once_over_sqlite(first_seed: int, tmp_path: Path) -> None:
    """In virtual time, so that a seed always plays the same."""
    file = tmp_path / "results.sqlite"

    async def play_all() -> list[str]:
        loop, started = asyncio.get_running_loop(), time.time()

        def clock() -> float:
            return started + loop.time()

        reports = []
        async with AsyncExitStack() as stack:
            stores = [
                await stack.enter_async_context(SqliteStore(file, max_size=2**20, clock=clock))
                for _ in range(PROCESSES)
            ]
            for seed in seeds(first_seed, CHUNK):
                play = Play(generate(seed), stores, f"schedule {seed}", lease=4.0)
                if await play.run():
                    reports.append(play.report())
        return reports

    reports = run_in_virtual_time(play_all())
    assert not reports, "\n".join(reports)


async def test_equal_calls_are_sent_once_over_redis(server: RedisServer) -> None:
    """In real time. Schedules with a fault are played again alone, since a busy machine may exceed
    the lease, which is short here."""
    slots = asyncio.Semaphore(CONCURRENT)
    async with AsyncExitStack() as stack:
        prefix = f"{uuid4()}:"
        stores: list[CacheStore] = [
            await stack.enter_async_context(RedisStore(server.url, prefix=prefix))
            for _ in range(PROCESSES)
        ]

        async def play(seed: int, attempt: int) -> Play:
            schedule = generate(seed, has_outages=False, kill_share=0.1)
            played = Play(schedule, stores, f"{seed} {attempt}", lease=1.5, scale=0.12)
            played.slack, played.lookup_time = 0.5, 0.1
            async with slots:
                await played.run()
            return played

        first = await asyncio.gather(*(play(seed, 1) for seed in seeds(0, REDIS_SCHEDULES)))
        again = [await play(played.schedule.seed, 2) for played in first if played.faults]
    reports = [played.report() for played in again if played.faults]
    assert not reports, "\n".join(reports)
