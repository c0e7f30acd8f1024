"""Limits of connections that hold before authentication: heads, times, and the number."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from aiohttp import web

from falproxy import create_app
from falproxy.metrics import METRICS
from falproxy.server.limits import (
    CONNECTION_LIMITS,
    HEALTH_CONNECTIONS,
    RESERVED_FILES,
    ConnectionLimits,
    LimitedProtocol,
    connection_limit,
)
from tests.support.empty_ledger import with_empty_ledger
from tests.support.fake_fal import FakeFal
from tests.support.gateway import FastPathTestServer
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST, RUN
from tests.support.waiting import SOON, wait_until

pytestmark = pytest.mark.both_event_loops

LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIMIT = 64 * 2**10


@dataclass(slots=True)
class Client:
    """One connection to the proxy."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def head(self) -> bytes:
        """Return the next response, which has a length."""
        async with asyncio.timeout(SOON):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            return head + await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Return everything until the connection ends."""
        received = b""
        async with asyncio.timeout(SOON):
            with contextlib.suppress(ConnectionError):
                while data := await self.reader.read(2**16):
                    received += data
        return received


@dataclass(slots=True)
class Proxy:
    server: FastPathTestServer
    clients: list[Client] = field(default_factory=list)

    async def client(self, data: bytes = b"") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.server.port))
        self.clients.append(client)
        await client.send(data)
        return client

    @property
    def connections(self) -> int:
        return self.server.app[METRICS].connections

    def closed(self, reason: str) -> int:
        return self.server.app[METRICS].snapshot()["closed_connections"].get(reason, 0)


Make = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def make(fal: FakeFal, tmp_path: Path) -> AsyncIterator[Make]:
    started: list[Proxy] = []

    async def start(*, fast_path: bool = True, **limits: object) -> Proxy:
        settings = make_settings(
            fal_key=CANARY,
            upstream_origin=fal.origin,
            data_dir=tmp_path / str(len(started)),
            fast_path=fast_path,
        )
        app = create_app(with_empty_ledger(settings))
        app[CONNECTION_LIMITS] = replace(ConnectionLimits(), **limits)  # type: ignore[arg-type]
        server = FastPathTestServer(app)
        await server.start_server()
        started.append(Proxy(server))
        return started[-1]

    yield start
    for proxy in started:
        for client in proxy.clients:
            client.writer.close()
        await proxy.server.close()


def request(*lines: str, method: str = "GET", path: str = "/health/live") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def fields(count: int, size: int) -> list[str]:
    return [f"x-fal-z{number}: {'a' * size}" for number in range(count)]


# The size of a head


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "normal path"])
@pytest.mark.parametrize("path", ["/health/live", PROXY, "/nowhere"])
async def test_a_head_of_64_kb_is_refused(
    make: Make, fal: FakeFal, path: str, fast_path: bool
) -> None:
    proxy = await make(fast_path=fast_path)
    client = await proxy.client(request(*fields(3, 30_000), path=path))
    response = await client.rest()
    assert response.split()[1] == b"431", response[:200]
    assert b'"code": "head_too_large"' in response
    assert fal.seen == []
    assert proxy.closed("head_too_large") == 1


async def test_a_large_field_is_refused(make: Make) -> None:
    proxy = await make()
    client = await proxy.client(request(*fields(1, 40_000)))
    response = await client.rest()
    assert response.split()[1] == b"400"
    assert b'"code": "head_too_large"' in response


async def test_a_head_below_the_limit_is_served(make: Make) -> None:
    proxy = await make()
    client = await proxy.client(request(*fields(2, 30_000)))
    assert (await client.head()).startswith(b"HTTP/1.1 200 ")


async def test_a_large_head_is_refused_before_its_end(make: Make) -> None:
    proxy = await make()
    client = await proxy.client(request(*fields(2, 30_000))[:-2])
    await client.send(b"x-a: " + b"a" * 10_000)
    response = await client.rest()
    assert response.startswith(b"HTTP/1.1 431 ")
    assert response.count(b"HTTP/1.1") == 1
    await wait_until(lambda: proxy.connections == 0)


async def test_a_body_is_not_part_of_the_head(make: Make, fal: FakeFal) -> None:
    proxy = await make()
    body = b'"' + b"a" * 300_000 + b'"'
    lines = [f"x-fal-target-url: {RUN}", "Content-Type: application/json"]
    head = request(*lines, f"Content-Length: {len(body)}", method="POST", path=PROXY)
    client = await proxy.client(head)
    for start in range(0, len(body), 1000):
        await client.send(body[start : start + 1000])
    assert (await client.head()).startswith(b"HTTP/1.1 200 ")
    await client.send(LIVE)  # the bytes of the body do not count for the next head
    assert (await client.head()).startswith(b"HTTP/1.1 200 ")
    assert len(fal.seen[0].body) == len(body)


async def test_pipelined_requests_are_counted_one_by_one(make: Make) -> None:
    proxy = await make()
    one = request(*fields(1, 20_000))
    client = await proxy.client(one * 8)
    for _ in range(8):
        assert (await client.head()).startswith(b"HTTP/1.1 200 ")


async def test_a_large_head_behind_a_response_in_progress_does_not_cut_it(
    make: Make, fal: FakeFal
) -> None:
    proxy = await make()
    proceed = asyncio.Event()

    async def respond(_: web.Request) -> web.StreamResponse:
        await proceed.wait()
        return web.json_response({"hello": "fal"})

    fal.respond = respond
    client = await proxy.client(request(f"x-fal-target-url: {REQUEST}/status", path=PROXY))
    await wait_until(lambda: len(fal.seen) == 1)
    for _ in range(20):
        await client.send(b"GET / HTTP/1.1\r\n" + b"x-a: " + b"a" * 10_000 + b"\r\n")
    proceed.set()
    response = await client.rest()
    assert response.startswith(b"HTTP/1.1 200 ")
    assert b'"hello"' in response
    assert b"HTTP/1.1 2" not in response[20:]


async def test_the_memory_of_incomplete_heads_is_bounded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("falproxy.server.limits.INCOMPLETE_HEADS_MAX", 8 * LIMIT)
    proxy = await make()
    part = request(*fields(2, 25_000))[:-2]
    clients = [await proxy.client(part) for _ in range(40)]
    await wait_until(lambda: proxy.closed("evicted") >= 25)
    assert proxy.connections <= 15
    assert (await (await proxy.client(LIVE)).head()).startswith(b"HTTP/1.1 200 ")
    for client in clients[:10]:  # the oldest
        assert await client.rest() == b""


# Times


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"", b"", id="no byte"),
        pytest.param(b"GET / HT", b"HTTP/1.1 408 ", id="a part of a head"),
        pytest.param(request()[:-2], b"HTTP/1.1 408 ", id="no end of the head"),
    ],
)
async def test_a_head_that_does_not_end_in_time_is_refused(
    make: Make, data: bytes, expected: bytes
) -> None:
    proxy = await make(head_timeout=0.8)
    client = await proxy.client(data)
    response = await client.rest()
    assert response[: len(expected)] == expected
    assert bool(response) == bool(expected)
    assert proxy.closed("head_timeout") == 1


async def test_a_head_that_arrives_byte_by_byte_is_refused(make: Make) -> None:
    proxy = await make(head_timeout=0.3)
    client = await proxy.client()
    reading = asyncio.ensure_future(client.rest())
    for byte in LIVE[:-1]:
        if reading.done():
            break
        await client.send(bytes([byte]))
        await asyncio.sleep(0.05)
    assert (await reading).startswith(b"HTTP/1.1 408 ")


async def test_the_time_for_a_head_begins_with_each_request(make: Make) -> None:
    proxy = await make(head_timeout=0.3)
    client = await proxy.client(LIVE)
    await client.head()
    await asyncio.sleep(0.8)  # between two requests there is more time
    await client.send(LIVE)
    await client.head()
    await client.send(LIVE[:10])
    assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


async def test_a_slow_response_is_not_a_slow_head(make: Make, fal: FakeFal) -> None:
    async def respond(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.8)
        return web.json_response({"hello": "fal"})

    fal.respond = respond
    proxy = await make(head_timeout=0.2)
    poll = request(f"x-fal-target-url: {REQUEST}/status", path=PROXY)
    client = await proxy.client(poll)
    for _ in range(2):  # the second takes the fast path
        assert (await client.head()).startswith(b"HTTP/1.1 200 ")
        await client.send(poll)


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "normal path"])
async def test_an_idle_connection_is_closed(make: Make, fast_path: bool) -> None:
    proxy = await make(fast_path=fast_path, idle_timeout=0.4)
    client = await proxy.client(LIVE)
    await client.head()
    assert await client.rest() == b""
    assert proxy.connections == 0


async def test_a_response_that_is_not_read_ends_the_connection(make: Make, fal: FakeFal) -> None:
    async def respond(_: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(50_000_000))

    fal.respond = respond
    proxy = await make(send_timeout=0.5)
    await proxy.client(request(f"x-fal-target-url: {RUN}", path=PROXY))
    await wait_until(lambda: proxy.closed("send_timeout") == 1)
    await wait_until(lambda: proxy.connections == 0)


# The number of connections


@pytest.mark.parametrize(
    ("max_connections", "open_files", "expected"),
    [
        (10_000, None, 10_000),
        (10_000, 2**20, 10_000),
        (10_000, 1024, (1024 - RESERVED_FILES) // 2),
        (100, 1024, 100),
        (10_000, 300, 102),
        (10_000, 50, 8),
    ],
)
def test_the_limit_leaves_room_for_calls(
    max_connections: int, open_files: int | None, expected: int
) -> None:
    assert connection_limit(max_connections, open_files) == expected


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "normal path"])
async def test_the_longest_idle_connections_are_closed_first(make: Make, fast_path: bool) -> None:
    proxy = await make(fast_path=fast_path, max_connections=10)
    old = [await proxy.client() for _ in range(5)]
    await wait_until(lambda: proxy.connections == 5)
    for _ in range(20):
        client = await proxy.client(LIVE)
        assert (await client.head()).startswith(b"HTTP/1.1 200 ")
    assert proxy.connections <= 11
    for client in old:
        assert await client.rest() == b""
    assert proxy.closed("evicted") == 15


@dataclass(slots=True)
class BusyFal:
    """Responses of fal that are held back."""

    proceed: asyncio.Event = field(default_factory=asyncio.Event)

    async def respond(self, _: web.Request) -> web.StreamResponse:
        await self.proceed.wait()
        return web.json_response({"hello": "fal"})


POLL = request(f"x-fal-target-url: {REQUEST}/status", path=PROXY)


async def open_busy_connections(
    make: Make, fal: FakeFal, count: int
) -> tuple[Proxy, BusyFal, list[Client]]:
    """Return a proxy with as many connections as it can have, all of which wait for fal."""
    busy = BusyFal()
    fal.respond = busy.respond
    proxy = await make(max_connections=count)
    clients = [await proxy.client(POLL) for _ in range(count)]
    await wait_until(lambda: len(fal.seen) == count)
    return proxy, busy, clients


async def test_busy_connections_leave_room_for_health_checks(
    make: Make, fal: FakeFal, caplog: pytest.LogCaptureFixture
) -> None:
    proxy, busy, clients = await open_busy_connections(make, fal, 10)
    for _ in range(3):
        check = await proxy.client(LIVE)
        assert (await check.head()).startswith(b"HTTP/1.1 200 ")
        check.writer.close()
    refused = await proxy.client(POLL)
    response = await refused.rest()
    assert response.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 1" in response
    assert len(fal.seen) == 10
    busy.proceed.set()
    for client in clients:
        assert (await client.head()).startswith(b"HTTP/1.1 200 ")
    await wait_until(lambda: not proxy.server.app[METRICS].in_progress)
    assert (await (await proxy.client(POLL)).head()).startswith(b"HTTP/1.1 200 ")
    warnings = [record for record in caplog.records if "limit of 10 connections" in record.message]
    assert len(warnings) == 1
    assert proxy.closed("limit") == 1


async def test_a_pause_of_the_process_does_not_put_off_the_search_for_idle_connections(
    make: Make, fal: FakeFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search takes as long as the system gives its time to other processes."""
    proxy, busy, clients = await open_busy_connections(make, fal, 10)

    def search_with_pause(connection: LimitedProtocol) -> bool:
        time.sleep(0.05)
        return bool(is_idle(connection))

    is_idle = vars(LimitedProtocol)["is_idle"].fget
    with monkeypatch.context() as patch:
        patch.setattr(LimitedProtocol, "is_idle", property(search_with_pause))
        assert (await (await proxy.client(LIVE)).head()).startswith(b"HTTP/1.1 200 ")
    busy.proceed.set()
    for client in clients:
        assert (await client.head()).startswith(b"HTTP/1.1 200 ")
    await wait_until(lambda: not proxy.server.app[METRICS].in_progress)
    assert (await (await proxy.client(POLL)).head()).startswith(b"HTTP/1.1 200 ")


