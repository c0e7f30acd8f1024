"""The lane: what comes again is answered as the layers would, and what is not plain is theirs."""

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
from pathlib import Path
from threading import Thread

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
from tests.support.fake_fal import read_head
from tests.support.gateway import DoorServer
from tests.support.key_search import CANARY, LEAKS
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST, SUBMIT

pytestmark = pytest.mark.both_event_loops

DATE = b"Date: Sat, 21 Nov 2026 12:00:00 GMT\r\n"
TYPE = b"Content-Type: application/json\r\n"
DOCUMENT = b'{"status": "IN_PROGRESS"}'
ORDER = b'{"prompt": "a lighthouse\\n", "num_images": 1}'
LENGTH = b"Content-Length: %d" % len(ORDER)
KEY = "a-key-of-16-chars"
OTHER_KEY = "another-key-of-16"
# What differs from one answer to the next.
OWN = re.compile(
    rb"(?i)(x-request-id: [0-9a-f]{32}|falproxy;dur=[0-9.]+, fal;dur=[0-9.]+|\r\ndate: [^\r]+)"
)
PATIENCE = 5.0


def said(
    body: bytes = DOCUMENT,
    *,
    status: bytes = b"202 Accepted",
    extra: bytes = b"",
    date: bytes = DATE,
) -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 %b\r\n%b%b%b%b\r\n%b" % (status, date, TYPE, length, extra, body)


