"""The connection pool: reuse, time-outs, and no response to the wrong request."""

import asyncio
import contextlib
import gc
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import trustme
from aiohttp.abc import AbstractResolver, ResolveResult

from falproxy.proxy.transport import (
    IDLE_SECONDS,
    MAX_HEADER_FIELD,
    MAX_HEADERS,
    ConnectError,
    ConnectionLostError,
    Origin,
    TransportResponse,
    UpstreamRequest,
    connection,
    pool,
)
from falproxy.proxy.transport.http1 import serialize_request_head
from falproxy.proxy.transport.pool import Pool
from falproxy.proxy.transport.response import PooledResponse
from tests.support.fake_fal import Connection as Serve
from tests.support.fake_fal import WireFal, read_head
from tests.support.waiting import SOON, wait_until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def request_to(wire: WireFal, method: str = "GET", **options: object) -> UpstreamRequest:
    port = int(wire.origin.rpartition(":")[2])
    headers = [("host", "queue.fal.run")]
    return UpstreamRequest(Origin("127.0.0.1", port, False), method, "/a?b", headers, **options)  # type: ignore[arg-type]


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read_body(response: TransportResponse) -> bytes:
    body = b""
    while chunk := await response.read():
        body += chunk
    return body


@pytest.fixture
async def make_pool() -> AsyncIterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def make(connect: float = 2.0, read_timeout: float = 5.0, **options: object) -> Pool:
        pools.append(Pool((connect, read_timeout), **options))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for transport in pools:
        await transport.close()


