"""The fast path gives the same responses as the normal path, and leaves unusual requests to it."""

import asyncio
import json
import logging
import re
import socket
import sqlite3
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from aiohttp.web_protocol import RequestHandler

from falproxy import create_app
from falproxy.app import fast_path_enabled
from falproxy.app.pipeline import authorization
from falproxy.metrics import METRICS
from falproxy.proxy.head_only import head_only
from falproxy.proxy.transport.aiohttp_transport import AiohttpTransport
from falproxy.proxy.transport.pool import Pool
from falproxy.proxy.upstream import UPSTREAM
from falproxy.server.fast_path import split_request
from falproxy.server.fast_path.protocol import (
    REQUIRED_SLOTS,
    ROUTE_CACHE,
    FastPathProtocol,
    is_supported,
)
from falproxy.server.fast_path.route_cache import RouteCache
from tests.support.empty_ledger import with_empty_ledger
from tests.support.fake_fal import read_head
from tests.support.gateway import FastPathTestServer
from tests.support.key_search import CANARY, LEAKS
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST, SUBMIT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.both_event_loops

DATE = b"Date: Sat, 21 Nov 2026 12:00:00 GMT\r\n"
TYPE = b"Content-Type: application/json\r\n"
DOCUMENT = b'{"status": "IN_PROGRESS"}'
SUBMIT_BODY = b'{"prompt": "a lighthouse\\n", "num_images": 1}'
LENGTH = b"Content-Length: %d" % len(SUBMIT_BODY)
KEY = "a-key-of-16-chars"
OTHER_KEY = "another-key-of-16"
# The parts that differ between two equal responses.
VARYING = re.compile(
    rb"(?i)(x-request-id: [0-9a-f]{32}|falproxy;dur=[0-9.]+, fal;dur=[0-9.]+|\r\ndate: [^\r]+)"
)
TIMEOUT = 5.0
DRAIN = 1.5  # seconds


def response_bytes(
    body: bytes = DOCUMENT,
    *,
    status: bytes = b"202 Accepted",
    extra: bytes = b"",
    date: bytes = DATE,
) -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 %b\r\n%b%b%b%b\r\n%b" % (status, date, TYPE, length, extra, body)


Respond = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class ScriptedFal:
    """fal as raw bytes on keep-alive connections.

    response: sent to every request, unless `respond` is set.
    respond: writes the response to a request.
    """

    origin: str = ""
    response: bytes = field(default_factory=response_bytes)
    respond: Respond | None = None
    seen: list[bytes] = field(default_factory=list)
    closed: int = 0  # connections that the proxy has closed

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await read_head(reader)
                self.seen.append(request)
                if self.respond is not None:
                    await self.respond(request, writer)
                else:
                    writer.write(self.response)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.closed += 1
        finally:
            writer.close()


@pytest.fixture
async def fal() -> AsyncIterator[ScriptedFal]:
    fake = ScriptedFal()
    server = await asyncio.start_server(fake.accept, "127.0.0.1", 0)
    fake.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield fake
    server.close()


@dataclass(slots=True)
class Client:
    """One connection to the proxy."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def request(self, data: bytes) -> bytes:
        self.writer.write(data)
        return await self.read_response()

    async def read_response(self) -> bytes:
        """Return the next response, whose body has a length or chunks."""
        async with asyncio.timeout(TIMEOUT):
            head = await self.reader.readuntil(b"\r\n\r\n")
            if b"transfer-encoding: chunked" in head.lower():
                return head + await self.reader.readuntil(b"0\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            response = head + await self.reader.readexactly(int(length[1]) if length else 0)
        LEAKS.search(response.decode("latin-1"), "a response's bytes")
        return response


@dataclass(slots=True)
class Proxy:
    server: FastPathTestServer
    folder: Path
    clients: list[Client] = field(default_factory=list)

    async def client(self, address: str = "127.0.0.1") -> Client:
        """address: the client's own."""
        streams = await asyncio.open_connection(
            "127.0.0.1", self.server.port, local_addr=(address, 0)
        )
        client = Client(*streams)
        self.clients.append(client)
        return client

    def count(self, operation: str) -> dict[str, int]:
        """Return the number of requests of an operation by status."""
        requests = self.server.app[METRICS].snapshot()["requests"]
        labels = {name: name.split(" ") for name in requests}
        return {parts[1]: requests[name] for name, parts in labels.items() if parts[0] == operation}

    @property
    def route_cache(self) -> RouteCache:
        return self.server.app[ROUTE_CACHE]

    @property
    def fast_path_hits(self) -> int:
        return self.route_cache.hits

    @property
    def in_progress(self) -> int:
        return self.server.app[METRICS].in_progress

    def ledger_rows(self) -> list[tuple[object, ...]]:
        """Return the ledger's entries, oldest first."""
        with sqlite3.connect(self.folder / "ledger.sqlite") as ledger:
            return ledger.execute(
                "SELECT status, principal, operation, endpoint, request_id, error, settled"
                " FROM falproxy_entries ORDER BY rowid"
            ).fetchall()


Make = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def make(fal: ScriptedFal, tmp_path: Path) -> AsyncIterator[Make]:
    started: list[Proxy] = []

    async def start(**settings: object) -> Proxy:
        folder = tmp_path / str(len(started))
        settings = {"fal_key": CANARY, "upstream_origin": fal.origin, "data_dir": folder} | settings
        server = FastPathTestServer(create_app(with_empty_ledger(make_settings(**settings))))
        await server.start_server()
        started.append(Proxy(server, folder))
        return started[-1]

    yield start
    for proxy in started:
        for client in proxy.clients:
            client.writer.close()
        await proxy.server.close()


