"""The faults. Each is a context: it begins, lasts for some seconds, and is repaired at the end."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from random import Random

from tests.support.fake_supabase.faults import close_connection, delay
from tests.support.faults.cluster import Cluster, hand_over, replicate, until_replicated
from tests.support.proxy_node import send_signal

Fault = Callable[[Cluster, Random], AbstractAsyncContextManager[None]]
FREEZE_SECONDS = (0.5, 4.0)
AWAY_SECONDS = (0.5, 3.0)
FAL_DELAY = 1.5  # seconds
STORAGE_DELAY = 4.0
ANY_NUMBER = 1_000_000
RESTART_SECONDS = 1.0


async def last(random: Random, seconds: tuple[float, float] = AWAY_SECONDS) -> None:
    await asyncio.sleep(random.uniform(*seconds))


@asynccontextmanager
async def no_fault(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def killed_worker(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    if workers := random.choice(cluster.nodes).worker_pids:
        send_signal(random.choice(workers), signal.SIGKILL)
    yield


@asynccontextmanager
async def killed_supervisor(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    node = random.choice(cluster.nodes)
    await node.kill_supervisor()
    yield
    await node.start()


@asynccontextmanager
async def killed_node(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    node = random.choice(cluster.nodes)
    await node.kill()
    yield
    await asyncio.sleep(RESTART_SECONDS)
    await node.start()


@asynccontextmanager
async def restarted_node(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    node = random.choice(cluster.nodes)
    assert await node.stop() == 0, node.logs[-1][-5:]
    yield
    await node.start()


@asynccontextmanager
async def frozen_worker(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    workers = random.choice(cluster.nodes).worker_pids
    frozen = random.sample(workers, min(1, len(workers)))
    async with frozen_processes(frozen, random):
        yield


@asynccontextmanager
async def frozen_node(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    node = random.choice(cluster.nodes)
    async with frozen_processes([node.supervisor, *node.worker_pids], random):
        yield


@asynccontextmanager
async def frozen_processes(pids: list[int], random: Random) -> AsyncIterator[None]:
    for pid in pids:
        send_signal(pid, signal.SIGSTOP)
    try:
        await last(random, FREEZE_SECONDS)
        yield
    finally:
        for pid in pids:
            send_signal(pid, signal.SIGCONT)


@asynccontextmanager
async def frozen_redis(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    cluster.redis[0].freeze()
    try:
        await last(random, FREEZE_SECONDS)
        yield
    finally:
        cluster.redis[0].thaw()


@asynccontextmanager
async def redis_failover(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    """The replica becomes the primary, and the old one its replica: open connections stay."""
    old, new = cluster.redis
    await hand_over(old, new)
    await last(random)
    cluster.redis_address.target = new.port
    cluster.redis.reverse()
    yield


@asynccontextmanager
async def killed_redis(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    """The primary is killed, its replica becomes the primary, and gets a new replica."""
    old, new = cluster.redis
    await until_replicated(new)
    old.kill()
    await last(random)
    replicate(new, None)
    cluster.redis_address.target = new.port
    cluster.redis.reverse()
    yield
    old.start()
    replicate(old, new)


@asynccontextmanager
async def frozen_postgres(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    with cluster.postgres.frozen():
        await last(random, FREEZE_SECONDS)
        yield


@asynccontextmanager
async def restarted_postgres(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    cluster.postgres.stop()
    await last(random)
    await asyncio.to_thread(cluster.postgres.start)
    yield


@asynccontextmanager
async def slow_storage(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    if cluster.storage is not None:
        cluster.storage.fail(delay(STORAGE_DELAY), 30)
        await last(random)
    yield


@asynccontextmanager
async def broken_storage(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    if cluster.storage is not None:
        cluster.storage.fail(close_connection, 20)
        await last(random)
    yield


@asynccontextmanager
async def full_disk(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    if not cluster.has_small_disk:
        yield
        return
    ballast = cluster.data / "ballast"
    fill(ballast)
    try:
        await last(random, FREEZE_SECONDS)
        yield
    finally:
        ballast.unlink()


def fill(ballast: Path) -> None:
    """Write a file until no space is left."""
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    os.write(descriptor, bytes(size))
            except OSError:  # no space left
                continue
    finally:
        os.close(descriptor)


@asynccontextmanager
async def slow_fal(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    cluster.fal.delay = FAL_DELAY
    try:
        await last(random)
        yield
    finally:
        cluster.fal.delay = 0.0


@asynccontextmanager
async def lost_responses(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    cluster.fal.loses_responses = True
    try:
        await last(random)
        yield
    finally:
        cluster.fal.loses_responses = False


@asynccontextmanager
async def refusing_fal(cluster: Cluster, random: Random) -> AsyncIterator[None]:
    cluster.fal.is_refusing = True
    try:
        await last(random)
        yield
    finally:
        cluster.fal.is_refusing = False


# By their names in the report. Those of the disk and of Supabase are for clusters that use it.
FAULTS: Mapping[str, Fault] = {
    "none": no_fault,
    "a worker is killed": killed_worker,
    "a supervisor is killed": killed_supervisor,
    "a node is killed": killed_node,
    "a node is restarted by SIGTERM": restarted_node,
    "a worker is frozen": frozen_worker,
    "a node is frozen": frozen_node,
    "Redis is frozen": frozen_redis,
    "Redis: planned failover": redis_failover,
    "Redis is killed, and fails over": killed_redis,
    "PostgreSQL is frozen": frozen_postgres,
    "PostgreSQL is restarted": restarted_postgres,
    "Supabase is slow": slow_storage,
    "Supabase closes connections": broken_storage,
    "the disk is full": full_disk,
    "fal is slow": slow_fal,
    "fal's responses are lost": lost_responses,
    "fal refuses calls": refusing_fal,
}
ONLY_SUPABASE = {"Supabase is slow", "Supabase closes connections"}
ONLY_DISK = {"the disk is full"}


def names(*, uses_disk: bool) -> list[str]:
    """Return the faults of a cluster with outputs on the disk, or in Supabase."""
    return [name for name in FAULTS if name not in (ONLY_SUPABASE if uses_disk else ONLY_DISK)]
