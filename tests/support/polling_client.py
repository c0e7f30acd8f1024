"""One connection to the proxy, with requests as bytes."""

import asyncio
from dataclasses import dataclass, field
from typing import Self

from tests.support.key_search import LEAKS
from tests.support.urls import PROXY
from tests.support.waiting import SOON


def poll_request(request_id: str, *lines: str) -> bytes:
    """Return a status poll. lines: of its head."""
    target = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}/status"
    head = [f"GET {PROXY} HTTP/1.1", "Host: localhost", f"x-fal-target-url: {target}", *lines]
    return "\r\n".join([*head, "", ""]).encode()


def submit_request(*lines: str) -> bytes:
    target = "https://queue.fal.run/fal-ai/flux"
    head = [f"POST {PROXY} HTTP/1.1", "Host: localhost", f"x-fal-target-url: {target}", *lines]
    head += ["Content-Type: application/json", "Content-Length: 15"]
    return "\r\n".join([*head, "", ""]).encode() + b'{"prompt": "x"}'


@dataclass(slots=True)
class PollingClient:
    """It is a context: within it, the connection is open."""

    port: int
    _streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._streams = [await asyncio.open_connection("127.0.0.1", self.port)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._streams[0][1].close()

    def write(self, data: bytes) -> None:
        self._streams[0][1].write(data)

    async def read(self) -> tuple[int, bytes]:
        """Return the status and the body of the next response."""
        head, _, body = await self._read()
        return int(head.split()[1]), body

    async def read_headers(self) -> dict[str, str]:
        """Return the headers of the next response, with names and values in lower case."""
        return (await self._read())[1]

    async def _read(self) -> tuple[bytes, dict[str, str], bytes]:
        async with asyncio.timeout(SOON):
            reader = self._streams[0][0]
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").lower().split("\r\n")[1:-2]
            headers = dict(line.split(": ", 1) for line in lines)
            body = await reader.readexactly(int(headers["content-length"]))
        LEAKS.search((head + body).decode("latin-1"), "a response's bytes")
        return head, headers, body

    async def request(self, data: bytes) -> tuple[int, bytes]:
        self.write(data)
        return await self.read()

    async def status(self, data: bytes) -> int:
        return (await self.request(data))[0]

    async def seconds_until(self, status: int, data: bytes, deadline: float = 10.0) -> float:
        """Repeat a request until it has the status. Return the seconds that it took."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with asyncio.timeout(deadline):
            while await self.status(data) != status:
                await asyncio.sleep(0.01)
        return loop.time() - started