def serve_sequence(*responses: bytes) -> Serve:
    """Serve the responses in order, one for each request, then close the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for response in responses:
            await read_head(reader)
            writer.write(response)
            await writer.drain()

    return serve


def serve_always(response: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            writer.write(response)
            await writer.drain()

    return serve


# Reuse of connections


async def test_a_connection_is_reused(wire: WireFal, make_pool: Callable[..., Pool]) -> None:
    wire.serve = serve_always(OK)
    transport = make_pool()
    for _ in range(50):
        assert await read_body(await transport.send(request_to(wire))) == b"ok"
    assert wire.connections == 1


async def test_concurrent_calls_use_separate_connections(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_always(OK)
    transport = make_pool()
    for _ in range(3):
        responses = await asyncio.gather(*(transport.send(request_to(wire)) for _ in range(20)))
        assert [await read_body(response) for response in responses] == [b"ok"] * 20
    assert wire.connections == 20


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", id="an empty body"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", id="a status without a body"),
        pytest.param(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", id="a length only"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            id="chunked",
        ),
    ],
)
async def test_a_response_with_a_known_end_keeps_the_connection(
    wire: WireFal, make_pool: Callable[..., Pool], response: bytes
) -> None:
    wire.serve = serve_always(response)
    transport = make_pool()
    for _ in range(3):
        await read_body(await transport.send(request_to(wire)))
    assert wire.connections == 1


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(OK + b"HTTP/1.1 200 OK\r\n", id="the beginning of a second response"),
        pytest.param(OK + OK, id="a second response"),
        pytest.param(OK + b"\r\n", id="an empty line"),
        pytest.param(
            OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), id="Connection: close"
        ),
        pytest.param(OK.replace(b"1.1", b"1.0"), id="HTTP/1.0"),
        pytest.param(b"HTTP/1.1 103 Hint\r\n\r\n" + OK, id="an informational response before it"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 2",
            id="bytes behind the last chunk",
        ),
    ],
)
async def test_a_connection_with_unexpected_bytes_is_not_reused(
    wire: WireFal, make_pool: Callable[..., Pool], response: bytes
) -> None:
    wire.serve = serve_sequence(response, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    transport = make_pool()
    for turn in range(1, 4):
        assert await read_body(await transport.send(request_to(wire))) == b"ok"
        assert wire.connections == turn


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def with_field(line: bytes) -> bytes:
    return OK.replace(b"\r\n", b"\r\n" + line + b"\r\n", 1)


MALFORMED = [
    pytest.param(OK.replace(b"\r\n", b"\n"), id="bare line feeds"),
    pytest.param(with_field(b"X-A: 1\nX-B: 2"), id="one bare line feed"),
    pytest.param(with_field(b"X-A: 1\r\n 2"), id="a folded line"),
    pytest.param(with_field(b"X-A : 1"), id="a space before the colon"),
    pytest.param(with_field(b"X-A: 1\x002"), id="a NUL"),
    pytest.param(with_field(b"X-A: 1\x012"), id="a control character"),
    pytest.param(with_field(b"Content-Length: 3"), id="two lengths"),
    pytest.param(with_field(b"Transfer-Encoding: chunked"), id="length and chunked"),
    pytest.param(OK.replace(b": 2", b": +2"), id="a signed length"),
    pytest.param(OK.replace(b": 2", b": 2, 2"), id="a list of lengths"),
    pytest.param(with_field(b"X-A: " + b"a" * MAX_HEADER_FIELD), id="a field that is too large"),
    pytest.param(with_field(b"\r\n".join([b"X-A: 1"] * MAX_HEADERS)), id="too many fields"),
    pytest.param(OK.replace(b"OK", b"O" * (MAX_HEADER_FIELD + 1)), id="a reason that is too large"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 2**20, id="a field without end"),
    pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X-A: 1\r\n" * 2**17, id="a head without end"),
    pytest.param(CHUNKED + b"2\r\nokXX0\r\n\r\n", id="a chunk that runs on"),
    pytest.param(CHUNKED + b"+2\r\nok\r\n0\r\n\r\n", id="a signed chunk size"),
    pytest.param(CHUNKED + b"2;" + b"a" * 2**20, id="a chunk extension without end"),
    pytest.param(CHUNKED + b"2\r\nok\r\n0\r\n" + b"X-A: 1\r\n" * 2**17, id="endless trailers"),
    pytest.param(
        CHUNKED + b"2\r\nok\r\n0\r\nX-A: " + b"a" * MAX_HEADER_FIELD + b"\r\n\r\n",
        id="a trailer that is too large",
    ),
    pytest.param(
        OK.replace(b"Content-Length: 2", b"Transfer-Encoding: gzip"), id="an unknown coding"
    ),
    pytest.param(CHUNKED + b"2\r\nok\r\n", id="no last chunk"),
    pytest.param(OK[:-1], id="a byte too few"),
    pytest.param(OK[:20], id="half a head"),
]


@pytest.mark.parametrize("response", MALFORMED)
async def test_a_malformed_response_is_an_error(
    wire: WireFal, make_pool: Callable[..., Pool], response: bytes
) -> None:
    wire.serve = serve_sequence(response)
    with pytest.raises(ConnectionLostError):
        await read_body(await make_pool().send(request_to(wire)))


async def test_header_fields_arrive_in_order_and_unchanged(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    lines = (b"X-A: 1", b"x-b:", b"X-A: 2 \t", b"X-C:caf\xc3\xa9 \xff", b"Set-Cookie: a=1, b=2")
    wire.serve = serve_always(with_field(b"\r\n".join(lines)))
    response = await make_pool().send(request_to(wire))
    assert response.raw_headers == (
        (b"X-A", b"1"), (b"x-b", b""), (b"X-A", b"2"), (b"X-C", b"caf\xc3\xa9 \xff"),
        (b"Set-Cookie", b"a=1, b=2"), (b"Content-Length", b"2"),
    )  # fmt: skip
    assert response.headers.getall("x-a") == ["1", "2"]
    assert response.headers["x-c"] == "caf\u00e9 \udcff"


async def test_a_body_without_length_ends_with_the_connection(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_sequence(b"HTTP/1.1 200 \r\n\r\nall of it")
    response = await make_pool().send(request_to(wire))
    assert (response.reason, await read_body(response)) == ("", b"all of it")


class DiscardingTransport(asyncio.Transport):
    def write(self, data: object) -> None: ...

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None: ...


@pytest.mark.parametrize("ending", [b"0\r\n\r\n", b"0\r\nX-Trailer: 1\r\n\r\n"])
async def test_a_response_may_arrive_byte_by_byte(
    wire: WireFal, make_pool: Callable[..., Pool], ending: bytes
) -> None:
    data = b"HTTP/1.1 103 Hint\r\n\r\n" + CHUNKED + b"2;a=b\r\nok\r\n" + ending
    received = connection.Connection(asyncio.get_running_loop(), 5.0, lambda _: None)
    received.connection_made(DiscardingTransport())
    waiter: asyncio.Future[PooledResponse] = asyncio.get_running_loop().create_future()
    request = UpstreamRequest(Origin("x", 1, False), "GET", "/", [])
    received.start_request(request, b"", waiter)
    for number in range(len(data)):
        received.data_received(data[number : number + 1])
    response = await waiter
    assert response.raw_headers == ((b"Transfer-Encoding", b"chunked"),)
    assert response.read_nowait() == b"ok"


async def test_bytes_behind_a_response_are_not_delivered(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_sequence(OK + b"x", OK)
    transport = make_pool()
    for turn in range(1, 3):
        with pytest.raises(ConnectionLostError):
            await transport.send(request_to(wire))
        assert wire.connections == turn


async def test_closing_an_unread_response_closes_its_connection(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_always(b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + b"x" * 400_000)
    transport = make_pool()
    for turn in range(1, 4):
        (await transport.send(request_to(wire))).close()
        assert wire.connections == turn


async def test_closing_a_response_twice_does_not_affect_the_next_one(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_always(OK)
    transport = make_pool()
    first = await transport.send(request_to(wire))
    assert await read_body(first) == b"ok"
    second = await transport.send(request_to(wire))
    first.close()
    assert await first.read() == b""
    assert await read_body(second) == b"ok"
    assert wire.connections == 1


async def test_a_post_is_not_sent_on_a_connection_that_fal_has_closed(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    """The FIN has arrived, and the event loop has not reported it yet."""
    wire.serve = serve_sequence(OK)  # then closes the connection
    transport = make_pool()
    for turn in range(1, 6):
        response = await transport.send(request_to(wire, "POST", body=chunks(b"{}"), length=2))
        await read_body(response)
        until = asyncio.get_running_loop().time() + 0.05
        while asyncio.get_running_loop().time() < until:
            pass  # the event loop does not run, so that only a poll shows the FIN
        assert wire.connections == turn


async def test_an_idle_connection_is_closed_after_its_time(
    wire: WireFal, make_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.2)
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK)
        assert await reader.read() == b""
        closed.set()

    wire.serve = serve
    await read_body(await make_pool().send(request_to(wire)))
    async with asyncio.timeout(SOON):
        await closed.wait()
    assert IDLE_SECONDS < 60


async def test_the_number_of_idle_connections_is_bounded(
    wire: WireFal, make_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "IDLE_MAX", 2)
    open_now = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now
        open_now += 1
        try:
            await serve_always(OK)(reader, writer)
        finally:
            open_now -= 1

    wire.serve = serve
    transport = make_pool()
    for response in await asyncio.gather(*(transport.send(request_to(wire)) for _ in range(10))):
        await read_body(response)
    await wait_until(lambda: open_now == 2)


@pytest.mark.parametrize(
    ("body", "is_kept"),
    [
        pytest.param(OK, False, id="with a length"),
        pytest.param(OK, True, id="idle until it is closed"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
                     False, id="chunked"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", False, id="without a body"),
    ],
)  # fmt: skip
async def test_a_connection_that_has_ended_is_freed_without_garbage_collection(
    wire: WireFal,
    make_pool: Callable[..., Pool],
    monkeypatch: pytest.MonkeyPatch,
    body: bytes,
    is_kept: bool,
) -> None:
    """After a peak, cycles of thousands of connections would stay in memory for a long time."""
    monkeypatch.setattr(pool, "IDLE_MAX", 1 if is_kept else 0)
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.1)
    wire.serve = serve_always(body)
    transport = make_pool()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            await read_body(await transport.send(request_to(wire)))
        await wait_until(lambda: not transport._open_connections)
    finally:
        gc.enable()
    assert not any(transport._idle.values())


async def test_a_connection_that_waits_for_a_request_body_is_idle_too(
    wire: WireFal, make_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.2)
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        closed.set()

    async def never() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    wire.serve = serve
    task = asyncio.ensure_future(make_pool().send(request_to(wire, "POST", body=never(), length=9)))
    async with asyncio.timeout(SOON):
        await closed.wait()
    task.cancel()


async def test_a_garbage_collected_response_closes_its_connection(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + bytes(300_000))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        closed.set()

    wire.serve = serve
    transport = make_pool()
    await transport.send(request_to(wire))
    gc.collect()
    async with asyncio.timeout(SOON):
        await closed.wait()


@pytest.mark.parametrize("count", [4096, 4097, 4098, 20_000])
async def test_a_response_in_tiny_chunks_does_not_stop_the_next(
    wire: WireFal, make_pool: Callable[..., Pool], count: int
) -> None:
    """aiohttp's parser pauses after some thousands of unread chunks."""
    tiny = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * count
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000)
    wire.serve = serve_sequence(tiny + b"0\r\n\r\n", large, large)
    transport = make_pool()
    async with asyncio.timeout(20):
        for size in (count, 300_000, 300_000):
            response = await transport.send(request_to(wire))
            await asyncio.sleep(0.1)  # until all of it has arrived
            assert len(await read_body(response)) == size


