"""fal's answers come through as they are, or visibly not at all."""

import asyncio
import gzip
import io
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from aiohttp import ClientError, ClientPayloadError, ClientSession, web
from aiohttp.abc import AbstractAccessLogger
from multidict import CIMultiDict

from falproxy import create_app
from tests.support.fake_fal import FakeFal, WireFal, read_head
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST, RUN

pytestmark = [pytest.mark.both_event_loops, pytest.mark.both_transports]

# What the proxy adds to an answer; everything else is fal's, in fal's order.
ADDED = {"x-request-id", "server-timing"}
# What belongs to one connection, and the clock: aiohttp dates an answer that fal did not.
OF_THE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "date"}
# What speaks for fal's origin or is a credential of fal's own apps.
KEPT_BACK = {
    "alt-svc",
    "access-control-allow-origin",
    "access-control-allow-credentials",
    "x-fal-cdn-token",
}

Fields = list[tuple[str, str]]


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def respond(body: bytes, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers=CIMultiDict(headers))

    return answer


def stream(chunks: Sequence[bytes], headers: Sequence[tuple[str, str]]) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=CIMultiDict(headers))
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        return response

    return answer


async def both_ways(
    gateway: Gateway, session: ClientSession, fal_origin: str, method: str = "GET"
) -> tuple[tuple[int, str | None, Fields, bytes], tuple[int, str | None, Fields, bytes]]:
    """The same call sent straight to fal and through the proxy: (status, reason, headers, body)
    of both, less what is known to differ."""
    direct = await session.request(
        method, f"{fal_origin}/fal-ai/flux/dev", headers={"Host": "fal.run"}, allow_redirects=False
    )
    through = await gateway.call(RUN, method, allow_redirects=False)
    answers = []
    for response, dropped in ((direct, KEPT_BACK), (through, ADDED)):
        fields = [
            (name.decode().lower(), value.decode())
            for name, value in response.raw_headers
            if name.decode().lower() not in OF_THE_CONNECTION | dropped
        ]
        answers.append((response.status, response.reason, fields, await response.read()))
    return answers[0], answers[1]


JSON: Fields = [("Content-Type", "application/json")]
HTML: Fields = [("Content-Type", "text/html")]
DOCUMENT = b'{"images":[{"url":"https://v3b.fal.media/files/b/x/y.png"}],"seed":1}'

