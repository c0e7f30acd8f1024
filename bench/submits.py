"""CPU time of a submit with limits, ownership, ledger and idempotency, beside one without them.

Run it with `make bench`. Each variant is a process of `falproxy serve` on a free port of its own;
this process is client and fal. The variants take turns. `REDIS_URL` adds limits and records in
Redis. Arguments: the root folders of other checkouts to compare with, if any.
"""

import asyncio
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from uuid import uuid4

import uvloop

ROUNDS = 5
CONNECTIONS = 64
CALLS = 1500  # of a round with all connections
SINGLE_CALLS = 100  # of a round, one after the other
SECRET = "secret-of-the-bench-that-is-long-enough"
TARGET = "https://queue.fal.run/fal-ai/flux/dev"
BODY = b'{"prompt": "' + b"a lighthouse at dusk, " * 43 + b'", "image_size": "square_hd"}'
IDS = count()
START_SECONDS = 20.0

OWNERSHIP = {"FALPROXY_ACCESS_KEYS": f"bench:{SECRET}"}
LIMITS = {
    "FALPROXY_RATE_LIMIT": "900000000/day",
    "FALPROXY_BUDGET": "100000000/day",
    "FALPROXY_TOTAL_BUDGET": "100000000/day",
}


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    env: dict[str, str] = field(default_factory=dict)
    has_idempotency_key: bool = False
    package: Path = Path(__file__).parent.parent


@dataclass(slots=True)
class Running:
    """A variant's process, and its figures of each round.

    cpu: microseconds of all threads for a submit; loop: those of the event loop's thread.
    rates: submits per second. single: milliseconds of one submit alone.
    """

    variant: Variant
    pid: int
    port: int
    cpu: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)


RUNNING = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 24\r\n\r\n"
RUNNING += b'{"status":"IN_PROGRESS"}'


class Fal(asyncio.Protocol):
    """Accepts each job, as fal's queue does."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (size := message_size(self.received)) and len(self.received) >= size:
            method, self.received = self.received[:4], self.received[size:]
            if method == b"GET ":  # the proxy asks whether a job runs
                self.transport.write(RUNNING)
                continue
            request_id = f"7e2f0b8a-0001-4000-8000-{next(IDS):012}"
            root = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}"
            document = {"status": "IN_QUEUE", "request_id": request_id, "queue_position": 0}
            document |= {"status_url": f"{root}/status", "response_url": root}
            body = json.dumps(document | {"cancel_url": f"{root}/cancel"}).encode()
            head = f"HTTP/1.1 200 OK\r\nx-fal-request-id: {request_id}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)


class Client(asyncio.Protocol):
    """Sends submits one after the other."""

    def __init__(self, variant: Variant) -> None:
        self.received = b""
        self.head = (
            f"POST /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\nx-fal-target-url: {TARGET}\r\n"
        )
        self.head += "user-agent: fal-client/1.0 (python)\r\ncontent-type: application/json\r\n"
        self.head += f"x-falproxy-key: {SECRET}\r\ncontent-length: {len(BODY)}\r\n"
        self.has_key = variant.has_idempotency_key

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if not self.response.done():
            self.response.set_exception(ConnectionError("the proxy closed a connection"))

    def data_received(self, data: bytes) -> None:
        self.received += data
        if (size := message_size(self.received)) and len(self.received) >= size:
            received, self.received = self.received, b""
            self.response.set_result(received)

    async def submit(self) -> None:
        self.response = asyncio.get_running_loop().create_future()
        key = f"idempotency-key: {uuid4()}\r\n" if self.has_key else ""
        self.transport.write(f"{self.head}{key}\r\n".encode() + BODY)
        response = await self.response
        if not response.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(response.decode())


def message_size(data: bytes) -> int | None:
    """Return the length of the first message with a `Content-Length`; None if its head is
    incomplete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    at = data[:end].lower().find(b"\ncontent-length:")
    if at < 0:
        return end + 4
    return end + 4 + int(data[at + 16 : end].partition(b"\r")[0])


