"""Files on fal's hosts, and storages for them, for the tests of re-hosting."""

import asyncio
import hashlib
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trustme
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import TestServer
from tenacity import wait_none

from falproxy.media.fetch import Fetcher, FetchTimeouts
from falproxy.stores.files import StorageError, StoredFile
from falproxy.stores.files.disk import DiskStorage

PNG = b"\x89PNG\r\n\x1a\n"

Serve = Callable[[web.Request], Awaitable[web.StreamResponse]]


def png(number: int = 0) -> bytes:
    """Return a distinct file that starts like a PNG."""
    return PNG + b"image %d" % number


def name_of(content: bytes, extension: str = "png") -> str:
    return f"{hashlib.sha256(content).hexdigest()}.{extension}"


@dataclass(slots=True)
class Cdn:
    """A trusted host of files, like the sandbox's.

    files: contents by path.
    serve: handlers of other paths.
    request_counts: by path.
    """

    origin: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    serve: dict[str, Serve] = field(default_factory=dict)
    request_counts: Counter[str] = field(default_factory=Counter)
    headers: list[dict[str, str]] = field(default_factory=list)

    def put(self, path: str, content: bytes) -> str:
        """Add a file and return its URL."""
        self.files[path] = content
        return self.origin + path

    def serve_at(self, path: str, serve: Serve) -> str:
        self.serve[path] = serve
        return self.origin + path

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.request_counts[request.path] += 1
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        if request.path in self.serve:
            return await self.serve[request.path](request)
        if request.path in self.files:
            return web.Response(body=self.files[request.path], content_type="text/plain")
        return web.Response(status=404)


@asynccontextmanager
async def open_cdn() -> AsyncIterator[Cdn]:
    cdn = Cdn()
    app = web.Application(handler_args={"handler_cancellation": True})
    app.router.add_route("*", "/{path:.*}", cdn.handle)
    async with TestServer(app) as server:
        cdn.origin = f"http://127.0.0.1:{server.port}"
        yield cdn


def fetcher_of(*trusted: str, idle: float = 2.0, overall: float = 5.0) -> Fetcher:
    """Return a fetcher with short time-outs. Downloads have a multiple of them."""
    timeouts = FetchTimeouts(per_attempt=overall, idle=idle, overall=overall, backoff=wait_none())
    return Fetcher(trusted=[f"{origin}/" for origin in trusted], timeouts=timeouts)


def respond_with(status: int, body: bytes = b"", **headers: str) -> Serve:
    async def serve(request: web.Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=body, headers=named)

    return serve


def announce_length(size: int) -> Serve:
    """Respond with a Content-Length and no body."""

    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(size)})
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    return serve


async def hang_forever(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@dataclass(slots=True)
class RequestGate:
    """A gate that requests wait for. waiting: number of waiting requests."""

    opened: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0

    async def serve(self, request: web.Request) -> web.StreamResponse:
        await self.wait()
        return web.Response(body=png())

    async def wait(self) -> None:
        self.waiting += 1
        try:
            await self.opened.wait()
        finally:
            self.waiting -= 1


class FaultyDiskStorage(DiskStorage):
    """A disk storage with failures and delays.

    error: message of the StorageError that `put` raises, if any.
    puts: number of calls of `put`.
    """

    def __init__(self, folder: Path, base_url: Callable[[], str]) -> None:
        super().__init__(folder, base_url)
        self.gate = RequestGate()
        self.gate.opened.set()
        self.error: str | None = None
        self.puts: list[StoredFile] = []

    async def put(self, file: StoredFile) -> str:
        self.puts.append(file)
        await self.gate.wait()
        if self.error is not None:
            raise StorageError(self.error)
        return await super().put(file)


class LoopClock:
    """The event loop's clock, which can be moved forward to let time-outs expire."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def elapse(self, seconds: float) -> None:
        self._ahead += seconds

    @contextmanager
    def running(self) -> Iterator["LoopClock"]:
        loop = asyncio.get_running_loop()
        real = loop.time
        loop.time = lambda: real() + self._ahead  # type: ignore[method-assign]
        try:
            yield self
        finally:
            loop.time = real  # type: ignore[method-assign]


# fal's own hosts of files, on this machine

FAL_ADDRESS = "127.0.0.2"
FAL_HOSTS = ("v3.fal.media", "fal.media", "storage.googleapis.com")


@dataclass(frozen=True, slots=True)
class FalNames(AbstractResolver):
    """Resolve fal's file hosts to a local port, and no other names."""

    port: int

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if host not in FAL_HOSTS:
            raise OSError(f"no such host: {host}")
        return [
            ResolveResult(
                hostname=host, host=FAL_ADDRESS, port=self.port, family=2, proto=0, flags=0
            )
        ]

    async def close(self) -> None: ...


@dataclass(slots=True)
class FalCdn(Cdn):
    """A TLS server for fal's file hosts. port: its local port."""

    port: int = 0

    def fetcher(self, *trusted: str) -> Fetcher:
        """Return a fetcher for which this machine's second loopback address is public."""
        return Fetcher(
            resolver=FalNames(self.port),
            is_allowed=lambda address: address == FAL_ADDRESS,
            trusted=[f"{origin}/" for origin in trusted],
            timeouts=FetchTimeouts(per_attempt=5.0, idle=2.0, overall=10.0, backoff=wait_none()),
        )


@asynccontextmanager
async def open_fal_cdn(authority: trustme.CA) -> AsyncIterator[FalCdn]:
    cdn = FalCdn("https://v3.fal.media")
    app = web.Application(handler_args={"handler_cancellation": True})
    app.router.add_route("*", "/{path:.*}", cdn.handle)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*FAL_HOSTS).configure_cert(context)
    server = TestServer(app, scheme="https", host=FAL_ADDRESS)
    await server.start_server(ssl=context)
    try:
        assert server.port is not None
        cdn.port = server.port
        yield cdn
    finally:
        await server.close()