def poll(*lines: str, target: str = f"{REQUEST}/status") -> bytes:
    head = [f"GET {PROXY} HTTP/1.1", "Host: localhost", f"x-fal-target-url: {target}", *lines]
    return "\r\n".join([*head, "", ""]).encode()


def submit(body: bytes = SUBMIT_BODY, *lines: str, target: str = SUBMIT) -> bytes:
    head = [
        f"POST {PROXY} HTTP/1.1",
        "Host: localhost",
        f"x-fal-target-url: {target}",
        "Content-Type: application/json",
        *lines,
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def accepted(request_id: str = "7e2f0b8a-0001-4000-8000-000000000000") -> bytes:
    document = json.dumps({"request_id": request_id, "status": "IN_QUEUE"}).encode()
    return response_bytes(
        document, status=b"200 OK", extra=f"x-fal-request-id: {request_id}\r\n".encode()
    )


def without_varying(response: bytes) -> bytes:
    return VARYING.sub(b"", response)


def lines_of(response: bytes) -> tuple[list[bytes], bytes]:
    """Return the lines of the head in the order of their names, and the body."""
    head, _, body = response.partition(b"\r\n\r\n")
    return sorted(without_varying(head).split(b"\r\n")), body


# Requests on the fast path


async def test_a_repeated_poll_takes_the_fast_path(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    first = await client.request(poll())
    assert proxy.fast_path_hits == 0
    second = await client.request(poll())
    assert proxy.fast_path_hits == 1
    assert without_varying(first) == without_varying(second)
    assert fal.seen[0] == fal.seen[1]


async def test_a_route_is_cached_for_all_connections(make: Make) -> None:
    proxy = await make()
    for _ in range(3):
        await (await proxy.client()).request(poll())
    assert proxy.fast_path_hits == 2


async def test_the_log_has_the_client_of_each_connection(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Equal heads from a trusted proxy and from another peer are reports and forgeries."""
    proxy = await make(trusted_proxies=(ip_network("127.0.0.1"),))
    request = poll("X-Forwarded-For: 198.51.100.66, 203.0.113.7")
    clients = [await proxy.client(address) for address in ("127.0.0.1", "127.0.0.1", "127.0.0.2")]
    with caplog.at_level("INFO", "falproxy.calls"):
        for client in clients:
            await client.request(request)
    assert proxy.fast_path_hits == 2
    logged = [vars(each)["fields"] for each in caplog.records if each.name == "falproxy.calls"]
    assert [line["client"] for line in logged] == ["203.0.113.7", "203.0.113.7", "127.0.0.2"]


@dataclass(slots=True)
class EarlyClient:
    """Sends data in the moment in which a response of the normal path has been written, when
    aiohttp does not wait for the next request yet, as it happens under load.

    pieces: of data for each response. disconnects: closes the connection behind them.
    """

    pieces: list[tuple[bytes, ...]]
    disconnects: bool = False

    def follow_responses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        finish_response = FastPathProtocol.finish_response

        async def finish_and_send(protocol: FastPathProtocol, *arguments: Any) -> Any:
            finished = await finish_response(protocol, *arguments)
            for piece in self.pieces.pop(0) if self.pieces else ():
                protocol.data_received(piece)
            if self.disconnects and protocol.transport is not None:
                protocol.transport.abort()
            return finished

        monkeypatch.setattr(FastPathProtocol, "finish_response", finish_and_send)


NEW = poll("x-new: 1")


@pytest.mark.parametrize(
    ("pieces", "responses", "hits"),
    [
        pytest.param([(poll(),)], 1, 1, id="a repeated head"),
        pytest.param([(poll(), poll())], 2, 2, id="two requests, one after the other"),
        pytest.param([(poll() + poll(),)], 2, 0, id="two requests at once"),
        pytest.param([(poll()[:50], poll()[50:])], 1, 0, id="a head in two pieces"),
        pytest.param([(NEW,), (poll(),)], 2, 1, id="a new head, then a repeated one"),
        pytest.param([(NEW,), (NEW,)], 2, 1, id="a new head, which is then repeated"),
        pytest.param([(submit(),), (poll(),)], 2, 1, id="a submit, then a repeated poll"),
    ],
)
@pytest.mark.both_event_loops
async def test_a_connection_under_load_returns_to_the_fast_path(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    pieces: list[tuple[bytes, ...]],
    responses: int,
    hits: int,
) -> None:
    proxy = await make()
    await (await proxy.client()).request(poll())
    client = await proxy.client()
    EarlyClient([*pieces]).follow_responses(monkeypatch)
    await client.request(poll("x-first: 1"))
    for _ in range(responses):
        assert b" 202 " in await client.read_response()
    assert proxy.fast_path_hits == hits
    await wait_until(lambda: proxy.in_progress == 0, seconds=TIMEOUT)


async def test_a_client_that_leaves_in_that_moment_is_forgotten(
    make: Make, monkeypatch: pytest.MonkeyPatch, fal: ScriptedFal
) -> None:
    proxy = await make()
    client = await proxy.client()
    EarlyClient([(poll(),)], disconnects=True).follow_responses(monkeypatch)
    client.writer.write(poll("x-first: 1"))
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        await client.read_response()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await client.read_response()
    monkeypatch.undo()
    await wait_until(lambda: proxy.in_progress == 0, seconds=TIMEOUT)
    assert await (await proxy.client()).request(poll())


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(poll(target=f"{REQUEST}/status?logs=1"), id="another query"),
        pytest.param(poll("Accept: */*"), id="another header"),
        pytest.param(poll().replace(b"x-fal", b"X-ScriptedFal"), id="another spelling"),
    ],
)
async def test_a_head_that_differs_by_a_byte_takes_the_normal_path(
    make: Make, other: bytes
) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.request(poll())
    await client.request(other)
    assert proxy.fast_path_hits == 0


@pytest.mark.parametrize(
    ("response", "is_fast"),
    [
        pytest.param(response_bytes(), True, id="a usual response"),
        pytest.param(response_bytes(status=b"200 OK"), True, id="done"),
        pytest.param(response_bytes(b""), True, id="no body"),
        pytest.param(
            response_bytes(extra=b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n"),
            True,
            id="repeated headers",
        ),
        pytest.param(
            response_bytes(extra=b"Alt-Svc: h3\r\nServer: uvicorn\r\n"),
            True,
            id="headers that are not relayed",
        ),
        pytest.param(response_bytes(extra=b"X-Request-ID: fal-s-own\r\n"), True, id="fal's own id"),
        pytest.param(response_bytes(extra=b"X-Name: caf\xc3\xa9\r\n"), True, id="a name in UTF-8"),
        pytest.param(
            response_bytes(extra=b"Content-Encoding: gzip\r\n"), True, id="an encoded body"
        ),
        pytest.param(
            response_bytes(extra=b"Connection: x-a\r\nX-A: 1\r\n"), False, id="hop by hop"
        ),
        pytest.param(response_bytes(date=b""), False, id="no date"),
        pytest.param(response_bytes(status=b"400 Bad Request"), False, id="refused"),
        pytest.param(response_bytes(status=b"404 Not Found"), False, id="not found"),
        pytest.param(response_bytes(status=b"429 Too Many Requests"), False, id="too many"),
        pytest.param(
            response_bytes(status=b"500 Internal Server Error"), False, id="an error of fal's"
        ),
        pytest.param(response_bytes(b"x" * 300_000), False, id="large"),
        pytest.param(
            b"HTTP/1.1 202 Accepted\r\n" + DATE + TYPE + b"Transfer-Encoding: chunked\r\n\r\n"
            b"2\r\n{}\r\n0\r\n\r\n",
            False,
            id="chunked",
        ),
    ],
)
async def test_a_fast_path_response_equals_one_of_the_normal_path(
    make: Make, fal: ScriptedFal, response: bytes, is_fast: bool
) -> None:
    """Compare each response as the first one, and as a repeated one."""
    proxy = await make(allowed_origins=("https://app.example",))
    client = await proxy.client()
    fal.response = response
    normal = await client.request(poll("Origin: https://app.example", "Accept: */*"))
    fal.response = response_bytes()
    await client.request(poll("Origin: https://app.example"))
    fal.response = response
    hits_before = proxy.fast_path_hits
    fast = await client.request(poll("Origin: https://app.example"))
    assert proxy.fast_path_hits == hits_before + 1
    if is_fast:
        assert without_varying(fast) == without_varying(normal)
    else:  # the order of the headers depends on whether the body was complete with its head
        assert lines_of(fast) == lines_of(normal)
    assert len(fal.seen) == 3, "no request is sent twice"
    assert proxy.in_progress == 0
    assert sum(proxy.count("status").values()) == 3
    fal.response = response_bytes()
    assert without_varying(await client.request(poll("Origin: https://app.example"))).endswith(
        DOCUMENT
    )
    assert is_fast or proxy.fast_path_hits == hits_before + 2


async def test_a_response_has_a_request_id_and_timings(make: Make) -> None:
    proxy = await make()
    client = await proxy.client()
    ids = [re.search(rb"X-Request-ID: (\w{32})", await client.request(poll())) for _ in range(3)]
    assert len({found[1] for found in ids if found}) == 3
    assert b"Server-Timing: falproxy;dur=" in await client.request(poll())
    assert proxy.fast_path_hits == 3


async def test_a_request_id_of_the_client_is_kept(make: Make) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(2):
        response = await client.request(poll("X-Request-ID: from-the-balancer"))
        assert b"X-Request-ID: from-the-balancer\r\n" in response
    assert proxy.fast_path_hits == 1


async def test_fast_path_calls_are_logged_like_all_others(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(2):
        await client.request(poll())
    await wait_until(
        lambda: sum(record.name == "falproxy.calls" for record in caplog.records) == 2,
        seconds=TIMEOUT,
    )
    first, second = (
        record.fields  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "falproxy.calls"
    )
    assert proxy.fast_path_hits == 1
    assert first.keys() == second.keys()
    own = {"request_id", "seconds", "upstream_seconds"}
    assert {**first, **dict.fromkeys(own)} == {**second, **dict.fromkeys(own)}
    assert 0 < second["upstream_seconds"] <= second["seconds"]


# Requests on the normal path


async def test_a_cached_route_is_only_for_its_own_access_key(make: Make, fal: ScriptedFal) -> None:
    keys = (("ann", KEY), ("bob", OTHER_KEY))
    proxy = await make(access_keys=keys)
    client = await proxy.client()
    fal.response = accepted()
    await client.request(submit(SUBMIT_BODY, f"x-falproxy-key: {KEY}"))
    fal.response = response_bytes()
    seen_before = len(fal.seen)
    for _ in range(2):
        assert b" 202 " in await client.request(poll(f"x-falproxy-key: {KEY}"))
        assert b" 404 " in await client.request(poll(f"x-falproxy-key: {OTHER_KEY}"))
        assert b" 401 " in await client.request(poll("x-falproxy-key: wrong"))
        assert b" 401 " in await client.request(poll())
    assert proxy.fast_path_hits == 1
    assert len(fal.seen) == seen_before + 2


async def test_a_cached_route_expires(make: Make) -> None:
    proxy = await make()
    proxy.route_cache.ttl = -1.0
    client = await proxy.client()
    for _ in range(3):
        await client.request(poll())
    assert proxy.fast_path_hits == 0


async def test_the_number_of_cached_routes_is_bounded(make: Make) -> None:
    proxy = await make()
    proxy.route_cache.max_routes = 2
    client = await proxy.client()
    for number in (1, 2, 3, 1):
        await client.request(poll(f"X-Number: {number}"))
    assert proxy.fast_path_hits == 0
    assert len(proxy.route_cache._routes) == 2
    await client.request(poll("X-Number: 3"))
    assert proxy.fast_path_hits == 1


async def test_the_size_of_cached_routes_is_bounded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("falproxy.server.fast_path.route_cache.ROUTES_MAX_BYTES", 50_000)
    proxy = await make()
    client = await proxy.client()
    for number in range(30):
        await client.request(poll(f"x-a: {'a' * 1500}{number:02}"))
    assert 2 <= len(proxy.route_cache._routes) <= 10
    proxy.route_cache.ttl = 0.0
    assert proxy.route_cache._size <= 60_000


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(poll("Connection: close"), id="the last request of a connection"),
        pytest.param(poll().replace(b"HTTP/1.1", b"HTTP/1.0"), id="an older HTTP"),
        pytest.param(poll(target=f"{REQUEST}/status/stream"), id="a stream"),
        pytest.param(poll("X-Long: " + "x" * 3000), id="a long head"),
        pytest.param(b"\r\n" + poll(), id="an empty line before it"),
    ],
)
async def test_these_requests_take_the_normal_path(make: Make, request_bytes: bytes) -> None:
    proxy = await make()
    for _ in range(3):
        await (await proxy.client()).request(request_bytes)
    assert proxy.fast_path_hits == 0


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"fast_path": False}, id="switched off"),
        pytest.param({"transport": "aiohttp"}, id="without the transport that it needs"),
    ],
)
async def test_the_fast_path_can_be_off(make: Make, settings: dict[str, object]) -> None:
    proxy = await make(**settings)
    assert ROUTE_CACHE not in proxy.server.app
    assert await (await proxy.client()).request(poll())


@pytest.mark.parametrize(
    ("switches", "transport"),
    [
        pytest.param({}, Pool, id="both on"),
        pytest.param({"fast_path": False}, Pool, id="without the fast path"),
        pytest.param({"transport": "aiohttp"}, AiohttpTransport, id="aiohttp's client"),
    ],
)
async def test_the_transport_has_its_own_switch(
    make: Make, switches: dict[str, object], transport: type[object]
) -> None:
    proxy = await make(**switches)
    assert type(proxy.server.app[UPSTREAM].transport) is transport


async def test_no_repr_shows_the_key(make: Make) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(2):
        await client.request(poll())
    (route,) = proxy.route_cache._routes.values()
    upstream = proxy.server.app[UPSTREAM]
    texts = [repr(value) for value in (route, route.request, proxy.route_cache, upstream)]
    assert "/fal-ai/flux/requests/" in texts[0]
    assert "1 routes, 1 hits" in texts[2]
    assert "<Pool 1 open, 1 idle" in texts[3]
    assert CANARY.encode() in route.request.head
    assert not any(CANARY in text for text in texts)


async def test_a_drain_closes_the_fast_path(make: Make) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(2):
        await client.request(poll())
    assert proxy.fast_path_hits == 1
    await proxy.server.app.shutdown()
    response = await client.request(poll())
    assert b"Connection: close" in response
    assert proxy.fast_path_hits == 1


def test_aiohttp_has_the_attributes_that_the_protocol_uses() -> None:
    """Fails on a release of aiohttp without these attributes, which turns the fast path off. The
    protocol must then be adapted."""
    assert is_supported()
    assert set(RequestHandler.__slots__) >= REQUIRED_SLOTS


def test_no_fast_path_without_these_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(fal_key="a:b")
    assert fast_path_enabled(settings)
    monkeypatch.setattr(RequestHandler, "__slots__", ("_waiter",))
    assert not fast_path_enabled(settings)


# Bytes


async def test_responses_to_pipelined_requests_are_in_order(make: Make, fal: ScriptedFal) -> None:
    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        number = re.search(rb"x-fal-number: (\d)", request)
        await asyncio.sleep(0.02)
        writer.write(response_bytes(number[1] if number else b"none"))

    fal.respond = respond
    proxy = await make()
    client = await proxy.client()
    requests = [poll(f"x-fal-number: {number}") for number in (1, 2, 3)]
    for request in requests:
        await client.request(request)
    client.writer.write(requests[0])
    await asyncio.sleep(0.01)
    client.writer.write(requests[1])
    await asyncio.sleep(0.005)
    client.writer.write(requests[2] + requests[0])
    assert [(await client.read_response())[-1:] for _ in range(4)] == [b"1", b"2", b"3", b"1"]
    assert proxy.fast_path_hits >= 1


async def test_a_request_in_pieces_takes_the_normal_path(make: Make) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(2):
        client.writer.write(poll()[:60])
        await asyncio.sleep(0.02)
        assert b" 202 " in await client.request(poll()[60:])
    assert proxy.fast_path_hits == 0


async def test_a_forged_request_prefix_does_not_change_the_route_of_others(
    make: Make, fal: ScriptedFal
) -> None:
    """An attacker begins a request so that the bytes of a poll become the rest of it. The route
    must not be cached for the poll."""
    proxy = await make()
    attacker, client = await proxy.client(), await proxy.client()
    prefix = poll(target=f"{REQUEST}/status?attacker=1").removesuffix(b"\r\n") + b"X-Rest: "
    attacker.writer.write(prefix)
    await asyncio.sleep(0.02)
    attacker.writer.write(poll())  # parsed as a header value and further headers
    await asyncio.sleep(0.05)
    await client.request(poll())
    await client.request(poll())
    assert proxy.fast_path_hits == 1
    assert [b"attacker" in seen for seen in fal.seen][-2:] == [False, False]


async def test_a_poll_behind_a_body_in_two_pieces_takes_the_fast_path(
    make: Make, fal: ScriptedFal
) -> None:
    """httpx sends a submit like this: first its head, then its body."""
    proxy = await make()
    client = await proxy.client()
    await client.request(poll())
    fal.response = accepted()
    client.writer.write(submit().removesuffix(SUBMIT_BODY))
    await asyncio.sleep(0.02)
    await client.request(SUBMIT_BODY)
    fal.response = response_bytes()
    await client.request(poll())
    assert proxy.fast_path_hits == 1


async def test_bytes_behind_a_response_end_the_connection_to_fal(
    make: Make, fal: ScriptedFal
) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.request(poll())
    fal.response = response_bytes() + response_bytes(b'"unsolicited"')
    assert (await client.request(poll())).endswith(DOCUMENT)
    fal.response = response_bytes()
    assert (await client.request(poll())).endswith(DOCUMENT)
    assert proxy.fast_path_hits >= 1
    assert fal.closed >= 1


# Failures


async def test_a_disconnect_aborts_the_call_to_fal(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.request(poll())

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        client.writer.close()

    fal.respond = respond
    client.writer.write(poll())
    await wait_until(lambda: fal.closed == 1, seconds=TIMEOUT)
    await wait_until(lambda: proxy.in_progress == 0, seconds=TIMEOUT)
    assert proxy.fast_path_hits == 1
    assert proxy.count("status") == {"202": 1, "499": 1}


async def test_a_poll_whose_connection_breaks_is_sent_again(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.request(poll())

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        fal.respond = None
        raise ConnectionResetError

    fal.respond = respond
    assert b" 202 " in await client.request(poll())
    assert proxy.fast_path_hits == 1
    assert len(fal.seen) == 3
    assert proxy.count("status") == {"202": 2}
    assert proxy.in_progress == 0


@pytest.mark.parametrize("request_bytes", [poll(), submit()], ids=["poll", "submit"])
async def test_a_silent_fal_is_a_504(make: Make, fal: ScriptedFal, request_bytes: bytes) -> None:
    fal.response = accepted()
    proxy = await make(upstream_timeout=0.3)
    client = await proxy.client()
    await client.request(request_bytes)

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(TIMEOUT)

    fal.respond = respond
    started = time.monotonic()
    response = await client.request(request_bytes)
    assert b" 504 " in response
    assert b"upstream_timeout" in response
    assert 0.25 < time.monotonic() - started < 2.0
    assert (b"x-fal-request-timeout-type: user" in response) == request_bytes.startswith(b"POST")
    assert proxy.fast_path_hits == 1
    assert len(fal.seen) == 2


async def test_a_broken_response_is_broken_for_the_client_too(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.request(poll())

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(response_bytes(b"x" * 1000)[:-500])
        await writer.drain()
        await asyncio.sleep(0.05)
        raise ConnectionResetError

    fal.respond = respond
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await client.request(poll())
    assert proxy.fast_path_hits == 1
    assert len(fal.seen) == 2
    await wait_until(lambda: proxy.in_progress == 0, seconds=TIMEOUT)


async def test_a_response_in_two_pieces_stays_on_the_fast_path(
    make: Make, fal: ScriptedFal
) -> None:
    proxy = await make()
    client = await proxy.client()
    first = await client.request(poll())

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        head, _, body = response_bytes().partition(b"{")
        writer.write(head)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"{" + body)

    fal.respond = respond
    for _ in range(3):
        assert without_varying(await client.request(poll())) == without_varying(first)
    assert proxy.fast_path_hits == 3
    assert fal.closed == 0


async def test_fal_may_not_change_the_protocol(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.request(poll())
    fal.response = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    response = await client.request(poll())
    assert b" 502 " in response
    assert b"upstream_broken" in response
    assert proxy.fast_path_hits == 1


async def test_a_disconnect_behind_a_pipelined_request_is_noticed(
    make: Make, fal: ScriptedFal
) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.request(poll())

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(TIMEOUT)

    fal.respond = respond
    client.writer.write(poll())
    await wait_until(lambda: proxy.fast_path_hits == 1, seconds=TIMEOUT)
    client.writer.write(poll())
    await asyncio.sleep(0.05)
    client.writer.close()
    await wait_until(lambda: proxy.count("status").get("499") == 1, seconds=TIMEOUT)
    assert proxy.in_progress == 0


async def test_unsolicited_bytes_are_not_the_response_to_the_next_request(make: Make) -> None:
    """fal sends bytes on an idle connection, unread until the next request comes."""
    listener = socket.create_server(("127.0.0.1", 0))
    idle: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while request := connection.recv(65536):
                idle.append(connection)
                user = re.search(rb"x-fal-user: (\w+)", request)
                connection.sendall(response_bytes(user[1] if user else b"none"))

    def accept() -> None:
        with suppress(OSError):
            while True:
                Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    proxy = await make(upstream_origin=f"http://127.0.0.1:{listener.getsockname()[1]}")
    client = await proxy.client()
    await client.request(poll("x-fal-user: ann"))
    assert (await client.request(poll("x-fal-user: ann"))).endswith(b"ann")
    assert proxy.fast_path_hits == 1
    client.writer.write(poll("x-fal-user: ann"))
    idle[-1].sendall(response_bytes(b"stale"))
    time.sleep(0.1)  # noqa: ASYNC251 - block the event loop, so that both arrive together
    assert (await client.read_response()).endswith(b"ann")
    for _ in range(3):
        assert (await client.request(poll("x-fal-user: ann"))).endswith(b"ann")
    listener.close()


async def test_a_shutdown_waits_for_requests_on_the_fast_path(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.request(poll())
    arrived = asyncio.Event()

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.sleep(0.2)
        writer.write(response_bytes())

    fal.respond = respond
    client.writer.write(poll())
    await arrived.wait()
    stopping = asyncio.create_task(proxy.server.close())
    assert b" 202 " in await client.read_response()
    assert await client.reader.read() == b"", "then the connection ends"
    await stopping
    assert proxy.fast_path_hits == 1


# Submits


async def test_a_submit_of_another_length_takes_the_fast_path(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    fal.response = accepted()
    bodies = [SUBMIT_BODY, b'{"prompt": "another"}', b'{"prompt": "' + b"x" * 5000 + b'"}']
    responses = [await client.request(submit(body)) for body in bodies]
    assert len({without_varying(response) for response in responses}) == 1
    assert proxy.fast_path_hits == 2
    assert [seen.partition(b"\r\n\r\n")[2] for seen in fal.seen] == bodies
    heads = {
        re.sub(rb"content-length: \d+", b"", seen.partition(b"\r\n\r\n")[0]) for seen in fal.seen
    }
    assert len(heads) == 1


async def test_submits_on_the_fast_path_are_in_the_ledger(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    for number in range(3):
        fal.response = accepted(f"request-{number}")
        await client.request(submit())
    assert proxy.fast_path_hits == 2
    await wait_until(lambda: len(proxy.ledger_rows()) == 3, seconds=TIMEOUT)
    assert proxy.ledger_rows() == [
        (200, None, "submit", "fal-ai/flux/dev", f"request-{number}", None, None)
        for number in range(3)
    ]


async def test_the_cost_of_a_submit_is_settled_with_its_result(
    make: Make, fal: ScriptedFal
) -> None:
    proxy = await make()
    client = await proxy.client()
    for number in range(2):
        fal.response = accepted(f"request-{number}")
        await client.request(submit())
        fal.response = response_bytes(
            b'{"images": []}', status=b"200 OK", extra=b"x-fal-billable-units: 2\r\n"
        )
        target = f"https://queue.fal.run/fal-ai/flux/requests/request-{number}"
        await client.request(poll(target=target))
    assert proxy.fast_path_hits == 1
    spent = proxy.server.app[METRICS].snapshot()["spent"]
    assert list(spent) == ["fal-ai/flux/dev"]
    await wait_until(lambda: len(proxy.ledger_rows()) == 2, seconds=TIMEOUT)
    with sqlite3.connect(proxy.folder / "ledger.sqlite") as ledger:
        (total,) = ledger.execute("SELECT SUM(settled) FROM falproxy_outcomes").fetchone()
    assert spent["fal-ai/flux/dev"] == total > 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"image_url": "data:image/png;base64,bm9uZQ=="}', 422, id="not an image"),
        pytest.param(b'{"im\\u0061ge_url": "data:,x"}', 422, id="an escaped field name"),
        pytest.param(b'{"mask_url": "http://127.0.0.1/x"}', 422, id="a private address"),
        pytest.param(b'{"prompt": "' + b"x" * 40_000 + b'"}', 413, id="too large"),
    ],
)
async def test_a_submit_with_images_or_a_large_body_is_checked(
    make: Make, fal: ScriptedFal, body: bytes, status: int
) -> None:
    proxy = await make(max_body=30_000)
    client = await proxy.client()
    fal.response = accepted()
    await client.request(submit())
    assert b" %d " % status in await client.request(submit(body))
    assert proxy.fast_path_hits == 0
    assert len(fal.seen) == 1


async def test_a_submit_for_a_cacheable_model_takes_the_normal_path(
    make: Make, fal: ScriptedFal
) -> None:
    proxy = await make()
    client = await proxy.client()
    fal.response = accepted()
    for seed in range(3):
        body = json.dumps({"prompt": "a lighthouse", "seed": seed}).encode()
        await client.request(submit(body, target="https://queue.fal.run/fal-ai/flux-pro/kontext"))
    assert proxy.fast_path_hits == 0


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"ai_keys": (CANARY, "b:c")}, id="a key rotation"),
        pytest.param({"access_keys": (("ann", KEY),)}, id="an owner"),
    ],
)
async def test_a_submit_with_an_owner_or_a_rotating_key_takes_the_normal_path(
    make: Make, fal: ScriptedFal, settings: dict[str, object]
) -> None:
    proxy = await make(**settings)
    client = await proxy.client()
    fal.response = accepted()
    for _ in range(3):
        assert b" 200 " in await client.request(submit(SUBMIT_BODY, f"x-falproxy-key: {KEY}"))
    assert proxy.fast_path_hits == 0


async def test_the_key_of_an_unknown_job_is_searched_once(make: Make, fal: ScriptedFal) -> None:
    """fal knows the job with one of the keys only. The fast path continues with that key."""
    proxy = await make(ai_keys=("a:1", "b:2", "c:3"))
    client = await proxy.client()

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        refusal = response_bytes(
            b'{"detail": "No user found for Key ID and Secret"}', status=b"401 Unauthorized"
        )
        writer.write(response_bytes() if b"Key b:2" in request else refusal)

    fal.respond = respond
    responses = [await client.request(poll()) for _ in range(9)]
    assert all(b" 202 " in response for response in responses)
    assert sum(b"Key a:1" in request for request in fal.seen) == 1
    assert sum(b"Key b:2" in request for request in fal.seen) == 9


async def test_a_poll_with_a_body_takes_the_normal_path(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(3):
        await client.request(poll("Content-Type: application/json", "Content-Length: 2") + b"{}")
    assert proxy.fast_path_hits == 0
    assert all(seen.endswith(b"{}") for seen in fal.seen)


async def test_a_submit_is_never_sent_twice(make: Make, fal: ScriptedFal) -> None:
    """fal may have accepted it before the connection broke."""
    proxy = await make()
    client = await proxy.client()
    fal.response = accepted()
    await client.request(submit())

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        raise ConnectionResetError

    fal.respond = respond
    response = await client.request(submit())
    assert b" 504 " in response
    assert b"upstream_broken" in response
    assert b"x-fal-request-timeout-type: user" in response
    assert proxy.fast_path_hits == 1
    assert len(fal.seen) == 2
    await wait_until(lambda: len(proxy.ledger_rows()) == 2, seconds=TIMEOUT)
    assert proxy.ledger_rows()[1][0] == 504
    assert proxy.ledger_rows()[1][-2:] == ("upstream_broken", None), "the cost is unknown"


async def test_a_submit_is_not_sent_on_a_connection_that_fal_has_closed(
    make: Make, fal: ScriptedFal
) -> None:
    proxy = await make()
    client = await proxy.client()

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(accepted())
        await writer.drain()
        fal.respond = None
        fal.response = accepted()
        raise ConnectionError

    fal.respond = respond
    await client.request(submit())
    assert b" 200 " in await client.request(submit())
    assert len(fal.seen) == 2


async def test_a_submit_whose_client_left_is_recorded_without_a_cost(
    make: Make, fal: ScriptedFal
) -> None:
    proxy = await make()
    client = await proxy.client()
    fal.response = accepted()
    await client.request(submit())

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        client.writer.close()

    fal.respond = respond
    client.writer.write(submit())
    await wait_until(lambda: len(proxy.ledger_rows()) == 2, seconds=TIMEOUT)
    assert proxy.fast_path_hits == 1
    status, *_, error, settled = proxy.ledger_rows()[1]
    assert (status, error, settled) == (499, "client_left", None)
    assert proxy.count("submit") == {"200": 1, "499": 1}


UNUSUAL_RESPONSES = [
    pytest.param(response_bytes(b"{}", status=b"500 Oops"), 500, id="a server error"),
    pytest.param(response_bytes(b"{}", status=b"422 Unprocessable"), 422, id="a client error"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\n" + DATE + TYPE + b"x-fal-request-id: paid\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        200,
        id="chunked",
    ),
    pytest.param(b"HTTP/1.1 200 nonsense\r\n:\r\n\r\n", 504, id="broken"),
]


@pytest.mark.parametrize(("response", "status"), UNUSUAL_RESPONSES)
@pytest.mark.parametrize("is_reset", [False, True], ids=["close", "reset"])
async def test_a_submit_whose_client_leaves_during_the_fallback_is_recorded(
    make: Make, fal: ScriptedFal, response: bytes, status: int, is_reset: bool
) -> None:
    """fal's response and the client's disconnect arrive in the same iteration of the event loop."""
    proxy = await make()
    client = await proxy.client()
    fal.response = accepted("first")
    await client.request(submit())
    raw = socket.create_connection(("127.0.0.1", proxy.server.port or 0))
    if is_reset:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await asyncio.sleep(0.05)  # until the connection is accepted
    arrived = asyncio.Event()

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.sleep(0.02)
        writer.write(response)
        raw.close()

    fal.respond = respond
    raw.sendall(submit())
    await arrived.wait()
    await wait_until(lambda: len(proxy.ledger_rows()) == 2, seconds=TIMEOUT)
    assert len(fal.seen) == 2
    assert proxy.fast_path_hits == 1
    assert proxy.ledger_rows()[1][0] in (status, 499)
    await wait_until(lambda: proxy.in_progress == 0, seconds=TIMEOUT)
    assert sum(proxy.count("submit").values()) == 2


@pytest.mark.parametrize(
    "after", [0.1, 1.2 * DRAIN], ids=["early in the drain", "late in the drain"]
)
@pytest.mark.parametrize(("response", "status"), UNUSUAL_RESPONSES)
async def test_a_response_during_a_drain_reaches_the_client(
    make: Make, fal: ScriptedFal, response: bytes, status: int, after: float
) -> None:
    """aiohttp waits for handlers, and once more as long for those it cancels then."""
    proxy = await make()
    client = await proxy.client()
    fal.response = accepted("first")
    await client.request(submit())
    arrived = asyncio.Event()

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.sleep(after)
        writer.write(response)

    fal.respond = respond
    assert proxy.server.runner is not None
    proxy.server.runner._shutdown_timeout = DRAIN
    client.writer.write(submit())
    await arrived.wait()
    stopping = asyncio.create_task(proxy.server.close())
    assert b" %d " % status in await client.read_response()
    await stopping
    assert proxy.ledger_rows()[1][0] == status
    assert proxy.fast_path_hits == 1


async def test_a_fallback_keeps_the_timings(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    fal.response = accepted()
    await client.request(submit())

    async def respond(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        writer.write(response_bytes(b"{}", status=b"500 Oops"))

    fal.respond = respond
    started = time.time()
    await client.request(submit())
    elapsed = time.time() - started
    await wait_until(lambda: len(proxy.ledger_rows()) == 2, seconds=TIMEOUT)
    with sqlite3.connect(proxy.folder / "ledger.sqlite") as ledger:
        at, seconds, upstream = ledger.execute(
            "SELECT at, seconds, upstream_seconds FROM falproxy_entries ORDER BY rowid DESC"
        ).fetchone()
    assert -0.01 < at / 1000 - started < elapsed
    assert 0.19 < upstream <= seconds < elapsed


async def test_an_idle_connection_frees_its_last_request(make: Make, fal: ScriptedFal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.request(submit(b'{"prompt": "' + b"x" * 10_000 + b'"}'))
    assert proxy.server.runner is not None
    assert proxy.server.runner.server is not None
    (protocol,) = proxy.server.runner.server.connections
    assert isinstance(protocol, FastPathProtocol)
    assert protocol._raw_request is None


@pytest.mark.parametrize(
    ("data", "key", "body"),
    [
        pytest.param(poll(), poll(), b"", id="a poll: the key is the whole request"),
        pytest.param(
            submit(), submit().replace(b"\r\n" + LENGTH, b"").removesuffix(SUBMIT_BODY),
            SUBMIT_BODY,
            id="a submit: the key is the head without the length",
        ),
        pytest.param(submit()[:-1], b"", b"", id="an incomplete body"),
        pytest.param(submit() + b"x", b"", b"", id="bytes behind the body"),
        pytest.param(submit().replace(b"\r\n\r\n", b"\r\n"), b"", b"", id="an incomplete head"),
        pytest.param(
            submit().replace(LENGTH, b"Transfer-Encoding: chunked"), b"", b"",
            id="no length",
        ),
    ],
)  # fmt: skip
def test_split_request(data: bytes, key: bytes, body: bytes) -> None:
    assert split_request(data) == (key, body)


def counting(requests: list[str]) -> Middleware:
    @web.middleware
    async def counting_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        requests.append(request.path)
        return await handler(request)

    return counting_middleware


@pytest.mark.parametrize(
    ("declare", "fewest", "most"),
    [
        pytest.param(lambda middleware: middleware, 12, 12, id="undeclared: it sees every request"),
        pytest.param(head_only, 1, 2, id="declared: repeated requests take the fast path"),
    ],
)
async def test_an_undeclared_middleware_sees_every_request(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    declare: Callable[[Middleware], Middleware],
    fewest: int,
    most: int,
) -> None:
    requests: list[str] = []
    added = declare(counting(requests))
    monkeypatch.setattr(
        "falproxy.app.authorization",
        lambda *args, **options: [*authorization(*args, **options), added],
    )
    caplog.set_level(logging.DEBUG, "falproxy.server.fast_path.route_cache")
    proxy = await make()
    client = await proxy.client()
    for _ in range(12):
        assert (await client.request(poll())).startswith(b"HTTP/1.1 202")
    assert fewest <= len(requests) <= most
    assert proxy.fast_path_hits == 12 - len(requests)
    unused = [line for line in caplog.messages if "counting_middleware (not head_only)" in line]
    assert len(unused) == (len(requests) == 12)


async def test_an_undeclared_middleware_of_the_application_sees_every_request(
    fal: ScriptedFal, tmp_path: Path
) -> None:
    requests: list[str] = []
    settings = make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path)
    app = create_app(settings)
    app.middlewares.append(counting(requests))
    server = FastPathTestServer(app)
    await server.start_server()
    client = Client(*await asyncio.open_connection("127.0.0.1", server.port))
    for _ in range(12):
        assert (await client.request(poll())).startswith(b"HTTP/1.1 202")
    assert len(requests) == 12
    client.writer.close()
    await server.close()
