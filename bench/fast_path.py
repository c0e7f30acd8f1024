"""CPU time of a poll and a submit on the fast path, in microseconds, without sockets.

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
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from falproxy import Settings, create_app
from falproxy.log import ACCESS_LOGGER, AccessLogHandler
from falproxy.proxy.transport import Origin
from falproxy.proxy.transport.connection import Connection
from falproxy.proxy.upstream import UPSTREAM
from falproxy.server.fast_path.protocol import FastPathRunner

CALLS_PER_ROUND = 2000
ROUNDS = 7
LEDGER_SECONDS = 0.7  # until the ledger has written
TARGET = "https://queue.fal.run/fal-ai/flux"
BODY = b'{"prompt": "' + b"a lighthouse at dusk, " * 43 + b'", "image_size": "square_hd"}'
DOCUMENT = b'{"status": "IN_PROGRESS", "request_id": "7e2f0b8a", "logs": null}'.ljust(400)
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nDate: Sat, 21 Nov 2026 12:00:00 GMT\r\nContent-Type: application/json\r\n"
    + b"".join(b"x-fal-%d: some value\r\n" % number for number in range(10))
    + b"Content-Length: %d\r\n\r\n%b" % (len(DOCUMENT), DOCUMENT)
)


def request(method: str, target: str, body: bytes = b"") -> bytes:
    lines = [
        f"{method} /api/fal/proxy HTTP/1.1",
        "Host: localhost:8080",
        f"x-fal-target-url: {target}",
        "accept: application/json",
        "user-agent: fal-client/1.0 (python)",
    ]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


REQUESTS = {
    "poll": request("GET", f"{TARGET}/requests/7e2f0b8a-0001-4000-8000-000000000000/status"),
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


async def run_event_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def measure(runner: FastPathRunner, fal: Connection, data: bytes) -> float:
    """Return the CPU seconds of one request, the median of all rounds."""
    assert runner.server is not None
    client, transport = runner.server(), RecordingTransport()
    client.connection_made(transport)
    await run_event_loop()
    client.data_received(data)  # through all middleware
    await run_event_loop()
    fal.data_received(RESPONSE)
    await run_event_loop()
    transport.written = b""
    client.data_received(data)
    fal.data_received(RESPONSE)
    if not transport.written.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError("the fast path was not taken")
    gc.collect()
    times = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        for _ in range(CALLS_PER_ROUND):
            client.data_received(data)
            fal.data_received(RESPONSE)
        times.append((time.thread_time() - started) / CALLS_PER_ROUND)
        await asyncio.sleep(LEDGER_SECONDS)
    client.connection_lost(None)
    return median(times)


async def main() -> int:
    access_logger = logging.getLogger(ACCESS_LOGGER)
    loop = asyncio.get_running_loop()
    with open(os.devnull, "w") as devnull, tempfile.TemporaryDirectory() as folder:  # noqa: ASYNC230
        access_logger.propagate, access_logger.handlers = False, [AccessLogHandler(devnull)]
        access_logger.setLevel(logging.INFO)
        app = create_app(Settings(fal_key="a:b", data_dir=Path(folder)))
        runner = FastPathRunner(app, access_log=None)
        await runner.setup()
        pool: Any = app[UPSTREAM].transport
        origin = Origin("queue.fal.run", 443, True)
        fal = Connection(loop, 300.0, lambda idle: pool._release(origin, idle))
        fal.connection_made(RecordingTransport())
        pool._release(origin, fal)
        print("microseconds on the fast path, without sockets")
        for name, data in REQUESTS.items():
            print(f"  {name:<22} {await measure(runner, fal, data) * 1e6:6.2f}")
        access_logger.handlers = []
        await runner.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