Play = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class Fal:
    """fal as bytes on kept connections. play: how it answers a request; None says `answer`."""

    origin: str = ""
    answer: bytes = field(default_factory=said)
    play: Play | None = None
    seen: list[bytes] = field(default_factory=list)
    left: int = 0  # connections that the proxy has closed

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await read_head(reader)
                self.seen.append(request)
                if self.play is not None:
                    await self.play(request, writer)
                else:
                    writer.write(self.answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left += 1
        finally:
            writer.close()


@pytest.fixture
async def fal() -> AsyncIterator[Fal]:
    fake = Fal()
    server = await asyncio.start_server(fake.accept, "127.0.0.1", 0)
    fake.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield fake
    server.close()


@dataclass(slots=True)
class Client:
    """One connection to the proxy."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, data: bytes) -> bytes:
        self.writer.write(data)
        return await self.answer()

    async def answer(self) -> bytes:
        """The next answer, whose body has a length or comes in chunks."""
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            if b"transfer-encoding: chunked" in head.lower():
                return head + await self.reader.readuntil(b"0\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            answer = head + await self.reader.readexactly(int(length[1]) if length else 0)
        LEAKS.look(answer.decode("latin-1"), "an answer's bytes")
        return answer


@dataclass(slots=True)
class Proxy:
    server: DoorServer
    folder: Path
    clients: list[Client] = field(default_factory=list)

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.server.port))
        self.clients.append(client)
        return client

    def count(self, operation: str) -> dict[str, int]:
        """Requests of an operation by their status."""
        requests = self.server.app[METRICS].snapshot()["requests"]
        words = {name: name.split(" ") for name in requests}
        return {word[1]: requests[name] for name, word in words.items() if word[0] == operation}

    @property
    def passes(self) -> RouteCache:
        return self.server.app[ROUTE_CACHE]

    @property
    def taken(self) -> int:
        """How many requests took the lane."""
        return self.passes.hits

    @property
    def in_progress(self) -> int:
        return self.server.app[METRICS].in_progress

    def entries(self) -> list[tuple[object, ...]]:
        """What the ledger has, the oldest first."""
        with sqlite3.connect(self.folder / "ledger.sqlite") as ledger:
            return ledger.execute(
                "SELECT status, principal, operation, endpoint, request_id, error, settled"
                " FROM falproxy_entries ORDER BY rowid"
            ).fetchall()


Make = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def make(fal: Fal, tmp_path: Path) -> AsyncIterator[Make]:
    started: list[Proxy] = []

    async def start(**given: object) -> Proxy:
        folder = tmp_path / str(len(started))
        settings = {"fal_key": CANARY, "upstream_origin": fal.origin, "data_dir": folder} | given
        server = DoorServer(create_app(make_settings(**settings)))
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


def order(body: bytes = ORDER, *lines: str, target: str = SUBMIT) -> bytes:
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
    return said(document, status=b"200 OK", extra=f"x-fal-request-id: {request_id}\r\n".encode())


def plain(answer: bytes) -> bytes:
    return OWN.sub(b"", answer)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not is_so():
            await asyncio.sleep(0.01)


# What takes the lane, and how it is answered


async def test_a_poll_that_came_before_takes_the_lane(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    first = await client.ask(poll())
    assert proxy.taken == 0
    second = await client.ask(poll())
    assert proxy.taken == 1
    assert plain(first) == plain(second)
    assert fal.seen[0] == fal.seen[1]


async def test_it_is_known_again_on_another_connection(make: Make) -> None:
    proxy = await make()
    for _ in range(3):
        await (await proxy.client()).ask(poll())
    assert proxy.taken == 2


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(poll(target=f"{REQUEST}/status?logs=1"), id="another query"),
        pytest.param(poll("Accept: */*"), id="another header"),
        pytest.param(poll().replace(b"x-fal", b"X-Fal"), id="the same in other letters"),
    ],
)
async def test_what_differs_by_a_byte_goes_through_the_layers(make: Make, other: bytes) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.ask(poll())
    await client.ask(other)
    assert proxy.taken == 0


@pytest.mark.parametrize(
    ("answer", "is_plain"),
    [
        pytest.param(said(), True, id="as usual"),
        pytest.param(said(status=b"200 OK"), True, id="done"),
        pytest.param(said(b""), True, id="no body"),
        pytest.param(said(extra=b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n"), True, id="repeats"),
        pytest.param(said(extra=b"Alt-Svc: h3\r\nServer: uvicorn\r\n"), True, id="not ours"),
        pytest.param(said(extra=b"X-Request-ID: fal-s-own\r\n"), True, id="fal's own id"),
        pytest.param(said(extra=b"X-Name: caf\xc3\xa9\r\n"), True, id="a name in UTF-8"),
        pytest.param(said(extra=b"Content-Encoding: gzip\r\n"), True, id="coded"),
        pytest.param(said(extra=b"Connection: x-a\r\nX-A: 1\r\n"), False, id="hop by hop"),
        pytest.param(said(date=b""), False, id="no date"),
        pytest.param(said(status=b"400 Bad Request"), False, id="refused"),
        pytest.param(said(status=b"404 Not Found"), False, id="not found"),
        pytest.param(said(status=b"429 Too Many Requests"), False, id="too many"),
        pytest.param(said(status=b"500 Internal Server Error"), False, id="an error of fal's"),
        pytest.param(said(b"x" * 300_000), False, id="large"),
        pytest.param(
            b"HTTP/1.1 202 Accepted\r\n" + DATE + TYPE + b"Transfer-Encoding: chunked\r\n\r\n"
            b"2\r\n{}\r\n0\r\n\r\n",
            False,
            id="chunked",
        ),
    ],
)
async def test_an_answer_on_the_lane_is_that_of_the_layers(
    make: Make, fal: Fal, answer: bytes, is_plain: bool
) -> None:
    """Each kind of answer comes as the first one, and again when a plain one has come before."""
    proxy = await make(allowed_origins=("https://app.example",))
    client = await proxy.client()
    fal.answer = answer
    by_layers = await client.ask(poll("Origin: https://app.example", "Accept: */*"))
    fal.answer = said()
    await client.ask(poll("Origin: https://app.example"))
    fal.answer = answer
    came = proxy.taken
    by_lane = await client.ask(poll("Origin: https://app.example"))
    assert proxy.taken == came + 1
    assert plain(by_lane) == plain(by_layers)
    assert len(fal.seen) == 3, "nothing is asked twice"
    assert proxy.in_progress == 0
    assert sum(proxy.count("status").values()) == 3
    fal.answer = said()
    assert plain(await client.ask(poll("Origin: https://app.example"))).endswith(DOCUMENT)
    assert is_plain or proxy.taken == came + 2


async def test_an_answer_names_its_request_and_its_time(make: Make) -> None:
    proxy = await make()
    client = await proxy.client()
    ids = [re.search(rb"X-Request-ID: (\w{32})", await client.ask(poll())) for _ in range(3)]
    assert len({found[1] for found in ids if found}) == 3
    assert b"Server-Timing: falproxy;dur=" in await client.ask(poll())
    assert proxy.taken == 3


async def test_an_id_that_the_client_gave_is_kept(make: Make) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(2):
        answer = await client.ask(poll("X-Request-ID: from-the-balancer"))
        assert b"X-Request-ID: from-the-balancer\r\n" in answer
    assert proxy.taken == 1


async def test_calls_on_the_lane_are_logged_as_all_are(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(2):
        await client.ask(poll())
    await until(lambda: sum(record.name == "falproxy.calls" for record in caplog.records) == 2)
    first, second = (
        record.fields  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "falproxy.calls"
    )
    assert proxy.taken == 1
    assert first.keys() == second.keys()
    own = {"request_id", "seconds", "upstream_seconds"}
    assert {**first, **dict.fromkeys(own)} == {**second, **dict.fromkeys(own)}
    assert 0 < second["upstream_seconds"] <= second["seconds"]


# What does not take it


async def test_another_s_key_opens_no_lane(make: Make, fal: Fal) -> None:
    keys = (("ann", KEY), ("bob", OTHER_KEY))
    proxy = await make(access_keys=keys)
    client = await proxy.client()
    fal.answer = accepted()
    await client.ask(order(ORDER, f"x-falproxy-key: {KEY}"))
    fal.answer = said()
    asked = len(fal.seen)
    for _ in range(2):
        assert b" 202 " in await client.ask(poll(f"x-falproxy-key: {KEY}"))
        assert b" 404 " in await client.ask(poll(f"x-falproxy-key: {OTHER_KEY}"))
        assert b" 401 " in await client.ask(poll("x-falproxy-key: wrong"))
        assert b" 401 " in await client.ask(poll())
    assert proxy.taken == 1
    assert len(fal.seen) == asked + 2


async def test_a_pass_runs_out(make: Make) -> None:
    proxy = await make()
    proxy.passes.ttl = -1.0
    client = await proxy.client()
    for _ in range(3):
        await client.ask(poll())
    assert proxy.taken == 0


async def test_only_so_many_are_remembered(make: Make) -> None:
    proxy = await make()
    proxy.passes.max_routes = 2
    client = await proxy.client()
    for number in (1, 2, 3, 1):
        await client.ask(poll(f"X-Number: {number}"))
    assert proxy.taken == 0
    assert len(proxy.passes._routes) == 2
    await client.ask(poll("X-Number: 3"))
    assert proxy.taken == 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(poll("Connection: close"), id="the connection ends with it"),
        pytest.param(poll().replace(b"HTTP/1.1", b"HTTP/1.0"), id="an older HTTP"),
        pytest.param(poll(target=REQUEST), id="a result"),
        pytest.param(poll(target=f"{REQUEST}/status/stream"), id="a stream"),
        pytest.param(poll("X-Long: " + "x" * 3000), id="a long head"),
        pytest.param(b"\r\n" + poll(), id="an empty line before it"),
    ],
)
async def test_these_go_through_the_layers(make: Make, request_bytes: bytes) -> None:
    proxy = await make()
    for _ in range(3):
        await (await proxy.client()).ask(request_bytes)
    assert proxy.taken == 0


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"fast_path": False}, id="switched off"),
        pytest.param({"transport": "aiohttp"}, id="without the transport that it needs"),
        pytest.param({"jwt_secret": "x" * 32}, id="a token runs out"),
    ],
)
async def test_there_may_be_no_lane(make: Make, given: dict[str, object]) -> None:
    proxy = await make(**given)
    assert ROUTE_CACHE not in proxy.server.app
    assert await (await proxy.client()).ask(poll())


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


async def test_a_drain_closes_the_lane(make: Make) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(2):
        await client.ask(poll())
    assert proxy.taken == 1
    await proxy.server.app.shutdown()
    answer = await client.ask(poll())
    assert b"Connection: close" in answer
    assert proxy.taken == 1


def test_what_the_door_stands_on_is_there() -> None:
    """Fails on a release of aiohttp that has changed it. Then there is no lane; see what the
    protocol has become, and mend the door."""
    assert is_supported()
    assert set(RequestHandler.__slots__) >= REQUIRED_SLOTS


def test_no_lane_without_what_the_door_stands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(fal_key="a:b")
    assert fast_path_enabled(settings)
    monkeypatch.setattr(RequestHandler, "__slots__", ("_waiter",))
    assert not fast_path_enabled(settings)


# Bytes


async def test_requests_one_behind_the_other_are_answered_in_their_order(
    make: Make, fal: Fal
) -> None:
    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        number = re.search(rb"x-fal-number: (\d)", request)
        await asyncio.sleep(0.02)
        writer.write(said(number[1] if number else b"none"))

    fal.play = play
    proxy = await make()
    client = await proxy.client()
    numbered = [poll(f"x-fal-number: {number}") for number in (1, 2, 3)]
    for each in numbered:
        await client.ask(each)
    client.writer.write(numbered[0])
    await asyncio.sleep(0.01)
    client.writer.write(numbered[1])
    await asyncio.sleep(0.005)
    client.writer.write(numbered[2] + numbered[0])
    assert [(await client.answer())[-1:] for _ in range(4)] == [b"1", b"2", b"3", b"1"]
    assert proxy.taken >= 1


async def test_a_request_in_pieces_is_the_layers_(make: Make) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(2):
        client.writer.write(poll()[:60])
        await asyncio.sleep(0.02)
        assert b" 202 " in await client.ask(poll()[60:])
    assert proxy.taken == 0


async def test_nobody_is_given_what_another_put_before_his_words(make: Make, fal: Fal) -> None:
    """Somebody begins a request and lets another's words be the rest of it: what is made of them
    is his alone."""
    proxy = await make()
    evil, good = await proxy.client(), await proxy.client()
    begun = poll(target=f"{REQUEST}/status?evil=1").removesuffix(b"\r\n") + b"X-Rest: "
    evil.writer.write(begun)
    await asyncio.sleep(0.02)
    evil.writer.write(poll())  # read as a header's value, and more headers
    await asyncio.sleep(0.05)
    await good.ask(poll())
    await good.ask(poll())
    assert proxy.taken == 1
    assert [b"evil" in seen for seen in fal.seen][-2:] == [False, False]


async def test_a_poll_behind_a_body_in_two_pieces_takes_the_lane(make: Make, fal: Fal) -> None:
    """As httpx sends an order: first its head, then its body."""
    proxy = await make()
    client = await proxy.client()
    await client.ask(poll())
    fal.answer = accepted()
    client.writer.write(order().removesuffix(ORDER))
    await asyncio.sleep(0.02)
    await client.ask(ORDER)
    fal.answer = said()
    await client.ask(poll())
    assert proxy.taken == 1


async def test_what_comes_behind_fal_s_answer_ends_the_connection(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.ask(poll())
    fal.answer = said() + said(b'"of nobody"')
    assert (await client.ask(poll())).endswith(DOCUMENT)
    fal.answer = said()
    assert (await client.ask(poll())).endswith(DOCUMENT)
    assert proxy.taken >= 1
    assert fal.left >= 1


# Failures


async def test_a_client_that_leaves_takes_its_call_with_it(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.ask(poll())

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        client.writer.close()

    fal.play = play
    client.writer.write(poll())
    await until(lambda: fal.left == 1)
    await until(lambda: proxy.in_progress == 0)
    assert proxy.taken == 1
    assert proxy.count("status") == {"202": 1, "499": 1}


async def test_a_poll_that_breaks_off_is_asked_again(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.ask(poll())

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        fal.play = None
        raise ConnectionResetError

    fal.play = play
    assert b" 202 " in await client.ask(poll())
    assert proxy.taken == 1
    assert len(fal.seen) == 3
    assert proxy.count("status") == {"202": 2}
    assert proxy.in_progress == 0


@pytest.mark.parametrize("request_bytes", [poll(), order()], ids=["poll", "order"])
async def test_a_silent_fal_is_a_504(make: Make, fal: Fal, request_bytes: bytes) -> None:
    fal.answer = accepted()
    proxy = await make(upstream_timeout=0.3)
    client = await proxy.client()
    await client.ask(request_bytes)

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(PATIENCE)

    fal.play = play
    began = time.monotonic()
    answer = await client.ask(request_bytes)
    assert b" 504 " in answer
    assert b"upstream_timeout" in answer
    assert 0.25 < time.monotonic() - began < 2.0
    assert (b"x-fal-request-timeout-type: user" in answer) == request_bytes.startswith(b"POST")
    assert proxy.taken == 1
    assert len(fal.seen) == 2


async def test_an_answer_that_breaks_off_breaks_off(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.ask(poll())

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(said(b"x" * 1000)[:-500])
        await writer.drain()
        await asyncio.sleep(0.05)
        raise ConnectionResetError

    fal.play = play
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await client.ask(poll())
    assert proxy.taken == 1
    assert len(fal.seen) == 2
    await until(lambda: proxy.in_progress == 0)


async def test_an_answer_in_two_pieces_is_waited_for(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    first = await client.ask(poll())

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        head, _, body = said().partition(b"{")
        writer.write(head)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"{" + body)

    fal.play = play
    for _ in range(3):
        assert plain(await client.ask(poll())) == plain(first)
    assert proxy.taken == 3
    assert fal.left == 0


async def test_fal_may_not_change_the_protocol(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.ask(poll())
    fal.answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    answer = await client.ask(poll())
    assert b" 502 " in answer
    assert b"upstream_broken" in answer
    assert proxy.taken == 1


async def test_a_client_that_leaves_with_more_behind_its_request_is_noticed(
    make: Make, fal: Fal
) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.ask(poll())

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(PATIENCE)

    fal.play = play
    client.writer.write(poll())
    await until(lambda: proxy.taken == 1)
    client.writer.write(poll())
    await asyncio.sleep(0.05)
    client.writer.close()
    await until(lambda: proxy.count("status").get("499") == 1)
    assert proxy.in_progress == 0


async def test_a_late_word_of_fal_s_is_not_the_next_one_s_answer(make: Make) -> None:
    """What comes on an idle connection, and was not read yet when the next request is there."""
    listener = socket.create_server(("127.0.0.1", 0))
    idle: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while request := connection.recv(65536):
                idle.append(connection)
                who = re.search(rb"x-fal-who: (\w+)", request)
                connection.sendall(said(who[1] if who else b"nobody"))

    def accept() -> None:
        with suppress(OSError):
            while True:
                Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    proxy = await make(upstream_origin=f"http://127.0.0.1:{listener.getsockname()[1]}")
    client = await proxy.client()
    await client.ask(poll("x-fal-who: ann"))
    assert (await client.ask(poll("x-fal-who: ann"))).endswith(b"ann")
    assert proxy.taken == 1
    client.writer.write(poll("x-fal-who: ann"))
    idle[-1].sendall(said(b"stale"))
    time.sleep(0.1)  # noqa: ASYNC251 - the event loop is busy, so that both are there at once
    assert (await client.answer()).endswith(b"ann")
    for _ in range(3):
        assert (await client.ask(poll("x-fal-who: ann"))).endswith(b"ann")
    listener.close()


async def test_a_stop_waits_for_what_is_on_the_lane(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.ask(poll())
    arrived = asyncio.Event()

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.sleep(0.2)
        writer.write(said())

    fal.play = play
    client.writer.write(poll())
    await arrived.wait()
    stopping = asyncio.create_task(proxy.server.close())
    assert b" 202 " in await client.answer()
    assert await client.reader.read() == b"", "then the connection ends"
    await stopping
    assert proxy.taken == 1


# Orders


async def test_an_order_takes_the_lane_with_whatever_length(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    fal.answer = accepted()
    bodies = [ORDER, b'{"prompt": "another"}', b'{"prompt": "' + b"x" * 5000 + b'"}']
    answers = [await client.ask(order(body)) for body in bodies]
    assert len({plain(answer) for answer in answers}) == 1
    assert proxy.taken == 2
    assert [seen.partition(b"\r\n\r\n")[2] for seen in fal.seen] == bodies
    heads = {
        re.sub(rb"content-length: \d+", b"", seen.partition(b"\r\n\r\n")[0]) for seen in fal.seen
    }
    assert len(heads) == 1


async def test_orders_on_the_lane_are_in_the_ledger(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    for number in range(3):
        fal.answer = accepted(f"request-{number}")
        await client.ask(order())
    assert proxy.taken == 2
    await until(lambda: len(proxy.entries()) == 3)
    assert proxy.entries() == [
        (200, None, "submit", "fal-ai/flux/dev", f"request-{number}", None, None)
        for number in range(3)
    ]


async def test_what_an_order_bought_is_settled_with_its_result(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    for number in range(2):
        fal.answer = accepted(f"request-{number}")
        await client.ask(order())
        fal.answer = said(b'{"images": []}', status=b"200 OK", extra=b"x-fal-billable-units: 2\r\n")
        target = f"https://queue.fal.run/fal-ai/flux/requests/request-{number}"
        await client.ask(poll(target=target))
    assert proxy.taken == 1
    spent = proxy.server.app[METRICS].snapshot()["spent"]
    assert list(spent) == ["fal-ai/flux/dev"]
    await until(lambda: len(proxy.entries()) == 2)
    with sqlite3.connect(proxy.folder / "ledger.sqlite") as ledger:
        (total,) = ledger.execute("SELECT SUM(settled) FROM falproxy_outcomes").fetchone()
    assert spent["fal-ai/flux/dev"] == total > 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"image_url": "data:image/png;base64,bm9uZQ=="}', 422, id="no picture"),
        pytest.param(b'{"im\\u0061ge_url": "data:,x"}', 422, id="an escape in its name"),
        pytest.param(b'{"mask_url": "http://127.0.0.1/x"}', 422, id="an address inside"),
        pytest.param(b'{"prompt": "' + b"x" * 40_000 + b'"}', 413, id="too large"),
    ],
)
async def test_an_order_with_more_to_it_is_looked_at(
    make: Make, fal: Fal, body: bytes, status: int
) -> None:
    proxy = await make(max_body=30_000)
    client = await proxy.client()
    fal.answer = accepted()
    await client.ask(order())
    assert b" %d " % status in await client.ask(order(body))
    assert proxy.taken == 0
    assert len(fal.seen) == 1


async def test_an_order_for_what_the_cache_knows_goes_through_the_layers(
    make: Make, fal: Fal
) -> None:
    proxy = await make()
    client = await proxy.client()
    fal.answer = accepted()
    for seed in range(3):
        body = json.dumps({"prompt": "a lighthouse", "seed": seed}).encode()
        await client.ask(order(body, target="https://queue.fal.run/fal-ai/flux-pro/kontext"))
    assert proxy.taken == 0


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"ai_keys": (CANARY, "b:c")}, id="several keys take turns"),
        pytest.param({"access_keys": (("ann", KEY),)}, id="it matters whose it is"),
    ],
)
async def test_an_order_that_is_kept_track_of_goes_through_the_layers(
    make: Make, fal: Fal, given: dict[str, object]
) -> None:
    proxy = await make(**given)
    client = await proxy.client()
    fal.answer = accepted()
    for _ in range(3):
        assert b" 200 " in await client.ask(order(ORDER, f"x-falproxy-key: {KEY}"))
    assert proxy.taken == 0


async def test_a_poll_with_a_key_that_was_drawn_goes_through_the_layers(
    make: Make, fal: Fal
) -> None:
    """Nobody here knows its request. A key that is revoked is left alone, and no other."""
    proxy = await make(ai_keys=("a:1", "b:2", "c:3"))
    client = await proxy.client()

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        is_revoked = b"Key b:2" in request
        writer.write(said(status=b"401 Unauthorized") if is_revoked else said())

    fal.play = play
    answers = [await client.ask(poll()) for _ in range(9)]
    assert sum(b" 401 " in answer for answer in answers) == 1
    assert proxy.taken == 0


async def test_a_poll_with_a_body_goes_through_the_layers(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    for _ in range(3):
        await client.ask(poll("Content-Type: application/json", "Content-Length: 2") + b"{}")
    assert proxy.taken == 0
    assert all(seen.endswith(b"{}") for seen in fal.seen)


async def test_an_order_is_never_sent_twice(make: Make, fal: Fal) -> None:
    """fal may have it, whatever became of the connection."""
    proxy = await make()
    client = await proxy.client()
    fal.answer = accepted()
    await client.ask(order())

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        raise ConnectionResetError

    fal.play = play
    answer = await client.ask(order())
    assert b" 504 " in answer
    assert b"upstream_broken" in answer
    assert b"x-fal-request-timeout-type: user" in answer
    assert proxy.taken == 1
    assert len(fal.seen) == 2
    await until(lambda: len(proxy.entries()) == 2)
    assert proxy.entries()[1][0] == 504
    assert proxy.entries()[1][-2:] == ("upstream_broken", None), "nobody knows what it cost"


async def test_an_order_is_not_written_into_a_connection_that_fal_has_closed(
    make: Make, fal: Fal
) -> None:
    proxy = await make()
    client = await proxy.client()

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(accepted())
        await writer.drain()
        fal.play = None
        fal.answer = accepted()
        raise ConnectionError

    fal.play = play
    await client.ask(order())
    assert b" 200 " in await client.ask(order())
    assert len(fal.seen) == 2


async def test_an_order_whose_client_left_may_have_been_bought(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    fal.answer = accepted()
    await client.ask(order())

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        client.writer.close()

    fal.play = play
    client.writer.write(order())
    await until(lambda: len(proxy.entries()) == 2)
    assert proxy.taken == 1
    status, *_, error, settled = proxy.entries()[1]
    assert (status, error, settled) == (499, "client_left", None)
    assert proxy.count("submit") == {"200": 1, "499": 1}


ODD_ANSWERS = [
    pytest.param(said(b"{}", status=b"500 Oops"), 500, id="an error"),
    pytest.param(said(b"{}", status=b"422 Unprocessable"), 422, id="a refusal"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\n" + DATE + TYPE + b"x-fal-request-id: paid\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        200,
        id="chunked",
    ),
    pytest.param(b"HTTP/1.1 200 nonsense\r\n:\r\n\r\n", 504, id="broken"),
]


@pytest.mark.parametrize(("answer", "status"), ODD_ANSWERS)
@pytest.mark.parametrize("is_reset", [False, True], ids=["it closes", "it resets"])
async def test_an_order_is_written_down_whose_client_leaves_between_lane_and_layers(
    make: Make, fal: Fal, answer: bytes, status: int, is_reset: bool
) -> None:
    """fal's answer and the client's end are there in the same turn of the event loop."""
    proxy = await make()
    client = await proxy.client()
    fal.answer = accepted("first")
    await client.ask(order())
    raw = socket.create_connection(("127.0.0.1", proxy.server.port or 0))
    if is_reset:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await asyncio.sleep(0.05)  # it is let in
    arrived = asyncio.Event()

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.sleep(0.02)
        writer.write(answer)
        raw.close()

    fal.play = play
    raw.sendall(order())
    await arrived.wait()
    await until(lambda: len(proxy.entries()) == 2)
    assert len(fal.seen) == 2
    assert proxy.taken == 1
    assert proxy.entries()[1][0] in (status, 499)
    await until(lambda: proxy.in_progress == 0)
    assert sum(proxy.count("submit").values()) == 2


@pytest.mark.parametrize("after", [0.1, 0.7], ids=["soon", "late in the drain"])
@pytest.mark.parametrize(("answer", "status"), ODD_ANSWERS)
async def test_an_order_that_is_answered_in_a_drain_is_answered(
    make: Make, fal: Fal, answer: bytes, status: int, after: float
) -> None:
    """aiohttp waits half of the drain for handlers, and as long for those it then cancels."""
    proxy = await make()
    client = await proxy.client()
    fal.answer = accepted("first")
    await client.ask(order())
    arrived = asyncio.Event()

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.sleep(after)
        writer.write(answer)

    fal.play = play
    assert proxy.server.runner is not None
    proxy.server.runner._shutdown_timeout = 0.5
    client.writer.write(order())
    await arrived.wait()
    stopping = asyncio.create_task(proxy.server.close())
    assert b" %d " % status in await client.answer()
    await stopping
    assert proxy.entries()[1][0] == status
    assert proxy.taken == 1


async def test_an_order_that_is_handed_over_took_the_time_it_took(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    fal.answer = accepted()
    await client.ask(order())

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        writer.write(said(b"{}", status=b"500 Oops"))

    fal.play = play
    began = time.time()
    await client.ask(order())
    await until(lambda: len(proxy.entries()) == 2)
    with sqlite3.connect(proxy.folder / "ledger.sqlite") as ledger:
        at, seconds, upstream = ledger.execute(
            "SELECT at, seconds, upstream_seconds FROM falproxy_entries ORDER BY rowid DESC"
        ).fetchone()
    assert at / 1000 == pytest.approx(began, abs=0.1)
    assert 0.19 < upstream <= seconds < 2.0


async def test_an_idle_client_holds_nothing_of_its_last_request(make: Make, fal: Fal) -> None:
    proxy = await make()
    client = await proxy.client()
    await client.ask(order(b'{"prompt": "' + b"x" * 10_000 + b'"}'))
    assert proxy.server.runner is not None
    assert proxy.server.runner.server is not None
    (door,) = proxy.server.runner.server.connections
    assert isinstance(door, FastPathProtocol)
    assert door._raw_request is None


@pytest.mark.parametrize(
    ("data", "known_by", "body"),
    [
        pytest.param(poll(), poll(), b"", id="a poll is known by all of it"),
        pytest.param(
            order(), order().replace(b"\r\n" + LENGTH, b"").removesuffix(ORDER), ORDER,
            id="an order by all but length and body",
        ),
        pytest.param(order()[:-1], b"", b"", id="a body that is not all here"),
        pytest.param(order() + b"x", b"", b"", id="more behind it"),
        pytest.param(order().replace(b"\r\n\r\n", b"\r\n"), b"", b"", id="no end of the head"),
        pytest.param(
            order().replace(LENGTH, b"Transfer-Encoding: chunked"), b"", b"",
            id="no length",
        ),
    ],
)  # fmt: skip
def test_what_a_request_is_known_by(data: bytes, known_by: bytes, body: bytes) -> None:
    assert split_request(data) == (known_by, body)


def counting(requests: list[str]) -> Middleware:
    @web.middleware
    async def counting_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        requests.append(request.path)
        return await handler(request)

    return counting_middleware


@pytest.mark.parametrize(
    ("declare", "fewest", "most"),
    [
        pytest.param(lambda middleware: middleware, 12, 12, id="undeclared: it sees all of them"),
        pytest.param(head_only, 1, 2, id="declared: the fast path takes the repeated ones"),
    ],
)
async def test_a_middleware_that_does_not_declare_itself_sees_every_request(
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
        assert (await client.ask(poll())).startswith(b"HTTP/1.1 202")
    assert fewest <= len(requests) <= most
    assert proxy.taken == 12 - len(requests)
    closed = [line for line in caplog.messages if "counting_middleware needs every request" in line]
    assert len(closed) == (len(requests) == 12)


async def test_a_middleware_of_the_application_that_does_not_declare_itself_sees_every_request(
    fal: Fal, tmp_path: Path
) -> None:
    requests: list[str] = []
    settings = make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path)
    app = create_app(settings)
    app.middlewares.append(counting(requests))
    server = DoorServer(app)
    await server.start_server()
    client = Client(*await asyncio.open_connection("127.0.0.1", server.port))
    for _ in range(12):
        assert (await client.ask(poll())).startswith(b"HTTP/1.1 202")
    assert len(requests) == 12
    client.writer.close()
    await server.close()
