"""fal's responses are relayed unchanged, or fail visibly."""

import asyncio
import gzip
import io
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_asyncio
from aiohttp import ClientError, ClientPayloadError, ClientSession, web
from aiohttp.abc import AbstractAccessLogger
from multidict import CIMultiDict

from falproxy import create_app
from tests.support.fake_fal import FakeFal, WireFal, open_wire, read_head
from tests.support.gateway import SHARED, Gateway, MakeGateway, open_gateway
from tests.support.header_names import ADDED, KEPT_BACK, OF_THE_CONNECTION
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST, RUN
from tests.support.waiting import wait_until

TIMEOUT = 5.0  # seconds; of `wait_until`

pytestmark = [
    pytest.mark.both_event_loops,
    pytest.mark.both_transports,
    pytest.mark.asgi_servers,
]

Fields = list[tuple[str, str]]
Responder = Callable[[web.Request], Awaitable[web.StreamResponse]]


def respond(body: bytes, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> Responder:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers=CIMultiDict(headers))

    return handler


def stream(chunks: Sequence[bytes], headers: Sequence[tuple[str, str]]) -> Responder:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=CIMultiDict(headers))
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        return response

    return handler


async def send_directly_and_through_proxy(
    gateway: Gateway, session: ClientSession, fal_origin: str, method: str = "GET"
) -> tuple[tuple[int, str | None, Fields, bytes], tuple[int, str | None, Fields, bytes]]:
    """Send a call directly and through the proxy. Return (status, reason, headers, body) of both,
    without the headers that the proxy changes. ASGI has no reasons."""
    direct = await session.request(
        method, f"{fal_origin}/fal-ai/flux/dev", headers={"Host": "fal.run"}, allow_redirects=False
    )
    through = await gateway.call(RUN, method, allow_redirects=False)
    responses = []
    for response, dropped in ((direct, KEPT_BACK), (through, ADDED)):
        fields = [
            (name.decode().lower(), value.decode())
            for name, value in response.raw_headers
            if name.decode().lower() not in OF_THE_CONNECTION | dropped
        ]
        reason = response.reason if gateway.has_reasons else None
        responses.append((response.status, reason, fields, await response.read()))
    return responses[0], responses[1]


JSON: Fields = [("Content-Type", "application/json")]
HTML: Fields = [("Content-Type", "text/html")]
DOCUMENT = b'{"images":[{"url":"https://v3b.fal.media/files/b/x/y.png"}],"seed":1}'

RESPONDERS = [
    pytest.param(respond(DOCUMENT, 200, JSON), id="a document"),
    pytest.param(respond(b"", 204), id="204"),
    pytest.param(respond(b"", 200), id="200 without a body"),
    pytest.param(respond(b'{"status":"IN_QUEUE"}', 202, JSON), id="202"),
    pytest.param(respond(b'{"detail":[]}', 422, JSON), id="422"),
    pytest.param(respond(b'{"detail":"x"}', 499, JSON), id="499, which Python does not name"),
    pytest.param(respond(b'{"detail":"x"}', 429, [*JSON, ("X-Fal-needs-retry", "1")]), id="429"),
    pytest.param(respond(b"<h1>nginx</h1>", 502, HTML), id="an ingress's 502"),
    pytest.param(respond(b"?", 599), id="599"),
    pytest.param(respond(b"", 302, [("Location", "https://evil.tld/steal")]), id="a redirect"),
    pytest.param(respond(b"", 307, [("Location", "/elsewhere")]), id="a redirect to a path"),
    pytest.param(respond(b"", 304, [("ETag", '"a"')]), id="304"),
    pytest.param(
        respond(
            b"x",
            200,
            [
                ("X-A", "1"),
                ("Link", "a"),
                ("X-B", "2"),
                ("Link", "b"),
                ("X-A", "3"),
            ],
        ),
        id="repeated headers in order",
    ),
    pytest.param(
        respond(
            b"x", 200, [("Alt-Svc", "h3"), ("Access-Control-Allow-Origin", "*"), ("Vary", "Origin")]
        ),
        id="headers about fal's origin",
    ),
    pytest.param(respond(b"x", 200, [("X-Hints", "h" * 16_000)]), id="a header of 16 KB"),
    pytest.param(respond(b"x", 200, [("X-Name", "pr\u00e9nom")]), id="a header in UTF-8"),
    pytest.param(
        respond(gzip.compress(DOCUMENT), 200, [*JSON, ("Content-Encoding", "gzip")]), id="gzip"
    ),
    pytest.param(
        respond(DOCUMENT, 200, [*JSON, ("Content-Encoding", "gzip")]), id="gzip by name only"
    ),
    pytest.param(
        respond(
            gzip.compress(zlib.compress(DOCUMENT)), 200, [("Content-Encoding", "deflate, gzip")]
        ),
        id="two codings",
    ),
    pytest.param(
        stream([b"data: 1\n\n", b"data: 2\n\n"], [("Content-Type", "text/event-stream")]),
        id="events",
    ),
    pytest.param(stream([b"x"] * 300, []), id="byte by byte"),
    pytest.param(
        stream([bytes(1_000_000)] * 20, [("Content-Type", "image/png")]), id="20 MB chunked"
    ),
    pytest.param(respond(bytes(range(256)) * 80_000, 200), id="20 MB with a length"),
]


