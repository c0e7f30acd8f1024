"""One ASGI request: its body, its response, and how it ends."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

import falproxy
from falproxy.app.asgi import AsgiProxy
from falproxy.server.asgi.bridge import (
    PIECE,
    IncompleteResponseError,
    InvalidBodyError,
    Receive,
    Send,
    serve_request,
)
from falproxy.server.asgi.memory_transport import WRITE_BUFFER_MAX
from falproxy.server.limits import CONNECTION_LIMITS, ConnectionLimits
from tests.support.asgi_client import (
    DISCONNECT,
    END,
    JSON,
    LOCAL,
    AsgiCall,
    body_part,
    call_asgi,
    http_scope,
)
from tests.support.fake_fal import FakeFal, WireFal
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.waiting import SOON, wait_until

MIB = 2**20
CHUNKED = (b"transfer-encoding", b"chunked")


def settings_for(origin: str, folder: Path, **options: object) -> falproxy.Settings:
    defaults: dict[str, object] = {"fal_key": CANARY, "upstream_origin": origin}
    return make_settings(**defaults | {"data_dir": folder, "allowed_targets": ("**",)} | options)


@pytest.fixture
async def app(fal: FakeFal, tmp_path: Path) -> AsyncIterator[AsgiProxy]:
    async with falproxy.asgi(settings_for(fal.origin, tmp_path)) as app:
        yield app


def with_length(length: int, *others: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [*LOCAL, *JSON, (b"content-length", b"%d" % length), *others]


@pytest.mark.parametrize("version", ["1.0", "1.1", "2", "3"])
async def test_a_body_with_a_length_is_forwarded(
    app: AsgiProxy, fal: FakeFal, version: str
) -> None:
    scope = http_scope(headers=with_length(7), http_version=version)
    call = await call_asgi(app, scope, [body_part(b'{"a'), body_part(b'": 1', more_body=True), END])
    assert call.status == 400 or call.is_complete
    call = await call_asgi(app, scope, [body_part(b'{"a":'), body_part(b"1}", more_body=False)])
    assert (call.status, call.body) == (200, b'{"hello": "fal"}')
    assert fal.seen[-1].body == b'{"a":1}'


@pytest.mark.parametrize(
    ("version", "headers"), [("1.1", [CHUNKED]), ("2", []), ("3", [])], ids=["1.1", "2", "3"]
)
@pytest.mark.parametrize(
    "parts",
    [
        [body_part(b'{"a":1}', more_body=False)],
        [body_part(b'{"a":'), body_part(b"1}"), END],
        [body_part(b""), body_part(b'{"a":1}'), body_part(b""), END],
    ],
    ids=["whole", "in parts", "with empty parts"],
)
async def test_a_body_without_a_length_is_forwarded(
    app: AsgiProxy,
    fal: FakeFal,
    version: str,
    headers: list[tuple[bytes, bytes]],
    parts: list[dict[str, object]],
) -> None:
    scope = http_scope(headers=[*LOCAL, *JSON, *headers], http_version=version)
    call = await call_asgi(app, scope, parts)
    assert (call.status, fal.seen[-1].body) == (200, b'{"a":1}')


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_a_get_without_a_body_has_none(app: AsgiProxy, fal: FakeFal, version: str) -> None:
    call = await call_asgi(app, http_scope("GET", headers=LOCAL, http_version=version))
    assert call.status == 200
    assert fal.seen[-1].header("content-length") is None
    assert fal.seen[-1].header("transfer-encoding") is None


async def test_a_get_with_a_body_in_http_2_is_refused(app: AsgiProxy, fal: FakeFal) -> None:
    scope = http_scope("GET", headers=LOCAL, http_version="2")
    call = await call_asgi(app, scope, [body_part(b"{}", more_body=False)])
    assert (call.status, fal.seen) == (400, [])


@pytest.mark.parametrize(
    ("headers", "parts"),
    [
        pytest.param(with_length(2), [body_part(b"{}GET / HTTP/1.1\r\n\r\n")], id="longer"),
        pytest.param(with_length(2), [body_part(b"{"), body_part(b"}x"), END], id="a byte more"),
        pytest.param(with_length(9), [body_part(b"{}", more_body=False)], id="shorter"),
        pytest.param(LOCAL, [body_part(b"GET / HTTP/1.1\r\n\r\n")], id="not announced"),
    ],
)
async def test_a_body_of_another_length_is_an_error_of_the_server(
    app: AsgiProxy, fal: FakeFal, headers: object, parts: list[dict[str, object]]
) -> None:
    fal.respond = never_respond
    with pytest.raises(InvalidBodyError):
        await call_asgi(app, http_scope(headers=headers), parts)  # type: ignore[arg-type]


async def never_respond(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(
    "field", [(b"x-a", b"1\r\nx-b: 2"), (b"x a", b"1"), (b"content-length", b"1, 2")]
)
async def test_an_invalid_head_is_a_400(
    app: AsgiProxy, fal: FakeFal, field: tuple[bytes, bytes]
) -> None:
    call = await call_asgi(app, http_scope(headers=[*LOCAL, *JSON, field]))
    assert (call.status, call.is_complete, fal.seen) == (400, True, [])


async def test_a_first_message_that_does_not_come_is_a_408(fal: FakeFal, tmp_path: Path) -> None:
    async with falproxy.asgi(settings_for(fal.origin, tmp_path, head_timeout=0.05)) as app:
        call = await call_asgi(app, http_scope(headers=LOCAL, http_version="2"), [])
    assert (call.status, fal.seen) == (408, [])


@pytest.mark.parametrize("size", [70_000, 200_000])
async def test_a_head_that_is_too_large_is_refused(app: AsgiProxy, fal: FakeFal, size: int) -> None:
    parts = [(b"x-part-%d" % number, b"a" * 10_000) for number in range(size // 10_000)]
    call = await call_asgi(app, http_scope(headers=[*LOCAL, *parts]))
    assert (call.status, fal.seen) == (431, [])


@pytest.mark.parametrize("path", ["/health", "/openapi.json"])
async def test_a_head_request_has_no_body(app: AsgiProxy, path: str) -> None:
    call = await call_asgi(app, http_scope("HEAD", path, LOCAL))
    assert (call.status, call.body, call.is_complete) == (200, b"", True)
    assert int(call.headers[b"content-length"]) > 0


async def test_a_304_has_no_body(app: AsgiProxy) -> None:
    first = await call_asgi(app, http_scope("GET", "/openapi.json", LOCAL))
    headers = [*LOCAL, (b"if-none-match", first.headers[b"etag"])]
    call = await call_asgi(app, http_scope("GET", "/openapi.json", headers))
    assert (call.status, call.body, call.is_complete) == (304, b"", True)


async def test_headers_of_the_connection_are_not_in_the_response(app: AsgiProxy) -> None:
    call = await call_asgi(app, http_scope())
    names = {name for name, _ in call.sent[0]["headers"]}
    assert not names & {b"connection", b"transfer-encoding", b"keep-alive"}
    assert all(name == name.lower() for name in names)


async def test_a_file_of_the_documentation_is_sent(app: AsgiProxy) -> None:
    call = await call_asgi(app, http_scope("GET", "/docs/swagger-ui.css", LOCAL))
    assert call.status in (200, 404)  # 404: the extra is not installed
    assert call.is_complete


async def test_an_event_is_sent_before_the_next_one_is_there(app: AsgiProxy, fal: FakeFal) -> None:
    go_on = asyncio.Event()

    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await go_on.wait()
        await response.write(b"data: 2\n\n")
        return response

    fal.respond = events
    call = AsgiCall(app, http_scope("GET", headers=LOCAL))
    await call.until_sent(2)
    assert call.body == b"data: 1\n\n"
    go_on.set()
    await call.finish()
    assert (call.body, call.is_complete) == (b"data: 1\n\ndata: 2\n\n", True)


async def test_a_client_that_leaves_cancels_its_call(app: AsgiProxy, fal: FakeFal) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        started.set()
        try:
            return await never_respond(request)
        finally:
            cancelled.set()

    fal.respond = wait
    call = AsgiCall(app, http_scope())
    async with asyncio.timeout(SOON):
        await started.wait()
        call.feed(DISCONNECT)
        await call.finish()
        await cancelled.wait()
    assert call.sent == []


@pytest.mark.parametrize("way", ["cancelled", "cannot send"])
async def test_a_request_that_the_server_ends_cancels_its_call(
    app: AsgiProxy, fal: FakeFal, way: str
) -> None:
    cancelled = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(MIB))
        finally:
            cancelled.set()

    async def refuse(message: object) -> None:
        raise OSError("The client left")

    fal.respond = endless
    if way == "cancelled":
        call = AsgiCall(app, http_scope("GET", headers=LOCAL))
        await call.until_sent(5)
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
    else:
        waiting = asyncio.Queue[dict[str, object]]()
        await app(http_scope("GET", headers=LOCAL), waiting.get, refuse)
    async with asyncio.timeout(SOON):
        await cancelled.wait()


async def test_a_client_that_reads_nothing_stops_the_stream(app: AsgiProxy, fal: FakeFal) -> None:
    written, stalled = 0, asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written
        assert request.transport is not None
        connection: socket.socket = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(400):
            try:
                async with asyncio.timeout(1):
                    await response.write(bytes(2**16))
            except TimeoutError:
                stalled.set()
                raise
            written += 2**16
        return response

    fal.respond = endless
    call = AsgiCall(app, http_scope("GET", headers=LOCAL))
    call.can_send.clear()
    async with asyncio.timeout(20):
        await stalled.wait()
    assert written < 16 * MIB, "kernel buffers only"
    call.feed(DISCONNECT)
    await call.finish()


async def test_a_stream_that_the_client_does_not_read_for_long_ends(
    fal: FakeFal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def large(request: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(8 * WRITE_BUFFER_MAX))

    fal.respond = large
    limits = ConnectionLimits(send_timeout=0.2)
    app = falproxy.create_app(settings_for(fal.origin, tmp_path))
    app[CONNECTION_LIMITS] = limits
    proxy = falproxy.asgi(settings_for(fal.origin, tmp_path))
    monkeypatch.setattr(proxy, "_app", app)
    async with proxy:
        call = AsgiCall(proxy, http_scope("GET", headers=LOCAL))
        call.can_send.clear()
        with pytest.raises(IncompleteResponseError):
            await call.finish()


class PausedProtocol(asyncio.Protocol):
    """A protocol that pauses reading after each piece of data."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[bytes] = asyncio.Queue()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received.put_nowait(data)
        self.transport.pause_reading()


