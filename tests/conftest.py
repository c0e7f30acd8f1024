"""Real servers on loopback: the proxy under test, fakes of fal, and a search for the key."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import (
    ClientResponse,
    ClientSession,
    TCPConnector,
    TraceConfig,
    TraceRequestEndParams,
    TraceResponseChunkReceivedParams,
    web,
)
from aiohttp.pytest_plugin import AiohttpClient, AiohttpServer
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web_runner import BaseRunner

from falproxy import Settings, create_app
from falproxy.media.fetch import Fetcher
from falproxy.server.fast_path.protocol import FastPathRunner

try:
    import uvloop
except ImportError:  # no wheel for this platform
    uvloop = None  # type: ignore[assignment]

# Looked for in every log line, header and body of the whole run: it must be in none of them.
CANARY = "canary-id:canary-secret-5d41402abc4b2a76b9719d911017c592"
SECRET = CANARY.partition(":")[2]

PROXY = "/api/fal/proxy"
RUN = "https://fal.run/fal-ai/flux/dev"
SUBMIT = "https://queue.fal.run/fal-ai/flux/dev"
REQUEST = "https://queue.fal.run/fal-ai/flux/requests/7e2f0b8a-0001-4000-8000-000000000000"

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
ON_BOTH_LOOPS = {"test_relay.py", "test_upstream.py", "test_framing.py", "test_lane.py"}

# Where it matters how the proxy sends, tests run on both of its ways to fal.
ON_BOTH_WAYS = {
    "test_relay.py", "test_upstream.py", "test_framing.py", "test_transparent.py",
    "test_differential.py", "test_mount.py", "test_check_images.py",
}  # fmt: skip

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Leaks(logging.Handler):
    """Keeps the places where the key was seen."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.look(self.format(record) + repr(record.__dict__), f"log of {record.name}")

    def look(self, text: str, where: str) -> None:
        if SECRET in text:
            self.found.append(where)


LEAKS = Leaks()


def search_answers() -> TraceConfig:
    """Has a client session look for the key in every header and body that it receives."""
    trace = TraceConfig()

    async def head(session: object, context: object, params: TraceRequestEndParams) -> None:
        LEAKS.look(repr(params.response.raw_headers), f"headers of {params.url}")

    async def body(
        session: object, context: object, params: TraceResponseChunkReceivedParams
    ) -> None:
        LEAKS.look(params.chunk.decode("latin-1"), f"body of {params.url}")

    trace.on_request_end.append(head)
    trace.on_response_chunk_received.append(body)
    return trace


def pytest_configure() -> None:
    logging.getLogger().addHandler(LEAKS)


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, LoopFactory]:
    """Where bytes, connections and their ends matter, tests run on both event loops: asyncio's
    own, and uvloop, which the command line uses where it is installed."""
    factories: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop}
    if item.path.name in ON_BOTH_LOOPS and uvloop is not None:
        factories["uvloop"] = uvloop.new_event_loop
    return factories


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "is_fast" in metafunc.fixturenames and metafunc.definition.path.name in ON_BOTH_WAYS:
        metafunc.parametrize("is_fast", [True, False], ids=["fast", "session"], indirect=True)


