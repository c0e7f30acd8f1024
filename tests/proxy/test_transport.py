"""Our own connections to fal: kept, watched, and never in doubt about whose answer it is."""

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

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def ask(wire: WireFal, method: str = "GET", **options: object) -> UpstreamRequest:
    port = int(wire.origin.rpartition(":")[2])
    headers = [("host", "queue.fal.run")]
    return UpstreamRequest(Origin("127.0.0.1", port, False), method, "/a?b", headers, **options)  # type: ignore[arg-type]


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def body_of(answer: TransportResponse) -> bytes:
    body = b""
    while chunk := await answer.read():
        body += chunk
    return body


@pytest.fixture
async def ways() -> AsyncIterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(connect: float = 2.0, silence: float = 5.0, **options: object) -> Pool:
        made.append(Pool((connect, silence), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        await each.close()


def answering(*answers: bytes) -> Serve:
    """Every request on a connection gets the next of these answers; then it is closed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await read_head(reader)
            writer.write(answer)
            await writer.drain()

    return serve


def forever(answer: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            writer.write(answer)
            await writer.drain()

    return serve


# Connections are kept


async def test_a_connection_serves_one_after_another(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = forever(OK)
    way = ways()
    for _ in range(50):
        assert await body_of(await way.send(ask(wire))) == b"ok"
    assert wire.connections == 1


async def test_calls_at_once_have_a_connection_each(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = forever(OK)
    way = ways()
    for _ in range(3):
        answers = await asyncio.gather(*(way.send(ask(wire)) for _ in range(20)))
        assert [await body_of(answer) for answer in answers] == [b"ok"] * 20
    assert wire.connections == 20


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", id="nothing in it"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", id="no body by its status"),
        pytest.param(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", id="a length only"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            id="in chunks",
        ),
    ],
)
async def test_an_answer_that_ends_by_itself_leaves_the_connection(
    wire: WireFal, ways: Callable[..., Pool], answer: bytes
) -> None:
    wire.serve = forever(answer)
    way = ways()
    for _ in range(3):
        await body_of(await way.send(ask(wire)))
    assert wire.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(OK + b"HTTP/1.1 200 OK\r\n", id="the beginning of another answer"),
        pytest.param(OK + OK, id="another answer"),
        pytest.param(OK + b"\r\n", id="an empty line"),
        pytest.param(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), id="it says so"),
        pytest.param(OK.replace(b"1.1", b"1.0"), id="an old server"),
        pytest.param(b"HTTP/1.1 103 Hint\r\n\r\n" + OK, id="a hint before it"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 2",
            id="more behind the last chunk",
        ),
    ],
)
async def test_a_connection_with_anything_odd_on_it_is_not_used_again(
    wire: WireFal, ways: Callable[..., Pool], answer: bytes
) -> None:
    wire.serve = answering(answer, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    way = ways()
    for turn in range(1, 4):
        assert await body_of(await way.send(ask(wire))) == b"ok"
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
    wire: WireFal, ways: Callable[..., Pool], response: bytes
) -> None:
    wire.serve = answering(response)
    with pytest.raises(ConnectionLostError):
        await body_of(await ways().send(ask(wire)))


async def test_header_fields_arrive_in_order_and_unchanged(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    lines = (b"X-A: 1", b"x-b:", b"X-A: 2 \t", b"X-C:caf\xc3\xa9 \xff", b"Set-Cookie: a=1, b=2")
    wire.serve = forever(with_field(b"\r\n".join(lines)))
    response = await ways().send(ask(wire))
    assert response.raw_headers == (
        (b"X-A", b"1"), (b"x-b", b""), (b"X-A", b"2"), (b"X-C", b"caf\xc3\xa9 \xff"),
        (b"Set-Cookie", b"a=1, b=2"), (b"Content-Length", b"2"),
    )  # fmt: skip
    assert response.headers.getall("x-a") == ["1", "2"]
    assert response.headers["x-c"] == "caf\u00e9 \udcff"


async def test_a_body_without_length_ends_with_the_connection(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = answering(b"HTTP/1.1 200 \r\n\r\nall of it")
    response = await ways().send(ask(wire))
    assert (response.reason, await body_of(response)) == ("", b"all of it")


class DiscardingTransport(asyncio.Transport):
    def write(self, data: object) -> None: ...

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None: ...


@pytest.mark.parametrize("ending", [b"0\r\n\r\n", b"0\r\nX-Trailer: 1\r\n\r\n"])
async def test_a_response_may_arrive_byte_by_byte(
    wire: WireFal, ways: Callable[..., Pool], ending: bytes
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


async def test_an_answer_with_garbage_behind_it_is_nobody_s(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = answering(OK + b"x", OK)
    way = ways()
    for turn in range(1, 3):
        with pytest.raises(ConnectionLostError):
            await way.send(ask(wire))
        assert wire.connections == turn


async def test_an_answer_that_nobody_reads_takes_its_connection_along(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = forever(b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + b"x" * 400_000)
    way = ways()
    for turn in range(1, 4):
        (await way.send(ask(wire))).close()
        assert wire.connections == turn


async def test_closing_an_answer_twice_leaves_the_next_one_alone(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = forever(OK)
    way = ways()
    first = await way.send(ask(wire))
    assert await body_of(first) == b"ok"
    second = await way.send(ask(wire))
    first.close()
    assert await first.read() == b""
    assert await body_of(second) == b"ok"
    assert wire.connections == 1


async def test_a_post_is_not_written_into_a_connection_that_is_closing(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    """The end of it has arrived, and this process has not been told yet."""
    wire.serve = answering(OK)  # one answer, and the connection is closed
    way = ways()
    for turn in range(1, 6):
        answer = await way.send(ask(wire, "POST", body=chunks(b"{}"), length=2))
        await body_of(answer)
        until = asyncio.get_running_loop().time() + 0.05
        while asyncio.get_running_loop().time() < until:
            pass  # the loop does not turn, so that only the system knows
        assert wire.connections == turn


async def test_an_idle_connection_is_closed_in_time(
    wire: WireFal, ways: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.2)
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK)
        assert await reader.read() == b""
        ended.set()

    wire.serve = serve
    await body_of(await ways().send(ask(wire)))
    async with asyncio.timeout(10):
        await ended.wait()
    assert IDLE_SECONDS < 60


async def test_no_more_connections_are_kept_than_may_be(
    wire: WireFal, ways: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "IDLE_MAX", 2)
    open_now = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now
        open_now += 1
        try:
            await forever(OK)(reader, writer)
        finally:
            open_now -= 1

    wire.serve = serve
    way = ways()
    for answer in await asyncio.gather(*(way.send(ask(wire)) for _ in range(10))):
        await body_of(answer)
    async with asyncio.timeout(10):
        while open_now != 2:
            await asyncio.sleep(0.01)


async def test_a_connection_that_waits_for_a_body_is_idle_too(
    wire: WireFal, ways: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.2)
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        ended.set()

    async def never() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    wire.serve = serve
    calling = asyncio.ensure_future(ways().send(ask(wire, "POST", body=never(), length=9)))
    async with asyncio.timeout(10):
        await ended.wait()
    calling.cancel()


async def test_an_answer_that_is_lost_takes_its_connection_along(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + bytes(300_000))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ended.set()

    wire.serve = serve
    way = ways()
    await way.send(ask(wire))
    gc.collect()
    async with asyncio.timeout(10):
        await ended.wait()


@pytest.mark.parametrize("count", [4096, 4097, 4098, 20_000])
async def test_an_answer_in_tiny_chunks_does_not_stop_the_next(
    wire: WireFal, ways: Callable[..., Pool], count: int
) -> None:
    """aiohttp has its parser pause after some thousands of unread chunks."""
    tiny = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * count
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000)
    wire.serve = answering(tiny + b"0\r\n\r\n", large, large)
    way = ways()
    async with asyncio.timeout(20):
        for size in (count, 300_000, 300_000):
            answer = await way.send(ask(wire))
            await asyncio.sleep(0.1)  # all of it arrives before anybody reads
            assert len(await body_of(answer)) == size


LARGE = bytes(range(256)) * 4000


def large_answer(length: int = len(LARGE)) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + LARGE


@pytest.mark.parametrize("is_read_late", [False, True])
async def test_large_answers_come_whole_one_behind_the_other(
    wire: WireFal, ways: Callable[..., Pool], is_read_late: bool
) -> None:
    wire.serve = answering(large_answer(), OK, large_answer(), large_answer(), OK)
    way = ways()
    for body in (LARGE, b"ok", LARGE, LARGE, b"ok"):
        answer = await way.send(ask(wire))
        await asyncio.sleep(0.1 * is_read_late)
        assert await body_of(answer) == body
    assert wire.connections == 1


@pytest.mark.parametrize("size", [1, 20, 40, 41, 42, 43])
async def test_a_large_response_whose_head_arrives_in_two_reads_is_complete(
    wire: WireFal, ways: Callable[..., Pool], size: int
) -> None:
    response = large_answer()
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
    assert await body_of(await ways().send(ask(wire))) == LARGE


async def test_what_comes_behind_a_large_answer_is_nobody_s(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = answering(large_answer() + OK, OK)
    way = ways()
    for body in (LARGE, b"", LARGE):
        answer = await way.send(ask(wire))
        if not body:
            answer.close()
            continue
        assert await body_of(answer) == body
    assert wire.connections == 3


async def test_a_large_answer_that_breaks_off_is_broken(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = answering(large_answer(len(LARGE) + 1))
    answer = await ways().send(ask(wire))
    with pytest.raises(ConnectionLostError):
        await body_of(answer)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return trust


@dataclass(slots=True)
class Next:
    """Whoever is told, and asks again at once, on the same connection if it may."""

    way: Pool
    origin: Origin
    answers: list[bytes | None] = field(default_factory=list)

    def done(self) -> bool:
        return len(self.answers) > 1

    def set_exception(self, error: BaseException) -> None:
        self.answers += [None, None]

    def set_result(self, answer: PooledResponse) -> None:
        self.answers.append(answer.read_nowait())
        again = self.way.acquire_idle(self.origin)
        if self.done() or again is None:
            return
        again.start_request(
            UpstreamRequest(self.origin, "GET", "/", []), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", self
        )


async def test_what_is_decrypted_already_is_not_the_next_one_s_answer(
    ways: Callable[..., Pool], authority: trustme.CA
) -> None:
    """The first of two answers ends just where a read of what is decrypted does."""
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
    way = ways(ssl_context=trusting(authority))
    told = Next(way, origin)
    dialled = await way._new_connection(origin)
    ask_for = UpstreamRequest(origin, "GET", "/", [])
    dialled.start_request(ask_for, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", told, wait_for_body=True)
    async with asyncio.timeout(5):
        while not told.answers:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert told.answers == [bytes(connection.BUFFER_SIZE - 42)]
    server.close()


async def test_who_leaves_while_a_connection_comes_about_harms_nobody(
    wire: WireFal, ways: Callable[..., Pool], authority: trustme.CA
) -> None:
    """asyncio minds when the socket below its TLS is closed by somebody else."""

    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    wire.serve = stay_silent
    way = ways(connect=1.0, ssl_context=trusting(authority))
    asking = ask(wire)._replace(origin=Origin("127.0.0.1", ask(wire).origin.port, True))
    leaving = [asyncio.ensure_future(way.send(asking)) for _ in range(30)]
    await asyncio.sleep(0.2)
    for each in leaving[::2]:
        each.cancel()
    ended = await asyncio.gather(*leaving, return_exceptions=True)
    assert {type(error) for error in ended} == {asyncio.CancelledError, ConnectError}
    wire.serve = forever(OK)
    for _ in range(60):
        assert await body_of(await way.send(ask(wire))) == b"ok"


async def test_connections_over_tls_are_kept_and_none_is_lost(
    ways: Callable[..., Pool], authority: trustme.CA
) -> None:
    """The tickets of TLS 1.3 arrive unasked, and are no reason to leave a connection."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await forever(OK)(reader, writer)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    origin = Origin("127.0.0.1", server.sockets[0].getsockname()[1], True)
    way = ways(ssl_context=trusting(authority))
    for _ in range(5):
        asked = (
            UpstreamRequest(origin, "POST", "/", [("host", "fal.run")], chunks(b"{}"), 2)
            for _ in range(20)
        )
        answers = await asyncio.gather(*(way.send(each) for each in asked))
        assert [await body_of(answer) for answer in answers] == [b"ok"] * 20
        await asyncio.sleep(0.05)
    assert opened == 20
    await way.close()
    server.close()


# Time


async def test_silence_before_the_answer_is_a_time_out(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    wire.serve = serve
    way = ways(silence=0.2)
    with pytest.raises(TimeoutError):
        await way.send(ask(wire))


async def test_a_slow_reader_is_not_fal_s_silence(wire: WireFal, ways: Callable[..., Pool]) -> None:
    size = 8 * 2**20

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        await writer.drain()

    wire.serve = serve
    answer = await ways(silence=0.2).send(ask(wire))
    await asyncio.sleep(0.7)
    assert len(await body_of(answer)) == size


async def test_what_is_under_way_is_read_in_the_pieces_it_came_in_and_the_rest_at_once(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    goes_on = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
        for piece in (b"ab", b"cd", b"ef", b"gh"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
            if piece == b"cd":
                await goes_on.wait()

    wire.serve = serve
    answer = await ways().send(ask(wire))
    await asyncio.sleep(0.2)
    assert (await answer.read(), await answer.read()) == (b"ab", b"cd")
    goes_on.set()
    while not answer.is_complete:
        await asyncio.sleep(0.01)
    assert await answer.read() == b"efgh"
    assert answer.is_consumed


async def test_a_client_that_pauses_its_body_is_not_fal_s_silence(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b"a" * 10
        await asyncio.sleep(0.7)
        yield b"b" * 10

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK)

    wire.serve = serve
    answer = await ways(silence=0.2).send(ask(wire, "POST", body=slowly(), length=20))
    assert await body_of(answer) == b"ok"


async def test_fal_that_does_not_take_a_body_is_a_time_out(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()

    async def large() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield bytes(2**20)

    wire.serve = serve
    with pytest.raises(TimeoutError):
        await ways(silence=0.3).send(ask(wire, "POST", body=large(), length=1000 * 2**20))
    gone.set()


async def test_a_connection_that_does_not_come_about_is_given_up(
    ways: Callable[..., Pool],
) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        with socket.create_connection(address):  # which fills its queue
            origin = Origin(address[0], address[1], False)
            started = asyncio.get_running_loop().time()
            with pytest.raises(ConnectError):
                await ways(connect=0.3).send(UpstreamRequest(origin, "GET", "/", []))
            assert asyncio.get_running_loop().time() - started < 10


# Bodies


@pytest.mark.parametrize("length", [None, 9])
@pytest.mark.parametrize("parts", [(b"one two 3",), (b"one ", b"two ", b"3"), (b"", b"one two 3")])
async def test_a_body_arrives_as_it_was(
    wire: WireFal, ways: Callable[..., Pool], parts: tuple[bytes, ...], length: int | None
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
        parts = parts[1:]  # an empty piece would end it
    answer = await ways().send(ask(wire, "POST", body=chunks(*parts), length=length))
    assert await body_of(answer) == b"ok"
    head, _, body = bytes(seen).partition(b"\r\n\r\n")
    if length is None:
        assert b"transfer-encoding: chunked" in head
        body = b"".join(body.split(b"\r\n")[1::2])
    else:
        assert b"content-length: 9" in head
    assert body == b"one two 3"


async def test_a_body_that_is_shorter_than_it_says_is_never_followed_by_another_request(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read())

    wire.serve = serve
    way = ways()
    with pytest.raises(ConnectionLostError):
        await way.send(ask(wire, "POST", body=chunks(b"abc"), length=9))
    async with asyncio.timeout(10):
        while not seen:
            await asyncio.sleep(0.01)
    assert seen[0].endswith(b"\r\n\r\nabc")


async def test_what_a_body_raises_comes_out_and_ends_the_connection(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        ended.set()

    async def breaks() -> AsyncIterator[bytes]:
        yield b"a"
        raise LookupError("the client left")

    wire.serve = serve
    with pytest.raises(LookupError):
        await ways().send(ask(wire, "POST", body=breaks(), length=9))
    async with asyncio.timeout(10):
        await ended.wait()


async def test_a_body_that_breaks_before_its_first_byte_costs_nothing(
    wire: WireFal, ways: Callable[..., Pool]
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
    way = ways()
    with pytest.raises(LookupError):
        await way.send(ask(wire, "POST", body=breaks(), length=9))
    assert await body_of(await way.send(ask(wire))) == b"ok"
    assert (len(seen), wire.connections) == (1, 1)


async def test_whoever_is_cancelled_takes_the_connection_along(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        begun.set()
        await reader.read()
        ended.set()

    wire.serve = serve
    calling = asyncio.ensure_future(ways().send(ask(wire)))
    await begun.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    async with asyncio.timeout(10):
        await ended.wait()


# Heads


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("a\r\nx-evil: 1", id="a line end"),
        pytest.param("a\nb", id="a line feed"),
        pytest.param("a\rb", id="a carriage return"),
        pytest.param("a\x00b", id="a NUL"),
    ],
)
def test_a_header_that_would_be_two_is_not_sent(value: str) -> None:
    with pytest.raises(ValueError, match="control character"):
        serialize_request_head(
            UpstreamRequest(Origin("fal.run", 443, True), "GET", "/", [("x-a", value)])
        )


def test_what_is_no_text_goes_out_as_it_came() -> None:
    value = b"\xff\xfe caf\xc3\xa9".decode("utf-8", "surrogateescape")
    head = serialize_request_head(
        UpstreamRequest(Origin("fal.run", 443, True), "GET", "/", [("x-a", value)])
    )
    assert head == b"GET / HTTP/1.1\r\nx-a: \xff\xfe caf\xc3\xa9\r\n\r\n"


# Names


@dataclass
class Names(AbstractResolver):
    port: int
    asked: list[str] = field(default_factory=list)
    fails: bool = False
    hosts: tuple[tuple[str, int], ...] = (("127.0.0.1", socket.AF_INET),)

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked.append(host)
        assert family == socket.AF_UNSPEC, "addresses of both kinds are asked for"
        await asyncio.sleep(0.05)
        if self.fails:
            raise OSError("no such name")
        return [
            ResolveResult(hostname=host, host=at, port=self.port, family=kind, proto=0, flags=0)
            for at, kind in self.hosts
        ]

    async def close(self) -> None: ...


async def test_a_name_is_asked_for_once_by_all_who_need_it(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = forever(OK)
    names = Names(int(wire.origin.rpartition(":")[2]))
    way = ways(resolver=names)
    asking = ask(wire)._replace(origin=Origin("queue.fal.run", names.port, False))
    answers = await asyncio.gather(*(way.send(asking) for _ in range(20)))
    assert [await body_of(answer) for answer in answers] == [b"ok"] * 20
    assert names.asked == ["queue.fal.run"]


async def test_an_address_where_nobody_is_leaves_the_others(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = forever(OK)
    here, there = ("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)
    for hosts in ((there, here), (here, there)):
        names = Names(int(wire.origin.rpartition(":")[2]), hosts=hosts)
        asking = ask(wire)._replace(origin=Origin("queue.fal.run", names.port, False))
        assert await body_of(await ways(resolver=names).send(asking)) == b"ok"


async def test_a_name_that_failed_is_asked_for_again(
    wire: WireFal, ways: Callable[..., Pool]
) -> None:
    wire.serve = forever(OK)
    names = Names(int(wire.origin.rpartition(":")[2]), fails=True)
    way = ways(resolver=names)
    asking = ask(wire)._replace(origin=Origin("queue.fal.run", names.port, False))
    with pytest.raises(ConnectError):
        await way.send(asking)
    names.fails = False
    assert await body_of(await way.send(asking)) == b"ok"