@asynccontextmanager
async def running(variant: Variant, fal_port: int) -> AsyncIterator[Running]:
    """Context: the process of a variant."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        env = {"PATH": os.environ["PATH"], "FAL_KEY": "a:b", "FALPROXY_DATA_DIR": folder}
        env |= {"FALPROXY_UPSTREAM_ORIGIN": f"http://127.0.0.1:{fal_port}"}
        env |= {"PYTHONPATH": str(variant.package)} | variant.env
        with (Path(folder) / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "falproxy", "serve", "--port", str(port)),
                cwd=folder, env=env, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            await wait_until_open(port)
            yield Running(variant, process.pid, port)
        finally:
            process.terminate()
            await process.wait()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


async def wait_until_open(port: int) -> None:
    async with asyncio.timeout(START_SECONDS):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return


def cpu_times(pid: int) -> tuple[float, float]:
    """Return microseconds of CPU time of all threads of a process, and of its first thread."""
    tasks = Path("/proc") / str(pid) / "task"
    times = {
        int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e3
        for task in tasks.iterdir()
    }
    return sum(times.values()), times[pid]


async def measure(it: Running) -> None:
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: Client(it.variant), "127.0.0.1", it.port))[1]
        for _ in range(CONNECTIONS)
    ]

    async def repeat(client: Client) -> None:
        for _ in range(CALLS // CONNECTIONS):
            await client.submit()

    await asyncio.gather(*(client.submit() for client in clients))
    before, started = cpu_times(it.pid), time.perf_counter()
    await asyncio.gather(*map(repeat, clients))
    seconds, after = time.perf_counter() - started, cpu_times(it.pid)
    calls = CALLS // CONNECTIONS * CONNECTIONS
    it.rates.append(calls / seconds)
    it.cpu.append((after[0] - before[0]) / calls)
    it.loop.append((after[1] - before[1]) / calls)
    times = []
    for _ in range(SINGLE_CALLS):
        started = time.perf_counter()
        await clients[0].submit()
        times.append(time.perf_counter() - started)
    it.single.append(median(times) * 1e3)
    for client in clients:
        client.transport.close()


def variants(packages: list[Path]) -> list[Variant]:
    found = [
        Variant("no options"),
        Variant("access key, ownership", OWNERSHIP),
        Variant("and limits", OWNERSHIP | LIMITS),
        Variant("and Idempotency-Key", OWNERSHIP | LIMITS, has_idempotency_key=True),
    ]
    if url := os.environ.get("REDIS_URL"):
        env = OWNERSHIP | LIMITS | {"REDIS_URL": url}
        found.append(Variant("all, in Redis", env, has_idempotency_key=True))
    return [
        Variant(f"{one.name}{' · ' + package.name if packages else ''}", one.env,
                one.has_idempotency_key, package)
        for one in found
        for package in (packages or [Path(__file__).parent.parent])
    ]  # fmt: skip


async def main() -> int:
    fal = await asyncio.get_running_loop().create_server(Fal, "127.0.0.1", 0)
    packages = [Path(name).resolve() for name in sys.argv[1:]]
    async with AsyncExitStack() as stack:
        fal_port = fal.sockets[0].getsockname()[1]
        them = [
            await stack.enter_async_context(running(variant, fal_port))
            for variant in variants(packages)
        ]
        for it in [*them, *(them * ROUNDS)]:
            await measure(it)
        print("submits: µs of CPU time (event loop), submits/s at once, ms alone; medians")
        for it in them:
            print(f"  {it.variant.name:<32}{median(it.cpu[1:]):7.0f} ({median(it.loop[1:]):4.0f})"
                  f"{median(it.rates[1:]):8.0f} /s {median(it.single[1:]):6.2f} ms")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