@SHARED
@pytest.mark.parametrize("responder", RESPONDERS)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_response_is_the_same_directly_and_through_the_proxy(
    shared_gateway: Gateway,
    shared_fal: FakeFal,
    shared_session: ClientSession,
    responder: Responder,
    method: str,
) -> None:
    shared_fal.respond = responder
    direct, through = await send_directly_and_through_proxy(
        shared_gateway, shared_session, shared_fal.origin, method
    )
    assert through[:3] == direct[:3]
    assert through[3] == direct[3], "the bodies differ"


UNUSUAL_RESPONSES = [
    pytest.param(
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end", id="a body that ends with the connection"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", id="no content type, no server"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nserver: uvicorn\r\n"
        b"content-length: 2\r\n\r\nok",
        id="names in lower case, as fal writes them",
    ),
    pytest.param(b"HTTP/1.0 200 OK\r\n\r\nold", id="HTTP/1.0"),
    pytest.param(b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", id="no reason phrase"),
    pytest.param(b"HTTP/1.1 200 Fine By Me\r\nContent-Length: 0\r\n\r\n", id="an unusual reason"),
    pytest.param(
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
        id="an early hint",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1;ext=1\r\na\r\n1\r\nb\r\n0\r\nX-T: 1\r\n\r\n",
        id="chunk extensions and trailers",
    ),
]


@pytest.mark.parametrize("response_bytes", UNUSUAL_RESPONSES)
async def test_unusual_but_valid_responses_are_relayed(
    make_gateway: MakeGateway, wire: WireFal, session: ClientSession, response_bytes: bytes
) -> None:
    wire.send(response_bytes)
    gateway = await make_gateway(wire.origin)
    direct, through = await send_directly_and_through_proxy(gateway, session, wire.origin)
    assert through == direct


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_wire() -> AsyncIterator[WireFal]:
    """fal for tests of responses after which the proxy closes its connection."""
    async with open_wire() as fake:
        yield fake


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wire_gateway(
    shared_wire: WireFal, server_kind: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    data_dir = tmp_path_factory.mktemp("data")
    async with open_gateway(shared_wire.origin, data_dir, server_kind) as opened:
        yield opened


INVALID_RESPONSES = [
    pytest.param(b"", id="no bytes"),
    pytest.param(b"not HTTP at all\r\n\r\n", id="not HTTP"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX-A: 1\r\n", id="half a head"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX-A: a\x00b\r\n\r\n", id="a NUL in a header"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX-A: a\rb\r\n\r\n", id="a lone CR in a header"),
    pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X-A: a\r\n" * 2000 + b"\r\n", id="endless headers"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 70_000 + b"\r\n\r\n", id="a 70 KB header"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", id="a negative length"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello", id="a signed length"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", id="two lengths"
    ),
    pytest.param(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        id="a switch of protocols",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5001 + b"\r\n\r\n{}", id="an endless length"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"0" * 5000 + b"2\r\n\r\n{}",
        id="a length with endless zeros",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nx-fal-a: a\x01b\r\n\r\n{}",
        id="a control character in a header",
    ),
]


@SHARED
@pytest.mark.parametrize("response_bytes", INVALID_RESPONSES)
@pytest.mark.parametrize(
    ("method", "target"), [("GET", f"{REQUEST}/status"), ("GET", RUN), ("POST", RUN)]
)
async def test_an_invalid_response_is_an_error(
    wire_gateway: Gateway, shared_wire: WireFal, response_bytes: bytes, method: str, target: str
) -> None:
    """fal's clients retry after a 502. A call of a model may have made a job: it gets a 504 with
    the header that prevents retries."""
    shared_wire.send(response_bytes)
    # With a name of its own for the client, so that the request head is not known.
    headers = [("User-Agent", f"test/{uuid4().hex}")]
    response = await wire_gateway.call(target, method, headers=headers)
    assert (await response.json())["type"] == "upstream_broken"
    outcome = (response.status, response.headers.get("x-fal-request-timeout-type"))
    assert outcome == ((504, "user") if target == RUN else (502, None))


# Responses with something that is relayed in another form, or not at all.
def raw_response(*lines: bytes, status: bytes = b"200 OK") -> bytes:
    head = [b"HTTP/1.1 " + status, b"Date: now", b"Content-Length: 2", *lines]
    return b"\r\n".join([*head, b"", b"{}"])


async def raw_call(gateway: Gateway) -> tuple[bytes, set[bytes]]:
    """Return the status line of a response, and its header lines."""
    received = await gateway.send_raw(
        f"GET {PROXY} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"x-fal-target-url: {REQUEST}/status\r\n\r\n".encode()
    )
    line, *lines = received.partition(b"\r\n\r\n")[0].split(b"\r\n")
    fields = (line.partition(b":") for line in lines)
    return line, {name.lower() + colon + value for name, colon, value in fields}


@pytest.mark.parametrize("value", [b"caf\xe9", b"\xff\xfe", "\u00e9".encode(), b"a\tb"])
async def test_a_header_value_is_relayed_byte_for_byte(
    make_gateway: MakeGateway, wire: WireFal, value: bytes
) -> None:
    wire.send(raw_response(b"x-fal-note: " + value))
    _, lines = await raw_call(await make_gateway(wire.origin))
    assert b"x-fal-note: " + value in lines


@pytest.mark.own_server
@pytest.mark.parametrize(
    ("reason", "relayed"),
    [
        (b"Accepted", b"Accepted"),
        (b"a\x01b", b""),
        (b"\x1b[31mred", b""),
        (b"a\x7fb", b""),
        (b"caf\xe9", b"caf\xe9"),
    ],
)
async def test_an_odd_reason_phrase_does_not_cost_the_response(
    make_gateway: MakeGateway, wire: WireFal, reason: bytes, relayed: bytes
) -> None:
    wire.send(raw_response(status=b"202 " + reason))
    line, _ = await raw_call(await make_gateway(wire.origin))
    assert line == b"HTTP/1.1 202 " + relayed


async def test_headers_for_fal_s_origin_are_not_relayed(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    denied = [
        b"set-cookie: a=b",
        b"clear-site-data: *",
        b"strict-transport-security: max-age=1",
        b"x-accel-redirect: /etc/passwd",
        b"x-sendfile: /etc/passwd",
        b"refresh: 0; url=https://evil.tld",
        b"x-content-type-options: nosniff",
    ]
    wire.send(raw_response(*denied, b"x-fal-note: a"))
    _, lines = await raw_call(await make_gateway(wire.origin))
    assert b"x-fal-note: a" in lines
    assert lines & set(denied) == {denied[-1]}


TRUNCATED_RESPONSES = [
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", id="shorter than its length"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n", id="no last chunk"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nshort", id="half a chunk"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\nzz\r\n",
        id="an invalid chunk size",
    ),
]


@SHARED
@pytest.mark.parametrize("response_bytes", TRUNCATED_RESPONSES)
async def test_an_incomplete_body_is_incomplete_for_the_client(
    wire_gateway: Gateway, shared_wire: WireFal, response_bytes: bytes
) -> None:
    shared_wire.send(response_bytes)
    response = await wire_gateway.call(RUN)
    if response.status != 504:  # it broke off before the proxy had sent a byte
        with pytest.raises(ClientPayloadError):
            await response.read()


@pytest.mark.own_server
async def test_an_incomplete_body_is_a_reset_for_an_http_1_0_client(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    """For an HTTP/1.0 client, the end of the connection is the end of the body."""
    wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n")
    gateway = await make_gateway(wire.origin)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(gateway.origin.rpartition(":")[2])
    )
    writer.write(f"GET {PROXY} HTTP/1.0\r\nx-fal-target-url: {RUN}\r\n\r\n".encode())
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_a_204_with_a_body_does_not_corrupt_the_next_response(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await reader.read()

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    for _ in range(3):
        response = await gateway.call(RUN, json={})
        assert response.status in (204, 504)
        assert b"evil" not in await response.read()


async def test_bytes_behind_a_body_are_not_the_next_response(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    for _ in range(5):
        assert await (await gateway.call(RUN)).read() == b"ok"


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_unreachable_fal_is_a_502(make_gateway: MakeGateway, method: str) -> None:
    gateway = await make_gateway("http://127.0.0.1:9")
    response = await gateway.call(RUN, method)
    assert response.status == 502
    assert (await response.json())["type"] == "upstream_unreachable"


async def test_a_silent_fal_is_a_504(make_gateway: MakeGateway, fal: FakeFal) -> None:
    async def wait(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    fal.respond = wait
    gateway = await make_gateway(fal.origin, upstream_timeout=0.2)
    response = await gateway.call(f"{REQUEST}/status", "GET")
    assert response.status == 504
    assert (await response.json())["type"] == "upstream_timeout"
    assert "x-fal-request-timeout-type" not in response.headers


async def test_a_post_that_timed_out_has_the_header_against_retries(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await reader.read()

    wire.serve = serve
    gateway = await make_gateway(wire.origin, upstream_timeout=0.2)
    response = await gateway.call(RUN, json={})
    assert response.status == 504
    assert response.headers["x-fal-request-timeout-type"] == "user"
    assert wire.connections == 1


async def test_a_time_out_inside_a_body_breaks_the_connection(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    async def stall(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"some")
        await asyncio.sleep(60)
        return response

    fal.respond = stall
    gateway = await make_gateway(fal.origin, upstream_timeout=0.2)
    with pytest.raises(ClientError):
        await (await gateway.call(RUN)).read()


@pytest.mark.parametrize("body", [b"", b"HTTP/1.1 200 OK\r\nContent-"], ids=["closed", "half"])
async def test_a_post_that_may_have_reached_fal_is_never_sent_again(
    make_gateway: MakeGateway, wire: WireFal, body: bytes
) -> None:
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await read_head(reader)
        requests += 1
        if requests == 1:  # so that the next call uses a pooled connection
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await read_head(reader)
            requests += 1
        writer.write(body)

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    assert (await gateway.call(RUN, json={})).status == 200
    assert (await gateway.call(RUN, json={"a": "second"})).status == 504
    assert (requests, wire.connections) == (2, 1)


@pytest.mark.parametrize(
    "started", [False, True], ids=["before the response", "inside the response"]
)
async def test_a_disconnect_aborts_the_call_to_fal(
    gateway: Gateway, fal: FakeFal, session: ClientSession, started: bool
) -> None:
    cancelled = False

    async def work(request: web.Request) -> web.StreamResponse:
        nonlocal cancelled
        response = web.StreamResponse()
        try:
            if started:
                await response.prepare(request)
                await response.write(b"data: 1\n\n")
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled = True
            raise
        return response

    fal.respond = work
    headers = {"x-fal-target-url": RUN}
    call = asyncio.ensure_future(session.post(gateway.origin + PROXY, json={}, headers=headers))
    await wait_until(lambda: bool(fal.seen), seconds=TIMEOUT)
    if started:
        response = await call
        await response.content.readany()
        response.close()
    else:
        call.cancel()
    await wait_until(lambda: cancelled, seconds=TIMEOUT)


async def test_an_event_is_relayed_before_the_next_one_is_sent(
    gateway: Gateway, fal: FakeFal
) -> None:
    events: asyncio.Queue[bytes] = asyncio.Queue()

    async def send_events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(20):
            await response.write(b"data: %d\n\n" % number)
            async with asyncio.timeout(TIMEOUT):
                assert await events.get() == b"data: %d\n\n" % number
        return response

    fal.respond = send_events
    response = await gateway.call(RUN + "/stream", json={})
    assert response.headers["Content-Type"] == "text/event-stream"
    while event := await response.content.readany():
        events.put_nowait(event)
    assert len(fal.seen) == 1


async def test_an_access_log_can_name_the_headers_of_a_stream(fal: FakeFal, tmp_path: Path) -> None:
    """The headers are freed when they are sent, and parsed again on demand."""
    logged: list[Fields] = []

    class Log(AbstractAccessLogger):
        def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
            logged.append([*response.headers.items()])

    async def send_events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Own": "1"})
        await response.prepare(request)
        await asyncio.sleep(0.01)
        await response.write(b"data: 1\n\n")
        return response

    fal.respond = send_events
    app = create_app(make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path))
    runner = web.AppRunner(app, access_log_class=Log)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = "http://{}:{}{}".format(*runner.addresses[0], PROXY)
    try:
        async with ClientSession() as session:
            async with session.post(
                address, headers={"x-fal-target-url": f"{RUN}/stream"}
            ) as response:
                assert await response.read() == b"data: 1\n\n"
                assert response.headers["X-Own"] == "1"
            await wait_until(lambda: bool(logged), seconds=TIMEOUT)
    finally:
        await runner.cleanup()
    assert {("Content-Type", "text/event-stream"), ("X-Own", "1")} <= {*logged[0]}


async def test_200_concurrent_streams_lose_no_event(gateway: Gateway, fal: FakeFal) -> None:
    together = asyncio.Barrier(200)

    async def send_events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await together.wait()
        for number in range(25):
            await response.write(b"data: %s %d\n\n" % (request.query["id"].encode(), number))
            await asyncio.sleep(0)
        return response

    fal.respond = send_events

    async def listen(number: int) -> bytes:
        response = await gateway.call(f"{RUN}/stream?id={number}")
        return await response.read()

    async with asyncio.timeout(15):
        bodies = await asyncio.gather(*(listen(number) for number in range(200)))
    for number, body in enumerate(bodies):
        assert body == b"".join(b"data: %d %d\n\n" % (number, event) for event in range(25))


async def test_a_request_body_is_sent_while_it_arrives(
    gateway: Gateway, wire: WireFal, make_gateway: MakeGateway
) -> None:
    """A body that is not checked is streamed; a model's input is held until it is checked."""
    arrived = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"first")
        arrived.set()
        await reader.readuntil(b"last")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    wire.serve = serve
    gateway = await make_gateway(wire.origin)

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        async with asyncio.timeout(TIMEOUT):
            await arrived.wait()
        yield b"last"

    headers = [("Content-Type", "application/json")]
    elsewhere = "https://api.fal.ai/v1/models"
    assert (await gateway.call(elsewhere, data=body(), headers=headers)).status == 200


@pytest.mark.timed
async def test_a_response_before_the_end_of_the_body_is_relayed(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        await reader.read()

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    headers = [("Content-Type", "application/json")]
    started = time.monotonic()
    response = await gateway.call(RUN, data=io.BytesIO(bytes(30_000_000)), headers=headers)
    assert (response.status, await response.read()) == (401, b"no")
    assert time.monotonic() - started < 5


async def test_a_disconnect_inside_a_checked_body_makes_no_job(
    gateway: Gateway, fal: FakeFal
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(gateway.origin.rpartition(":")[2]))
    writer.write(
        f"POST {PROXY} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: 1000\r\nx-fal-target-url: {RUN}\r\n\r\nhalf".encode()
    )
    await writer.drain()
    writer.close()
    assert (await gateway.call(RUN, json={})).status == 200
    assert len(fal.seen) == 1


async def test_a_disconnect_inside_a_streamed_body_aborts_the_call(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    started = asyncio.Event()
    ended: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        started.set()
        ended.append(await reader.read())

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    _, writer = await asyncio.open_connection("127.0.0.1", int(gateway.origin.rpartition(":")[2]))
    writer.write(
        f"POST {PROXY} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000\r\nx-fal-target-url: https://api.fal.ai/v1/models\r\n\r\n"
        "half".encode()
    )
    await started.wait()
    writer.close()
    await wait_until(lambda: bool(ended), seconds=TIMEOUT)
    assert len(ended[0]) < 1000


async def test_connections_to_fal_are_reused(make_gateway: MakeGateway, wire: WireFal) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    for _ in range(20):
        assert await (await gateway.call(RUN, json={})).read() == b"ok"
    assert wire.connections == 1


@pytest.mark.parametrize(
    ("method", "target", "times"),
    [
        pytest.param("GET", f"{REQUEST}/status", 2, id="a status request can be repeated"),
        pytest.param("PUT", f"{REQUEST}/cancel", 2, id="a cancel can be repeated"),
        pytest.param("GET", f"{RUN}?prompt=x", 1, id="a run by GET makes a job"),
        pytest.param("GET", "https://queue.fal.run/fal-ai/flux?prompt=x", 1, id="a submit by GET"),
        pytest.param("POST", RUN, 1, id="a run"),
    ],
)
async def test_only_calls_that_make_no_job_are_sent_again(
    make_gateway: MakeGateway, wire: WireFal, method: str, target: str, times: int
) -> None:
    """A pooled connection may close just when a call is sent on it."""
    seen = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        await read_head(reader)
        if wire.connections == 1:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await read_head(reader)
        seen += 1

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    assert (await gateway.call(REQUEST, "GET")).status == 200
    await (await gateway.call(target, method)).read()
    assert seen == times


async def test_unsolicited_bytes_are_not_a_response(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    """A load balancer sends 408 on an idle connection before it closes it. The next client must not
    get that response."""
    sent = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 4\r\n\r\nevil")
        await writer.drain()
        sent.set()
        await reader.read()

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    for _ in range(3):
        sent.clear()
        response = await gateway.call(RUN, json={})
        assert (response.status, await response.read()) == (200, b"mine")
        await sent.wait()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("disconnects", [True, False], ids=["client disconnects", "fal times out"])
async def test_a_call_ends_with_the_request_that_reads_its_document(
    make_gateway: MakeGateway, wire: WireFal, disconnects: bool
) -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        await reader.read()
        ended.set()

    wire.serve = serve
    gateway = await make_gateway(wire.origin, upstream_timeout=60 if disconnects else 0.2)
    call = asyncio.ensure_future(gateway.client.post("/api/fal/queue/fal-ai/flux/dev", json={}))
    await wait_until(lambda: wire.connections == 1, seconds=TIMEOUT)
    if disconnects:
        await asyncio.sleep(0.05)
        call.cancel()
    else:
        response = await call
        assert response.status == 504
        assert response.headers["x-fal-request-timeout-type"] == "user"
    async with asyncio.timeout(TIMEOUT):
        await ended.wait()


@pytest.mark.own_server
async def test_an_http_1_0_client_with_keep_alive_sees_the_end_of_a_body(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n")
    gateway = await make_gateway(wire.origin)
    head = f"GET {PROXY} HTTP/1.0\r\nConnection: keep-alive\r\nx-fal-target-url: {RUN}\r\n\r\n"
    assert (await gateway.send_raw(head.encode())).endswith(b"\r\n\r\nwhole")