ANSWERS = [
    pytest.param(respond(DOCUMENT, 200, JSON), id="a document"),
    pytest.param(respond(b"", 204), id="204"),
    pytest.param(respond(b"", 200), id="200 without a body"),
    pytest.param(respond(b'{"status":"IN_QUEUE"}', 202, JSON), id="202"),
    pytest.param(respond(b'{"detail":[]}', 422, JSON), id="422"),
    pytest.param(respond(b'{"detail":"x"}', 499, JSON), id="499, which Python has no name for"),
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
                ("Set-Cookie", "a=1"),
                ("X-B", "2"),
                ("Set-Cookie", "b=2"),
                ("X-A", "3"),
            ],
        ),
        id="repeated headers in their order",
    ),
    pytest.param(
        respond(
            b"x", 200, [("Alt-Svc", "h3"), ("Access-Control-Allow-Origin", "*"), ("Vary", "Origin")]
        ),
        id="headers that speak for fal's origin",
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


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_answer_is_the_same_directly_and_through_the_proxy(
    gateway: Gateway,
    fal: FakeFal,
    session: ClientSession,
    answer: Answer,
    method: str,
) -> None:
    fal.answer = answer
    direct, through = await both_ways(gateway, session, fal.origin, method)
    assert through[:3] == direct[:3]
    assert through[3] == direct[3], "the bodies differ"


WIRE_ANSWERS = [
    pytest.param(
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end", id="a body that ends with its connection"
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
    pytest.param(b"HTTP/1.1 200 Fine By Me\r\nContent-Length: 0\r\n\r\n", id="an own reason"),
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


@pytest.mark.parametrize("answer", WIRE_ANSWERS)
async def test_odd_but_valid_answers_come_through(
    make_gateway: MakeGateway, wire: WireFal, session: ClientSession, answer: bytes
) -> None:
    wire.say(answer)
    gateway = await make_gateway(wire.origin)
    direct, through = await both_ways(gateway, session, wire.origin)
    assert through == direct


BROKEN_ANSWERS = [
    pytest.param(b"", id="nothing"),
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
]


@pytest.mark.parametrize("answer", BROKEN_ANSWERS)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_broken_answer_is_said(
    make_gateway: MakeGateway, wire: WireFal, answer: bytes, method: str
) -> None:
    """With a 502, which the clients send again; a POST, which may have made a job, with the one
    answer that they do not send again."""
    wire.say(answer)
    gateway = await make_gateway(wire.origin)
    response = await gateway.call(RUN, method)
    assert (await response.json())["type"] == "upstream_broken"
    said = (response.status, response.headers.get("x-fal-request-timeout-type"))
    assert said == ((504, "user") if method == "POST" else (502, None))


TRUNCATED_ANSWERS = [
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", id="shorter than it says"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n", id="no last chunk"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nshort", id="half a chunk"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\nzz\r\n", id="no chunk"
    ),
]


@pytest.mark.parametrize("answer", TRUNCATED_ANSWERS)
async def test_a_body_that_breaks_off_breaks_off_for_the_client(
    make_gateway: MakeGateway, wire: WireFal, answer: bytes
) -> None:
    wire.say(answer)
    gateway = await make_gateway(wire.origin)
    response = await gateway.call(RUN)
    if response.status != 504:  # it broke off before the proxy had begun to answer
        with pytest.raises(ClientPayloadError):
            await response.read()


async def test_a_body_that_breaks_off_is_a_reset_where_its_end_could_be_taken_for_one(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    """An HTTP/1.0 client knows the end of a chunked body only by the end of the connection."""
    wire.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n")
    gateway = await make_gateway(wire.origin)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(gateway.origin.rpartition(":")[2])
    )
    writer.write(f"GET {PROXY} HTTP/1.0\r\nx-fal-target-url: {RUN}\r\n\r\n".encode())
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_a_204_with_a_body_does_not_spoil_the_next_answer(
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


async def test_what_follows_a_body_is_not_the_next_answer(
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

    fal.answer = wait
    gateway = await make_gateway(fal.origin, upstream_timeout=0.2)
    response = await gateway.call(f"{REQUEST}/status", "GET")
    assert response.status == 504
    assert (await response.json())["type"] == "upstream_timeout"
    assert "x-fal-request-timeout-type" not in response.headers


async def test_a_post_that_timed_out_tells_the_clients_not_to_send_it_again(
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


async def test_silence_inside_a_body_breaks_it_off(make_gateway: MakeGateway, fal: FakeFal) -> None:
    async def stall(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"some")
        await asyncio.sleep(60)
        return response

    fal.answer = stall
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
        if requests == 1:  # one good answer, so that the next call meets a kept connection
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await read_head(reader)
            requests += 1
        writer.write(body)

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    assert (await gateway.call(RUN, json={})).status == 200
    assert (await gateway.call(RUN, json={"a": "second"})).status == 504
    assert (requests, wire.connections) == (2, 1)


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not fact():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("started", [False, True], ids=["before the answer", "inside the answer"])
async def test_a_client_that_leaves_takes_its_call_with_it(
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

    fal.answer = work
    headers = {"x-fal-target-url": RUN}
    call = asyncio.ensure_future(session.post(gateway.origin + PROXY, json={}, headers=headers))
    await until(lambda: bool(fal.seen))
    if started:
        response = await call
        await response.content.readany()
        response.close()
    else:
        call.cancel()
    await until(lambda: cancelled)


async def test_an_event_arrives_before_the_next_one_is_made(gateway: Gateway, fal: FakeFal) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def talk(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(20):
            await response.write(b"data: %d\n\n" % number)
            async with asyncio.timeout(5):
                assert await heard.get() == b"data: %d\n\n" % number
        return response

    fal.answer = talk
    response = await gateway.call(RUN + "/stream", json={})
    assert response.headers["Content-Type"] == "text/event-stream"
    while event := await response.content.readany():
        heard.put_nowait(event)
    assert len(fal.seen) == 1


async def test_an_access_log_can_name_the_headers_of_a_stream(fal: FakeFal, tmp_path: Path) -> None:
    """They are let go of when they are out, and read again for who asks."""
    said: list[Fields] = []

    class Log(AbstractAccessLogger):
        def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
            said.append([*response.headers.items()])

    async def talk(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Own": "1"})
        await response.prepare(request)
        await asyncio.sleep(0.01)
        await response.write(b"data: 1\n\n")
        return response

    fal.answer = talk
    app = create_app(make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path))
    runner = web.AppRunner(app, access_log_class=Log)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = "http://{}:{}{}".format(*runner.addresses[0], PROXY)
    try:
        async with ClientSession() as session:
            async with session.post(
                address, headers={"x-fal-target-url": f"{RUN}/stream"}
            ) as answer:
                assert await answer.read() == b"data: 1\n\n"
                assert answer.headers["X-Own"] == "1"
            await until(lambda: bool(said))
    finally:
        await runner.cleanup()
    assert {("Content-Type", "text/event-stream"), ("X-Own", "1")} <= {*said[0]}


async def test_200_streams_at_once_lose_nothing(gateway: Gateway, fal: FakeFal) -> None:
    together = asyncio.Barrier(200)

    async def talk(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await together.wait()
        for number in range(25):
            await response.write(b"data: %s %d\n\n" % (request.query["id"].encode(), number))
            await asyncio.sleep(0)
        return response

    fal.answer = talk

    async def listen(number: int) -> bytes:
        response = await gateway.call(f"{RUN}/stream?id={number}")
        return await response.read()

    async with asyncio.timeout(15):
        heard = await asyncio.gather(*(listen(number) for number in range(200)))
    for number, events in enumerate(heard):
        assert events == b"".join(b"data: %d %d\n\n" % (number, event) for event in range(25))


async def test_a_body_goes_up_while_it_arrives(
    gateway: Gateway, wire: WireFal, make_gateway: MakeGateway
) -> None:
    """Where nothing has to be known of it first; a model's input is looked at as a whole."""
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
        async with asyncio.timeout(5):
            await arrived.wait()
        yield b"last"

    headers = [("Content-Type", "application/json")]
    elsewhere = "https://api.fal.ai/v1/models"
    assert (await gateway.call(elsewhere, data=body(), headers=headers)).status == 200


@pytest.mark.timed
async def test_an_answer_that_does_not_wait_for_the_body_comes_through(
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


async def test_a_client_that_leaves_inside_its_body_leaves_no_job(
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


async def test_a_client_that_leaves_inside_a_body_that_goes_up_breaks_it_off(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    ended: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        ended.append(await reader.read())

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    _, writer = await asyncio.open_connection("127.0.0.1", int(gateway.origin.rpartition(":")[2]))
    writer.write(
        f"POST {PROXY} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000\r\nx-fal-target-url: https://api.fal.ai/v1/models\r\n\r\n"
        "half".encode()
    )
    await until(lambda: wire.connections == 1)
    writer.close()
    await until(lambda: bool(ended))
    assert len(ended[0]) < 1000


async def test_connections_to_fal_are_kept(make_gateway: MakeGateway, wire: WireFal) -> None:
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
        pytest.param("GET", f"{REQUEST}/status", 2, id="a status can be asked twice"),
        pytest.param("PUT", f"{REQUEST}/cancel", 2, id="a cancel can be sent twice"),
        pytest.param("GET", f"{RUN}?prompt=x", 1, id="a run by GET makes a job"),
        pytest.param("GET", "https://queue.fal.run/fal-ai/flux?prompt=x", 1, id="a submit by GET"),
        pytest.param("POST", RUN, 1, id="a run"),
    ],
)
async def test_only_what_makes_no_job_is_sent_again(
    make_gateway: MakeGateway, wire: WireFal, method: str, target: str, times: int
) -> None:
    """When it met a kept connection that closed just then."""
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


async def test_what_nobody_asked_for_is_nobody_s_answer(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    """A load balancer says 408 on a connection before it closes it: not to the next client."""
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


@pytest.mark.parametrize("leaves", [True, False], ids=["client leaves", "fal falls silent"])
async def test_a_call_ends_with_whoever_reads_its_document(
    make_gateway: MakeGateway, wire: WireFal, leaves: bool
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
    gateway = await make_gateway(wire.origin, upstream_timeout=60 if leaves else 0.2)
    call = asyncio.ensure_future(gateway.client.post("/api/fal/queue/fal-ai/flux/dev", json={}))
    await until(lambda: wire.connections == 1)
    if leaves:
        await asyncio.sleep(0.05)
        call.cancel()
    else:
        response = await call
        assert response.status == 504
        assert response.headers["x-fal-request-timeout-type"] == "user"
    async with asyncio.timeout(5):
        await ended.wait()


async def test_an_old_client_that_wants_to_keep_its_connection_sees_the_end(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    wire.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n")
    gateway = await make_gateway(wire.origin)
    head = f"GET {PROXY} HTTP/1.0\r\nConnection: keep-alive\r\nx-fal-target-url: {RUN}\r\n\r\n"
    assert (await gateway.exchange(head.encode())).endswith(b"\r\n\r\nwhole")
