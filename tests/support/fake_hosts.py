"""Hosts on loopback with public names and addresses, for the fetcher."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from aiohttp.abc import AbstractResolver, ResolveResult
from tenacity import wait_none

from falproxy.media.fetch import (
    Fetcher,
    FetchTimeouts,
)

PUBLIC, PRIVATE, NOBODY = "127.0.0.2", "127.0.0.1", "127.0.0.3"
NAME = "pictures.example"
PICTURE = b"\x89PNG\r\n\x1a\n" + b"pixels" * 1000
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def reply(status: int = 200, body: bytes = PICTURE, **headers: str) -> bytes:
    headers = {"Content_Length": str(len(body))} | headers
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"HTTP/1.1 {status} Reason\r\n{''.join(lines)}\r\n".encode() + body


@dataclass
class Host:
    """A server that counts connections and sends a response for each path, byte for byte."""

    connections: int = 0
    seen: list[str] = field(default_factory=list)
    answers: dict[str, bytes | list[bytes] | Answer] = field(default_factory=dict)
    open_now: int = 0
    open_most: int = 0

    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self.answer(reader, writer))
        self.tasks.add(task)
        self.connections += 1
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)
        await asyncio.wait([task])
        self.open_now -= 1
        writer.transport.abort() if task.cancelled() else writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.seen.append(head)
            response = self.answers.get(head.split(" ")[1], reply(404))
            if isinstance(response, list):
                response = response.pop(0) if len(response) > 1 else response[0]
            if isinstance(response, bytes):
                writer.write(response)
                await writer.drain()
            else:
                await response(writer)

    async def close(self) -> None:
        while self.open_now:
            for task in self.tasks:
                task.cancel()
            await asyncio.sleep(0)


@dataclass
class Names(AbstractResolver):
    """A resolver with a list of responses for each name, used in turn."""

    known: dict[str, list[list[str]]]
    asked: list[str] = field(default_factory=list)

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self.known:
            raise OSError(f"no such host: {host}")
        responses = self.known[host]
        response = responses.pop(0) if len(responses) > 1 else responses[0]
        return [
            ResolveResult(hostname=host, host=url, port=port, family=2, proto=0, flags=0)
            for url in response
        ]

    async def close(self) -> None: ...


@dataclass
class World:
    public: Host
    private: Host
    port: int
    names: Names
    now: float = 1000.0

    def url(self, path: str, host: str = NAME) -> str:
        return f"http://{host}:{self.port}{path}"

    def fetcher(self, **pace: float) -> Fetcher:
        return Fetcher(
            resolver=self.names,
            is_allowed=lambda address: address in (PUBLIC, NOBODY),
            ports=(self.port,),
            timeouts=FetchTimeouts(
                per_attempt=pace.get("total", 5.0),
                idle=pace.get("idle", 2.0),
                overall=pace.get("overall", 10.0),
                backoff=wait_none(),
                clock=lambda: self.now,
            ),
        )


def redirect(location: str, status: int = 302) -> bytes:
    return reply(status, b"", Location=location)