LARGE = bytes(range(256)) * 4000


def large_response(length: int = len(LARGE)) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + LARGE


@pytest.mark.parametrize("is_read_late", [False, True])
async def test_large_responses_follow_one_another_on_a_connection(
    wire: WireFal, make_pool: Callable[..., Pool], is_read_late: bool
) -> None:
    wire.serve = serve_sequence(large_response(), OK, large_response(), large_response(), OK)
    transport = make_pool()
    for body in (LARGE, b"ok", LARGE, LARGE, b"ok"):
        response = await transport.send(request_to(wire))
        await asyncio.sleep(0.1 * is_read_late)
        assert await read_body(response) == body
    assert wire.connections == 1


@pytest.mark.parametrize("size", [1, 20, 40, 41, 42, 43])
async def test_a_large_response_whose_head_arrives_in_two_reads_is_complete(
    wire: WireFal, make_pool: Callable[..., Pool], size: int
) -> None:
    response = large_response()
    assert response.index(b"\r\n\r\n") == 40

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(response[:size])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(response[size:])
        await writer.drain()
        await reader.read()

    wire.serve = serve
    assert await read_body(await make_pool().send(request_to(wire))) == LARGE


async def test_bytes_behind_a_large_response_are_not_delivered(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_sequence(large_response() + OK, OK)
    transport = make_pool()
    for body in (LARGE, b"", LARGE):
        response = await transport.send(request_to(wire))
        if not body:
            response.close()
            continue
        assert await read_body(response) == body
    assert wire.connections == 3


async def test_a_large_response_that_breaks_off_raises(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_sequence(large_response(len(LARGE) + 1))
    response = await make_pool().send(request_to(wire))
    with pytest.raises(ConnectionLostError):
        await read_body(response)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@dataclass(slots=True)
class RepeatingWaiter:
    """Sends a second request as soon as the first response arrives, on the same connection if it is
    reusable."""

    transport: Pool
    origin: Origin
    responses: list[bytes | None] = field(default_factory=list)

    def done(self) -> bool:
        return len(self.responses) > 1

    def set_exception(self, error: BaseException) -> None:
        self.responses += [None, None]

    def set_result(self, response: PooledResponse) -> None:
        self.responses.append(response.read_nowait())
        opened = self.transport.acquire_idle(self.origin)
        if self.done() or opened is None:
            return
        opened.start_request(
            UpstreamRequest(self.origin, "GET", "/", []), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", self
        )


async def test_bytes_decrypted_with_a_response_are_not_the_next_one(
    make_pool: Callable[..., Pool], authority: trustme.CA
) -> None:
    """The first of two responses ends exactly at the end of the read buffer."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (connection.BUFFER_SIZE - 42)
    first = head + bytes(connection.BUFFER_SIZE - 42)
    assert len(head) == 42
    assert len(first) == connection.BUFFER_SIZE

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await read_head(reader)
            writer.write(first + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL")
            await read_head(reader)
            writer.write(OK)
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    origin = Origin("localhost", server.sockets[0].getsockname()[1], True)
    transport = make_pool(ssl_context=client_context(authority))
    waiter = RepeatingWaiter(transport, origin)
    opened = await transport._new_connection(origin)
    request = UpstreamRequest(origin, "GET", "/", [])
    opened.start_request(request, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", waiter, wait_for_body=True)
    await wait_until(lambda: waiter.responses, seconds=5)
    await asyncio.sleep(0.1)
    assert waiter.responses == [bytes(connection.BUFFER_SIZE - 42)]
    server.close()


async def test_a_cancelled_connect_does_not_affect_others(
    wire: WireFal, make_pool: Callable[..., Pool], authority: trustme.CA
) -> None:
    """asyncio fails if other code closes the socket below its TLS transport."""

    async def never_respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    wire.serve = never_respond
    transport = make_pool(connect=1.0, ssl_context=client_context(authority))
    request = request_to(wire)._replace(
        origin=Origin("127.0.0.1", request_to(wire).origin.port, True)
    )
    tasks = [asyncio.ensure_future(transport.send(request)) for _ in range(30)]
    await asyncio.sleep(0.2)
    for task in tasks[::2]:
        task.cancel()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(error) for error in errors} == {asyncio.CancelledError, ConnectError}
    wire.serve = serve_always(OK)
    for _ in range(60):
        assert await read_body(await transport.send(request_to(wire))) == b"ok"


async def test_tls_connections_are_reused_and_all_are_closed(
    make_pool: Callable[..., Pool], authority: trustme.CA
) -> None:
    """Messages of TLS 1.3 after the handshake must not close a connection."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await serve_always(OK)(reader, writer)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    origin = Origin("127.0.0.1", server.sockets[0].getsockname()[1], True)
    transport = make_pool(ssl_context=client_context(authority))
    for _ in range(5):
        requests = (
            UpstreamRequest(origin, "POST", "/", [("host", "fal.run")], chunks(b"{}"), 2)
            for _ in range(20)
        )
        responses = await asyncio.gather(*(transport.send(request) for request in requests))
        assert [await read_body(response) for response in responses] == [b"ok"] * 20
        await asyncio.sleep(0.05)
    assert opened == 20
    await transport.close()
    server.close()


# Time-outs


async def test_no_response_is_a_time_out(wire: WireFal, make_pool: Callable[..., Pool]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    wire.serve = serve
    transport = make_pool(read_timeout=0.2)
    with pytest.raises(TimeoutError):
        await transport.send(request_to(wire))


async def test_a_slow_reader_does_not_time_out(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    size = 8 * 2**20

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        await writer.drain()

    wire.serve = serve
    response = await make_pool(read_timeout=0.2).send(request_to(wire))
    await asyncio.sleep(0.7)
    assert len(await read_body(response)) == size


async def test_an_incomplete_body_is_read_in_pieces_and_a_complete_one_at_once(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    proceed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
        for piece in (b"ab", b"cd", b"ef", b"gh"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
            if piece == b"cd":
                await proceed.wait()

    wire.serve = serve
    response = await make_pool().send(request_to(wire))
    await asyncio.sleep(0.2)
    assert (await response.read(), await response.read()) == (b"ab", b"cd")
    proceed.set()
    while not response.is_complete:
        await asyncio.sleep(0.01)
    assert await response.read() == b"efgh"
    assert response.is_consumed


async def test_a_paused_request_body_does_not_time_out(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b"a" * 10
        await asyncio.sleep(0.7)
        yield b"b" * 10

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK)

    wire.serve = serve
    response = await make_pool(read_timeout=0.2).send(
        request_to(wire, "POST", body=slowly(), length=20)
    )
    assert await read_body(response) == b"ok"


async def test_a_server_that_does_not_read_the_body_is_a_time_out(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    aborted = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await aborted.wait()

    async def large() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield bytes(2**20)

    wire.serve = serve
    with pytest.raises(TimeoutError):
        await make_pool(read_timeout=0.3).send(
            request_to(wire, "POST", body=large(), length=1000 * 2**20)
        )
    aborted.set()


async def test_a_connect_that_hangs_is_a_connect_error(
    make_pool: Callable[..., Pool],
) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        with socket.create_connection(address):  # fills the accept queue
            origin = Origin(address[0], address[1], False)
            started = asyncio.get_running_loop().time()
            with pytest.raises(ConnectError):
                await make_pool(connect=0.3).send(UpstreamRequest(origin, "GET", "/", []))
            assert asyncio.get_running_loop().time() - started < 10


# Bodies


@pytest.mark.parametrize("length", [None, 9])
@pytest.mark.parametrize("parts", [(b"one two 3",), (b"one ", b"two ", b"3"), (b"", b"one two 3")])
async def test_a_body_arrives_unchanged(
    wire: WireFal, make_pool: Callable[..., Pool], parts: tuple[bytes, ...], length: int | None
) -> None:
    seen = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        end = b"0\r\n\r\n" if length is None else b"3"
        body = await reader.readuntil(end)
        seen.extend(head + body)
        writer.write(OK)

    wire.serve = serve
    if length is None and parts[0] == b"":
        parts = parts[1:]  # an empty chunk would end it
    response = await make_pool().send(request_to(wire, "POST", body=chunks(*parts), length=length))
    assert await read_body(response) == b"ok"
    head, _, body = bytes(seen).partition(b"\r\n\r\n")
    if length is None:
        assert b"transfer-encoding: chunked" in head
        body = b"".join(body.split(b"\r\n")[1::2])
    else:
        assert b"content-length: 9" in head
    assert body == b"one two 3"


async def test_no_request_follows_a_body_shorter_than_its_length(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read())

    wire.serve = serve
    transport = make_pool()
    with pytest.raises(ConnectionLostError):
        await transport.send(request_to(wire, "POST", body=chunks(b"abc"), length=9))
    await wait_until(lambda: seen)
    assert seen[0].endswith(b"\r\n\r\nabc")


async def test_an_exception_of_the_body_is_raised_and_ends_the_connection(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        closed.set()

    async def breaks() -> AsyncIterator[bytes]:
        yield b"a"
        raise LookupError("the client left")

    wire.serve = serve
    with pytest.raises(LookupError):
        await make_pool().send(request_to(wire, "POST", body=breaks(), length=9))
    async with asyncio.timeout(SOON):
        await closed.wait()


async def test_a_body_that_fails_before_its_first_byte_keeps_the_connection(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await read_head(reader))
            writer.write(OK)

    async def breaks() -> AsyncIterator[bytes]:
        for part in (b"a",):
            if len(part) == 1:
                raise LookupError
            yield part

    wire.serve = serve
    transport = make_pool()
    with pytest.raises(LookupError):
        await transport.send(request_to(wire, "POST", body=breaks(), length=9))
    assert await read_body(await transport.send(request_to(wire))) == b"ok"
    assert (len(seen), wire.connections) == (1, 1)


async def test_a_cancelled_call_closes_its_connection(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    begun, closed = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        begun.set()
        await reader.read()
        closed.set()

    wire.serve = serve
    task = asyncio.ensure_future(make_pool().send(request_to(wire)))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(SOON):
        await closed.wait()


# Request heads


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("a\r\nx-evil: 1", id="CR LF"),
        pytest.param("a\nb", id="LF"),
        pytest.param("a\rb", id="CR"),
        pytest.param("a\x00b", id="NUL"),
    ],
)
def test_a_header_with_a_control_character_is_not_sent(value: str) -> None:
    with pytest.raises(ValueError, match="control character"):
        serialize_request_head(
            UpstreamRequest(Origin("fal.run", 443, True), "GET", "/", [("x-a", value)])
        )


def test_undecodable_bytes_are_sent_unchanged() -> None:
    value = b"\xff\xfe caf\xc3\xa9".decode("utf-8", "surrogateescape")
    head = serialize_request_head(
        UpstreamRequest(Origin("fal.run", 443, True), "GET", "/", [("x-a", value)])
    )
    assert head == b"GET / HTTP/1.1\r\nx-a: \xff\xfe caf\xc3\xa9\r\n\r\n"


# CountingResolver


@dataclass
class CountingResolver(AbstractResolver):
    port: int
    hosts_seen: list[str] = field(default_factory=list)
    fails: bool = False
    hosts: tuple[tuple[str, int], ...] = (("127.0.0.1", socket.AF_INET),)

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.hosts_seen.append(host)
        assert family == socket.AF_UNSPEC, "IPv4 and IPv6 addresses are requested"
        await asyncio.sleep(0.05)
        if self.fails:
            raise OSError("no such name")
        return [
            ResolveResult(hostname=host, host=at, port=self.port, family=kind, proto=0, flags=0)
            for at, kind in self.hosts
        ]

    async def close(self) -> None: ...


async def test_concurrent_calls_share_one_dns_look_up(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_always(OK)
    resolver = CountingResolver(int(wire.origin.rpartition(":")[2]))
    transport = make_pool(resolver=resolver)
    request = request_to(wire)._replace(origin=Origin("queue.fal.run", resolver.port, False))
    responses = await asyncio.gather(*(transport.send(request) for _ in range(20)))
    assert [await read_body(response) for response in responses] == [b"ok"] * 20
    assert resolver.hosts_seen == ["queue.fal.run"]


async def test_an_unreachable_address_does_not_stop_the_others(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_always(OK)
    here, there = ("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)
    for hosts in ((there, here), (here, there)):
        resolver = CountingResolver(int(wire.origin.rpartition(":")[2]), hosts=hosts)
        request = request_to(wire)._replace(origin=Origin("queue.fal.run", resolver.port, False))
        assert await read_body(await make_pool(resolver=resolver).send(request)) == b"ok"


async def test_a_failed_dns_look_up_is_repeated(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_always(OK)
    resolver = CountingResolver(int(wire.origin.rpartition(":")[2]), fails=True)
    transport = make_pool(resolver=resolver)
    request = request_to(wire)._replace(origin=Origin("queue.fal.run", resolver.port, False))
    with pytest.raises(ConnectError):
        await transport.send(request)
    resolver.fails = False
    assert await read_body(await transport.send(request)) == b"ok"


# Errors inside the transport


class FailingWaiter:
    """A waiter that cannot use the response."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def done(self) -> bool:
        return self.error is not None

    def set_result(self, result: object, /) -> None:
        raise RuntimeError("cannot use it")

    def set_exception(self, exception: Exception, /) -> None:
        self.error = exception


async def test_an_error_in_a_callback_ends_the_exchange(
    wire: WireFal, make_pool: Callable[..., Pool]
) -> None:
    wire.serve = serve_always(OK)
    transport = make_pool()
    await read_body(await transport.send(request_to(wire)))
    connection = transport.acquire_idle(request_to(wire).origin)
    assert connection is not None
    waiter = FailingWaiter()
    head = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    connection.start_request(request_to(wire), head, waiter)
    await wait_until(lambda: waiter.error is not None, seconds=5)
    assert isinstance(waiter.error, ConnectionLostError)
    assert not connection.is_reusable(check_socket=False)
    assert await read_body(await transport.send(request_to(wire))) == b"ok"


async def test_the_number_of_remembered_hosts_is_bounded(
    wire: WireFal, make_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "ORIGINS_MAX", 4)
    wire.serve = serve_sequence(OK)  # then closes the connection
    resolver = CountingResolver(int(wire.origin.rpartition(":")[2]))
    transport = make_pool(resolver=resolver)
    for number in range(12):
        origin = Origin(f"host-{number}.fal.run", resolver.port, False)
        response = await transport.send(request_to(wire)._replace(origin=origin))
        assert await read_body(response) == b"ok"
        assert transport.acquire_idle(Origin(f"other-{number}.fal.run", 1, False)) is None
        await asyncio.sleep(0.02)  # until the end of the connection is known
    assert len(resolver.hosts_seen) == 12
    assert len(transport._dns_cache) <= 4
    assert len(transport._idle) <= 5
