"""Three nodes with two workers each, and the servers that they use."""

import asyncio
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from tests.support.fake_supabase import FakeSupabase
from tests.support.faults.counting_fal import CountingFal
from tests.support.key_search import CANARY
from tests.support.postgres_server import PostgresServer, postgres_server
from tests.support.proxy_node import ProxyNode
from tests.support.redis_server import PROCESSES, RedisServer, redis_server
from tests.support.tcp_forwarder import TcpForwarder

NODES, WORKERS = 3, 2
CALLERS = ("ann", "bob", "cy", "dee")
BUCKET = "fal_images"
DISK_SIZE = "256m"  # of the file system with the data of all nodes
DRAIN, STOP_DELAY = "8", "1"
SYNC_TIMEOUT = 60.0  # seconds


def access_key(caller: str) -> str:
    return f"{caller}-has-an-access-key-of-the-proxy"


@dataclass
class Cluster:
    """The parts of a cluster, which faults are applied to.

    redis: the servers, the current one first; the others are its replicas.
    redis_address: where nodes connect to.
    data: the folder of all nodes, on a small file system if `has_small_disk`.
    storage: of outputs, which the disk is if it is None.
    """

    fal: CountingFal
    nodes: list[ProxyNode]
    redis: list[RedisServer]
    redis_address: TcpForwarder
    postgres: PostgresServer
    storage: FakeSupabase | None
    data: Path
    has_small_disk: bool

    def broken_files(self) -> int:
        """Return how many stored files have not the content that their name stands for."""
        if self.storage is None:
            paths = [path for path in (self.data / "files").glob("*") if path.is_file()]
            files = [(path.name, path.read_bytes()) for path in paths]
        else:
            buckets = self.storage.buckets
            objects = buckets[BUCKET].objects if BUCKET in buckets else {}
            files = [(name, found.content) for name, found in objects.items()]
        return sum(
            Path(name).stem != hashlib.sha256(content).hexdigest()
            for name, content in files
            if len(Path(name).stem) == 64
        )

    async def until_written(self) -> None:
        """Wait until each worker has reported that all of its entries are in Redis."""
        began = time.time()
        with Redis(port=self.redis[0].port) as client:
            async with asyncio.timeout(SYNC_TIMEOUT):
                while client.zcount(PROCESSES, began, "+inf") < self._count_workers():
                    await asyncio.sleep(0.05)

    def _count_workers(self) -> int:
        return sum(len(node.worker_pids) for node in self.nodes if node.is_running)

    def log_lines(self, request_id: str) -> list[str]:
        """Return the log lines about a request of all nodes, in order, with the number of the node
        and of its process."""
        found = [
            (str(line["time"]), f"node {at}.{run}: {json.dumps(line)}")
            for at, node in enumerate(self.nodes)
            for run, log in enumerate(node.logs)
            for line in log
            if request_id in line.values()
        ]
        return [text for _, text in sorted(found)]

    def exceptions(self) -> list[str]:
        """Return each exception in the logs of the nodes, and how often it was logged."""
        lines = (line for node in self.nodes for log in node.logs for line in log)
        found = Counter(f"{x['message']}\n{x['exception']}" for x in lines if "exception" in x)
        return [f"{count} x {text}" for text, count in found.most_common()]


@asynccontextmanager
async def open_cluster(seed: int, *, uses_disk: bool) -> AsyncIterator[Cluster]:
    """Context: a cluster that accepts calls.

    uses_disk: outputs are stored on the disk that all nodes share, otherwise in Supabase.
    """
    async with AsyncExitStack() as stack:
        # A replica copies all data at once, and not after the default of 5 s.
        first, second = (
            stack.enter_context(redis_server(repl_diskless_sync_delay="0")) for _ in range(2)
        )
        replicate(second, first)
        address = await stack.enter_async_context(TcpForwarder(first.port).running())
        postgres = stack.enter_context(postgres_server())
        fal = await stack.enter_async_context(CountingFal(seed).running())
        storage = None if uses_disk else await stack.enter_async_context(FakeSupabase())
        data, has_small_disk = stack.enter_context(data_folder())
        env = {
            "FAL_KEY": CANARY,
            "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
            "FALPROXY_ACCESS_KEYS": ",".join(f"{name}:{access_key(name)}" for name in CALLERS),
            "FALPROXY_STOP_DELAY": STOP_DELAY,
            "FALPROXY_DRAIN": DRAIN,
            "FALPROXY_REHOST": "disk" if storage is None else "supabase",
            "REDIS_URL": address.url,
            "DATABASE_URL": postgres.url,
            "FALPROXY_ADMINS": CALLERS[0],
        }
        if storage is not None:
            env |= {"SUPABASE_URL": storage.url, "SUPABASE_KEY": storage.service_key}
        nodes = [ProxyNode(data, WORKERS, **env) for _ in range(NODES)]
        for node in nodes:
            node.env["FALPROXY_PUBLIC_URL"] = node.origin
            stack.push_async_callback(node.kill)
            await node.start()
        yield Cluster(fal, nodes, [first, second], address, postgres, storage, data, has_small_disk)


@contextmanager
def data_folder() -> Iterator[tuple[Path, bool]]:
    """Context: a folder, and whether it is on a small file system, which only root can mount."""
    with tempfile.TemporaryDirectory(prefix="falproxy-faults-") as name:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "falproxy-faults", name]
        is_mounted = (
            os.geteuid() == 0
            and subprocess.run(mount, check=False, capture_output=True).returncode == 0
        )
        try:
            yield Path(name), is_mounted
        finally:
            if is_mounted:
                subprocess.run(["umount", "--lazy", name], check=True)


def replicate(replica: RedisServer, primary: RedisServer | None) -> None:
    """Make a server a replica; a primary of its own if there is none."""
    address = ["127.0.0.1", str(primary.port)] if primary is not None else ["NO", "ONE"]
    with Redis(port=replica.port) as client:
        client.execute_command("REPLICAOF", *address)


async def until_replicated(replica: RedisServer) -> None:
    """Wait until a replica has all data of its primary: others are no candidates for a failover."""
    with Redis(port=replica.port) as client:
        async with asyncio.timeout(SYNC_TIMEOUT):
            while client.info("replication").get("master_link_status") != "up":
                await asyncio.sleep(0.02)


async def hand_over(old: RedisServer, new: RedisServer) -> None:
    """Exchange a primary and its replica without losing writes."""
    await until_replicated(new)
    with Redis(port=old.port) as client:
        client.execute_command("FAILOVER", "TO", "127.0.0.1", str(new.port), "TIMEOUT", "10000")
        async with asyncio.timeout(SYNC_TIMEOUT):
            while client.info("replication")["role"] != "slave":
                await asyncio.sleep(0.02)
