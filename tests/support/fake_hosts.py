"""Hosts on loopback with public names and addresses, for the fetcher."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from aiohttp.abc import AbstractResolver, ResolveResult
from tenacity import wait_none

from falproxy.media.fetch import Fetcher, FetchTimeouts

# No server listens at UNUSED.
PUBLIC, PRIVATE, UNUSED = "127.0.0.2", "127.0.0.1", "127.0.0.3"
NAME = "images.example"
IMAGE = b"\x89PNG\r\n\x1a\n" + b"pixels" * 1000
Responder = Callable[[asyncio.StreamWriter], Awaitable[None]]


def reply(status: int = 200, body: bytes = IMAGE, **headers: str) -> bytes:
    headers = {"Content_Length": str(len(body))} | headers
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"HTTP/1.1 {status} Reason\r\n{''.join(lines)}\r\n".encode() + body


@dataclass
class Host:
    """A server that sends prepared bytes for each path.

    connections: number of accepted connections.
    seen: heads of the requests.
    responses: by path; the items of a list are sent in turn, and the last one from then on.
    open_now: number of open connections.
    """

    connections: int = 0
    seen: list[str] = field(default_factory=list)
    responses: dict[str, bytes | list[bytes] | Responder] = field(default_factory=dict)
    open_now: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def reset(self) -> None:
        """Forget the requests and the responses. Connections of an earlier test are closed."""
        self.connections = 0
        self.seen.clear()
        self.responses.clear()
        for task in self.tasks:
            task.cancel()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self.respond(reader, writer))
        self.tasks.add(task)
        self.connections += 1
        self.open_now += 1
        await asyncio.wait([task])
        self.open_now -= 1
        writer.transport.abort() if task.cancelled() else writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async def respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.seen.append(head)
            response = self.responses.get(head.split(" ")[1], reply(404))
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
    """A resolver.

    known: lists of addresses by name, returned in turn; the last one from then on.
    asked: names that were resolved.
    """

    known: dict[str, list[list[str]]]
    asked: list[str] = field(default_factory=list)

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self.known:
            raise OSError(f"no such host: {host}")
        lists = self.known[host]
        addresses = lists.pop(0) if len(lists) > 1 else lists[0]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=2, proto=0, flags=0)
            for address in addresses
        ]

    async def close(self) -> None: ...


@dataclass
class World:
    """A public server and a private one, on the same port."""

    public: Host
    private: Host
    port: int
    names: Names
    now: float = 1000.0

    def url(self, path: str, host: str = NAME) -> str:
        return f"http://{host}:{self.port}{path}"

    def fetcher(self, **timeouts: float) -> Fetcher:
        return Fetcher(
            resolver=self.names,
            is_allowed=lambda address: address in (PUBLIC, UNUSED),
            ports=(self.port,),
            timeouts=FetchTimeouts(
                per_attempt=timeouts.get("total", 5.0),
                idle=timeouts.get("idle", 2.0),
                overall=timeouts.get("overall", 10.0),
                backoff=wait_none(),
                clock=lambda: self.now,
            ),
        )


@asynccontextmanager
async def open_hosts(public: Host, private: Host) -> AsyncIterator[int]:
    """Context: both servers on one port, which is returned. Another process may have a port that is
    free for the first one; then the next port is tried."""
    for _ in range(20):
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(
                await asyncio.start_server(public.serve, PUBLIC, 0)
            )
            port = int(server.sockets[0].getsockname()[1])
            try:
                other = await asyncio.start_server(private.serve, PRIVATE, port)
            except OSError:
                continue
            await stack.enter_async_context(other)
            yield port
            return
    raise AssertionError("no port is free on both addresses")


def redirect(location: str, status: int = 302) -> bytes:
    return reply(status, b"", Location=location)