@pytest.fixture
def is_fast(request: pytest.FixtureRequest) -> bool:
    """Return whether the proxy has its fast path and its own transport, or neither."""
    return bool(getattr(request, "param", True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timed") is not None:
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=2))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for title, text in report.sections:
        LEAKS.look(text, f"{title} of {report.nodeid}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The whole run fails when the key was seen anywhere. A worker sends its findings to the
    process that collects the results."""
    output: dict[str, object] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["leaks"] = LEAKS.found
    elif LEAKS.found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Collects the findings of a worker of pytest-xdist."""
    LEAKS.found += getattr(node, "workeroutput", {}).get("leaks", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for where in LEAKS.found:
        terminalreporter.write_line(f"ERROR the key was seen in: {where}", red=True)


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it reached a fake. headers: names in lower case; target: as on the wire."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def header(self, name: str) -> str | None:
        """The value of a header that must not be there twice."""
        values = self.all(name)
        assert len(values) < 2, f"{name} was sent {len(values)} times"
        return values[0] if values else None


async def say_hello(request: web.Request) -> web.StreamResponse:
    return web.json_response({"hello": "fal"})


@dataclass(slots=True)
class FakeFal:
    """fal on loopback. answer: what it says, to be replaced by a test."""

    origin: str = ""
    answer: Answer = say_hello
    seen: list[Seen] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(
            Seen(
                request.method,
                request.raw_path,
                [(name.lower(), value) for name, value in request.headers.items()],
                await request.read(),
            )
        )
        return await self.answer(request)


@pytest.fixture
async def fal(aiohttp_server: AiohttpServer) -> FakeFal:
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
    server = await aiohttp_server(app)
    fake.origin = f"http://127.0.0.1:{server.port}"
    return fake


Connection = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class WireFal:
    """fal as bytes on a socket. serve: what happens on each connection."""

    origin: str = ""
    serve: Connection | None = None
    connections: int = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if self.serve is not None:
                await self.serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the proxy hung up first, which is what some tests are about
        finally:
            writer.close()

    def say(self, answer: bytes) -> None:
        """From now on every request is answered with these bytes and a closed connection."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(answer)
            await writer.drain()

        self.serve = serve


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """A request's head, and its body when a Content-Length announces one."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.partition(b":")[2]))
    return head


@pytest.fixture
async def wire() -> AsyncIterator[WireFal]:
    fake = WireFal()
    server = await asyncio.start_server(fake.accept, "127.0.0.1", 0)
    fake.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield fake
    server.close()
    await server.wait_closed()


@dataclass(frozen=True, slots=True)
class Gateway:
    """The proxy under test and a client of it. origin: where it listens."""

    client: TestClient[web.Request, web.Application]
    origin: str

    async def call(
        self, target: str | None, method: str = "POST", **options: object
    ) -> ClientResponse:
        """A request through the header route, the way fal's clients send it."""
        headers = list(options.pop("headers", []))  # type: ignore[call-overload]
        if target is not None:
            headers.append(("x-fal-target-url", target))
        return await self.client.request(method, PROXY, headers=headers, **options)  # type: ignore[arg-type]

    async def exchange(self, request: bytes) -> bytes:
        """All that comes back for bytes that no well-behaved client library would send."""
        port = int(self.origin.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
        LEAKS.look(answer.decode("latin-1"), "an answer's bytes")
        return answer


MakeGateway = Callable[..., Awaitable[Gateway]]


class DoorServer(TestServer):
    """A server as `falproxy serve` has it."""

    async def _make_runner(self, **options: Any) -> BaseRunner:
        return FastPathRunner(self.app, **options)


@pytest.fixture
def make_gateway(aiohttp_client: AiohttpClient, tmp_path: Path, is_fast: bool) -> MakeGateway:
    async def make(origin: str, fetcher: Fetcher | None = None, **given: object) -> Gateway:
        settings = {"fal_key": CANARY, "upstream_origin": origin, "data_dir": tmp_path}
        settings |= {"fast_path": is_fast, "transport": "pool" if is_fast else "aiohttp"} | given
        settings = {"allowed_targets": ("**",)} | settings  # what the policy says is tested apart
        app = create_app(Settings(**settings), fetcher=fetcher)  # type: ignore[arg-type]
        server = DoorServer(app) if is_fast else TestServer(app)
        client: Any = await aiohttp_client(
            server,
            auto_decompress=False,
            max_field_size=65536,
            connector=TCPConnector(limit=0),
            trace_configs=[search_answers()],
        )
        return Gateway(client, f"http://127.0.0.1:{client.port}")

    return make


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    """The proxy with `fal` behind it."""
    return await make_gateway(fal.origin)


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    """A client that hides nothing: bodies as they came, redirects as they are."""
    async with ClientSession(auto_decompress=False, max_field_size=65536) as client:
        yield client


@pytest.fixture
def root() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def nothing_is_kept_in_the_repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A proxy keeps what it must remember below the working directory, unless it is told where."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


@pytest.fixture(autouse=True)
def all_logs_are_searched(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