async def test_a_body_is_read_at_the_speed_of_the_server() -> None:
    length = 8 * MIB
    scope = http_scope(headers=with_length(length))
    protocol = PausedProtocol()

    async def app(scope: dict[str, object], receive: Receive, send: Send) -> None:
        settings = {"prefix": "", "head_timeout": 1.0}
        await serve_request(lambda: protocol, scope, receive, send, **settings)  # type: ignore[arg-type]

    call = AsgiCall(app, scope, [body_part(bytes(MIB))] * 8)
    call.feed(END)
    assert (await protocol.received.get()).startswith(b"POST ")
    for number in range(length // PIECE):
        messages = max(number - 1, 0) * PIECE // MIB + 1
        await call.until_received(messages)
        assert (call.received, protocol.received.empty()) == (messages, True)
        protocol.transport.resume_reading()
        assert len(await protocol.received.get()) == PIECE
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
    ],
)
async def test_an_incomplete_response_is_not_completed(
    wire: WireFal, tmp_path: Path, response: bytes
) -> None:
    wire.send(response)
    async with falproxy.asgi(settings_for(wire.origin, tmp_path)) as app:
        call = AsgiCall(app, http_scope("GET", headers=LOCAL))
        with pytest.raises(IncompleteResponseError):
            await call.finish()
    assert not call.is_complete


