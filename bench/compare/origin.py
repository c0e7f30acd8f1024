"""A server for fal.run: counts uploaded bytes, and sends event streams.

Run as a program of its own: `python -m compare.origin <address> <folder of certificates>`.
"""

import asyncio
import json
import re
import ssl
import sys
import time
from pathlib import Path
from typing import cast

import uvloop

EVENTS = 60
EVENT_SECONDS = 0.1
LENGTH = re.compile(rb"\ncontent-length: *(\d+)", re.IGNORECASE)
HEADERS = (
    b"server: uvicorn\r\n"
    b"x-fal-request-id: 6f1f6c2a-6d4e-4b0c-a1f3-0d1c8a3c5b7e\r\n"
    b"x-fal-served-from: gateway-eu-north-1\r\n"
    b"x-fal-billable-units: 1\r\n"
    b"x-envoy-upstream-service-time: 7\r\n"
    b"access-control-allow-origin: *\r\n"
    b"access-control-expose-headers: x-fal-request-id\r\n"
    b"strict-transport-security: max-age=31536000; includeSubDomains\r\n"
    b"cache-control: no-store\r\n"
    b'alt-svc: h3=":443"; ma=86400\r\n'
)
# Makes an event as large as a typical one with logs.
PADDING = "a line of log such as models write while they work; " * 3


class Origin(asyncio.Protocol):
    """One connection: sequential requests, each with a body of known length."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.head = bytearray()
        self.remaining = 0
        self.length = 0
        self.is_stream = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # TLS over TCP has no other kind

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        if not self.remaining:
            self.head += data
            if (end := self.head.find(b"\r\n\r\n")) < 0:
                return
            data = bytes(self.head[end + 4 :])
            self.parse_head(bytes(self.head[: end + 1]))
            self.head.clear()
        self.remaining -= len(data)
        if not self.remaining:
            self.respond()

    def parse_head(self, head: bytes) -> None:
        match = LENGTH.search(head)
        self.remaining = self.length = int(match[1]) if match else 0
        self.is_stream = head.split(b" ", 2)[1].endswith(b"/stream")

    def respond(self) -> None:
        if self.transport is None:
            return
        if self.is_stream:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                + HEADERS
                + b"transfer-encoding: chunked\r\n\r\n"
            )
            loop = asyncio.get_running_loop()
            self.send_event(loop, 0, loop.time())
            return
        body = json.dumps({"received": self.length}).encode()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
            + HEADERS
            + b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )

    def send_event(self, loop: asyncio.AbstractEventLoop, number: int, due: float) -> None:
        if self.transport is None:
            return
        if number == EVENTS:
            self.transport.write(b"0\r\n\r\n")
            return
        event = json.dumps({"number": number, "sent": time.monotonic(), "logs": PADDING}).encode()
        self.transport.write(b"%x\r\ndata: %b\n\n\r\n" % (len(event) + 8, event))
        due += EVENT_SECONDS
        loop.call_at(due, self.send_event, loop, number + 1, due)


async def main(address: str, folder: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Origin, address, 443, ssl=context, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], Path(sys.argv[2])))
