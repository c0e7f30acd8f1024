"""What a poll and an order cost on the lane, in microseconds, without sockets.

Run it with `make bench`. A client's bytes go into the real door of a real application, fal's into a
real connection; nothing is between them and the wire but a transport that keeps what is written.
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

CALLS_AT_ONCE = 2000
ROUNDS = 7
SETTLE = 0.7  # seconds in which the ledger writes
TARGET = "https://queue.fal.run/fal-ai/flux"
BODY = b'{"prompt": "' + b"a lighthouse at dusk, " * 43 + b'", "image_size": "square_hd"}'
DOCUMENT = b'{"status": "IN_PROGRESS", "request_id": "7e2f0b8a", "logs": null}'.ljust(400)
ANSWER = (
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
    "order": request("POST", f"{TARGET}/dev", BODY),
}


class Wire(asyncio.Transport):
    """Keeps what was written last."""

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


async def turn() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def measure(runner: FastPathRunner, fal: Connection, data: bytes) -> float:
    """Seconds of CPU time for one."""
    assert runner.server is not None
    door, wire = runner.server(), Wire()
    door.connection_made(wire)
    await turn()
    door.data_received(data)  # through the layers
    await turn()
    fal.data_received(ANSWER)
    await turn()
    wire.written = b""
    door.data_received(data)
    fal.data_received(ANSWER)
    if not wire.written.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError("it is not on the lane")
    gc.collect()
    taken = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for _ in range(CALLS_AT_ONCE):
            door.data_received(data)
            fal.data_received(ANSWER)
        taken.append((time.thread_time() - began) / CALLS_AT_ONCE)
        await asyncio.sleep(SETTLE)
    door.connection_lost(None)
    return median(taken)


async def main() -> int:
    calls = logging.getLogger(ACCESS_LOGGER)
    loop = asyncio.get_running_loop()
    with open(os.devnull, "w") as nowhere, tempfile.TemporaryDirectory() as folder:  # noqa: ASYNC230
        calls.propagate, calls.handlers = False, [AccessLogHandler(nowhere)]
        calls.setLevel(logging.INFO)
        app = create_app(Settings(fal_key="a:b", data_dir=Path(folder)))
        runner = FastPathRunner(app, access_log=None)
        await runner.setup()
        pool: Any = app[UPSTREAM].transport
        origin = Origin("queue.fal.run", 443, True)
        fal = Connection(loop, 300.0, lambda kept: pool._release(origin, kept))
        fal.connection_made(Wire())
        pool._release(origin, fal)
        print("microseconds on the lane, without sockets")
        for name, data in REQUESTS.items():
            print(f"  {name:<22} {await measure(runner, fal, data) * 1e6:6.2f}")
        calls.handlers = []
        await runner.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