async def test_200_requests_at_once_get_their_own_responses(app: AsgiProxy, fal: FakeFal) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await request.read(), content_type="application/json")

    fal.respond = echo
    bodies = [b'{"number": %d}' % number for number in range(200)]
    calls = [
        AsgiCall(
            app, http_scope(headers=with_length(len(body))), [body_part(body, more_body=False)]
        )
        for body in bodies
    ]
    for body, call in zip(bodies, calls, strict=True):
        assert (await call.finish()).body == body


async def test_requests_above_the_limit_are_a_503(fal: FakeFal, tmp_path: Path) -> None:
    fal.respond = never_respond
    async with falproxy.asgi(settings_for(fal.origin, tmp_path, max_connections=8)) as app:
        calls = [AsgiCall(app, http_scope()) for _ in range(8)]
        await wait_until(lambda: len(fal.seen) >= 8)
        assert (await call_asgi(app, http_scope())).status == 503
        assert (await call_asgi(app, http_scope("GET", "/health", LOCAL))).status == 200
        for call in calls:
            call.feed(DISCONNECT)
            await call.finish()


async def test_a_websocket_is_refused(app: AsgiProxy) -> None:
    scope = {**http_scope("GET", headers=LOCAL), "type": "websocket"}
    call = await call_asgi(app, scope, [{"type": "websocket.connect"}])
    assert call.sent == [{"type": "websocket.close"}]


async def test_an_unknown_protocol_is_an_error(app: AsgiProxy) -> None:
    with pytest.raises(ValueError, match="mqtt"):
        await call_asgi(app, {"type": "mqtt"})