async def test_connections_beyond_the_room_for_health_checks_are_closed(
    make: Make, fal: FakeFal
) -> None:
    proxy, busy, _ = await open_busy_connections(make, fal, 5)
    for _ in range(3 * HEALTH_CONNECTIONS):
        await proxy.client()
    await wait_until(lambda: proxy.connections <= 5 + HEALTH_CONNECTIONS)
    assert len(fal.seen) == 5
    assert proxy.closed("evicted") >= 2 * HEALTH_CONNECTIONS
    busy.proceed.set()
    await wait_until(lambda: not proxy.server.app[METRICS].in_progress)
    assert (await (await proxy.client(POLL)).head()).startswith(b"HTTP/1.1 200 ")


# Malformed requests


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "normal path"])
@pytest.mark.parametrize("path", ["/health/live", PROXY, "/api/images/generate", "/kontext"])
@pytest.mark.parametrize(
    "length", ["0" * 5001, "9" * 5001, "0" * 5000 + "2", "9" * 19, "+2", "2,2"]
)
async def test_an_odd_length_is_refused_without_a_traceback(
    make: Make,
    fal: FakeFal,
    caplog: pytest.LogCaptureFixture,
    path: str,
    length: str,
    fast_path: bool,
) -> None:
    proxy = await make(fast_path=fast_path)
    lines = [f"Content-Length: {length}", f"x-fal-target-url: {RUN}", "Connection: close"]
    data = request(*lines, "Content-Type: application/json", method="POST", path=path)
    client = await proxy.client(data + b"{}")
    response = await client.head()
    assert response.split()[1] in (b"400", b"405"), response
    assert fal.seen == []
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("path", ["/health/live", PROXY, "/"])
async def test_a_transfer_coding_in_http_1_0_ends_the_connection(make: Make, path: str) -> None:
    proxy = await make()
    lines = ["Connection: keep-alive", "Transfer-Encoding: chunked"]
    data = request(*lines, path=path).replace(b"HTTP/1.1", b"HTTP/1.0")
    client = await proxy.client(data + b"0\r\n\r\n" + LIVE)
    response = await client.rest()
    assert response.split()[1] == (b"400" if path == PROXY else b"200")
    assert response.count(b"HTTP/1.") == 1


async def test_garbage_is_refused_without_a_traceback(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await make()
    response = await (await proxy.client(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n")).rest()
    assert response.split()[1] == b"400"
    assert b'"code": "bad_request"' in response
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
