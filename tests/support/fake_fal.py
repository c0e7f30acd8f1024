"""Fakes of fal on loopback: an HTTP application, and a raw socket server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4

from aiohttp import web
from aiohttp.test_utils import TestServer

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that a fake received.

    headers: names in lower case.
    target: the request target, not decoded.
    """

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def header(self, name: str) -> str | None:
        """Return the value of a header, or None; fails if the header was sent twice."""
        values = self.all(name)
        assert len(values) < 2, f"{name} was sent {len(values)} times"
        return values[0] if values else None


async def respond_hello(request: web.Request) -> web.StreamResponse:
    return web.json_response({"hello": "fal"})


async def respond_as_queue(request: web.Request) -> web.StreamResponse:
    """Respond like fal's queue: with a new id to a submit; a job of any id is in progress."""
    if "/requests/" in request.path:
        return web.json_response({"status": "IN_PROGRESS"})
    request_id = str(uuid4())
    address = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}"
    return web.json_response({"request_id": request_id, "status_url": f"{address}/status"})


@dataclass(slots=True)
class FakeFal:
    """fal as an HTTP application.

    seen: the requests so far.
    """

    origin: str = ""
    respond: Respond = respond_hello
    seen: list[Seen] = field(default_factory=list)

    def reset(self) -> None:
        """Forget the requests, and respond as at the start."""
        self.respond = respond_hello
        self.seen.clear()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(
            Seen(
                request.method,
                request.raw_path,
                [(name.lower(), value) for name, value in request.headers.items()],
                await request.read(),
            )
        )
        return await self.respond(request)


@asynccontextmanager
async def open_fal() -> AsyncIterator[FakeFal]:
    """Serve a fake fal that accepts large requests."""
    fake = FakeFal()
    app = web.Application(
        client_max_size=2**30,
        handler_args={
            "handler_cancellation": True,
            "auto_decompress": False,
            "max_field_size": 65536,
            "max_line_size": 65536,
        },
    )
    app.router.add_route("*", "/{path:.*}", fake.handle)
    server = TestServer(app)
    await server.start_server(access_log=None)
    try:
        fake.origin = f"http://127.0.0.1:{server.port}"
        yield fake
    finally:
        await server.close()


Connection = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class WireFal:
    """fal as a raw socket server. serve: handles a connection."""

    origin: str = ""
    serve: Connection | None = None
    connections: int = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if self.serve is not None:
                await self.serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the proxy closed the connection, as some tests intend
        finally:
            writer.close()

    def send(self, data: bytes) -> None:
        """Send these bytes for every further request, and close the connection."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(data)
            await writer.drain()

        self.serve = serve


@asynccontextmanager
async def open_wire() -> AsyncIterator[WireFal]:
    fake = WireFal()
    server = await asyncio.start_server(fake.accept, "127.0.0.1", 0)
    fake.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield fake
    server.close()
    await server.wait_closed()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """Read the head of a request, and its body if there is a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.partition(b":")[2]))
    return head
