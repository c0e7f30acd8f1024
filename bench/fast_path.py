"""CPU time of a poll and a submit on the fast path, and of polls with new heads, in microseconds,
without sockets.

Run it with `make bench`. A client's bytes go to the real server protocol of a real application,
fal's to a real pooled connection. Only the transports are replaced: they record the last write.
"""

import asyncio
import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import jwt
import uvloop

from falproxy import Settings, create_app
from falproxy.log import ACCESS_LOGGER, AccessLogHandler
from falproxy.proxy.transport import Origin
from falproxy.proxy.transport.connection import Connection
from falproxy.proxy.upstream import UPSTREAM
from falproxy.server.fast_path.protocol import FastPathRunner

CALLS_PER_ROUND = 2000
NEW_CALLS_PER_ROUND = 500
ROUNDS = 7
SETTLE_SECONDS = 0.01  # until aiohttp's task waits for the next request
LEDGER_SECONDS = 0.7  # until the ledger has written
TARGET = "https://queue.fal.run/fal-ai/flux"
BODY = b'{"prompt": "' + b"a lighthouse at dusk, " * 43 + b'", "image_size": "square_hd"}'
DOCUMENT = b'{"status": "IN_PROGRESS", "request_id": "7e2f0b8a", "logs": null}'.ljust(400)


def response(document: bytes) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\nDate: Sat, 21 Nov 2026 12:00:00 GMT\r\n"
        b"Content-Type: application/json\r\n"
        + b"".join(b"x-fal-%d: some value\r\n" % number for number in range(10))
        + b"Content-Length: %d\r\n\r\n%b" % (len(document), document)
    )


RESPONSE = response(DOCUMENT)


SECRET = "secret-of-the-bench-that-is-long-enough"
JOB = "7e2f0b8a-0001-4000-8000-000000000000"
STATUS = f"{TARGET}/requests/{JOB}/status"
SUBMITTED = b'{"status": "IN_QUEUE", "request_id": "%b"}' % JOB.encode()


def request(method: str, target: str, body: bytes = b"", *extra: str) -> bytes:
    lines = [
        f"{method} /api/fal/proxy HTTP/1.1",
        "Host: localhost:8080",
        f"x-fal-target-url: {target}",
        "accept: application/json",
        "user-agent: fal-client/1.0 (python)",
        *extra,
    ]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def poll_of_new_job(number: int) -> bytes:
    return request("GET", STATUS.replace(JOB, f"{number:08x}{JOB[8:]}"))


def poll_of_new_browser(number: int) -> bytes:
    return request("GET", STATUS, b"", f"cookie: session={number}")


def poll_behind_load_balancer(number: int) -> bytes:
    """Return a poll with an identifier of its own, which a load balancer has added."""
    return request("GET", STATUS, b"", f"X-Request-ID: {number:032x}")


REQUESTS = {
    "poll": request("GET", STATUS),
    "submit": request("POST", f"{TARGET}/dev", BODY),
}


class RecordingTransport(asyncio.Transport):
    """Records the last write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: Any) -> None:
        self.written = data

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


async def until_written(transport: RecordingTransport) -> bytes:
    async with asyncio.timeout(10):
        while not transport.written:
            await asyncio.sleep(0.001)
    written, transport.written = transport.written, b""
    return written


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running application with one connection to fal."""

    runner: FastPathRunner
    fal: Connection
    fal_transport: RecordingTransport

    async def connect(self) -> tuple[Any, RecordingTransport]:
        """Return a client's connection."""
        assert self.runner.server is not None
        client, transport = self.runner.server(), RecordingTransport()
        client.connection_made(transport)
        await asyncio.sleep(SETTLE_SECONDS)
        return client, transport

    async def call(self, data: bytes, response: bytes) -> bytes:
        """Send a request through all middleware and return the response."""
        client, transport = await self.connect()
        self.fal_transport.written = b""
        client.data_received(data)
        await until_written(self.fal_transport)
        self.fal.data_received(response)
        written = await until_written(transport)
        await asyncio.sleep(SETTLE_SECONDS)
        client.connection_lost(None)
        return written

    async def measure(self, data: bytes) -> float:
        """Return the CPU seconds of one request, the median of all rounds."""
        await self.call(data, RESPONSE)
        client, transport = await self.connect()
        client.data_received(data)
        self.fal.data_received(RESPONSE)
        if not transport.written.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError("the fast path was not taken")
        gc.collect()
        times = []
        for _ in range(ROUNDS):
            started = time.thread_time()
            for _ in range(CALLS_PER_ROUND):
                client.data_received(data)
                self.fal.data_received(RESPONSE)
            times.append((time.thread_time() - started) / CALLS_PER_ROUND)
            await asyncio.sleep(LEDGER_SECONDS)
        client.connection_lost(None)
        return median(times)

    async def measure_new(self, make: Callable[[int], bytes]) -> float:
        """Return the CPU seconds of one request of which each has another head, the median of all
        rounds. They may take any path."""
        client, transport = await self.connect()
        times, number = [], count()
        for _ in range(ROUNDS):
            gc.collect()
            started = time.thread_time()
            for _ in range(NEW_CALLS_PER_ROUND):
                self.fal_transport.written = transport.written = b""
                client.data_received(make(next(number)))
                while not self.fal_transport.written:
                    await asyncio.sleep(0)
                self.fal.data_received(RESPONSE)
                while not transport.written:
                    await asyncio.sleep(0)
            times.append((time.thread_time() - started) / NEW_CALLS_PER_ROUND)
        client.connection_lost(None)
        return median(times)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Proxy]:
    app = create_app(settings)
    runner = FastPathRunner(app, access_log=None)
    await runner.setup()
    pool: Any = app[UPSTREAM].transport
    origin, transport = Origin("queue.fal.run", 443, True), RecordingTransport()
    loop = asyncio.get_running_loop()
    fal = Connection(loop, 300.0, lambda idle: pool._release(origin, idle))
    fal.connection_made(transport)
    pool._release(origin, fal)
    yield Proxy(runner, fal, transport)
    await runner.cleanup()


def show(name: str, seconds: float) -> None:
    print(f"  {name:<24} {seconds * 1e6:6.2f}")


async def main() -> int:
    access_logger = logging.getLogger(ACCESS_LOGGER)
    with open(os.devnull, "w") as devnull, tempfile.TemporaryDirectory() as folder:  # noqa: ASYNC230
        access_logger.propagate, access_logger.handlers = False, [AccessLogHandler(devnull)]
        access_logger.setLevel(logging.INFO)
        settings = Settings(fal_key="a:b", data_dir=Path(folder))
        print("microseconds on the fast path, without sockets")
        async with running(settings) as proxy:
            for name, data in REQUESTS.items():
                show(name, await proxy.measure(data))
            show("poll of a new job", await proxy.measure_new(poll_of_new_job))
            show("poll, other X-Request-ID", await proxy.measure_new(poll_behind_load_balancer))
            show("poll of a new browser", await proxy.measure_new(poll_of_new_browser))
        claims = {"sub": "user", "aud": "authenticated", "exp": time.time() + 3600}
        line = f"authorization: Bearer {jwt.encode(claims, SECRET)}"
        auth = replace(settings.auth, jwt_secret=SECRET)
        async with running(replace(settings, auth=auth)) as proxy:
            await proxy.call(request("POST", f"{TARGET}/dev", BODY, line), response(SUBMITTED))
            show("poll with a JWT", await proxy.measure(request("GET", STATUS, b"", line)))
        access_logger.handlers = []
    return 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
