"""The proxy as an ASGI application: start and stop, mounts, and addresses in its responses."""

import asyncio
import gc
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount

import falproxy
from falproxy.app.asgi import AsgiProxy
from falproxy.errors import SettingsError
from falproxy.server.asgi.bridge import Receive, Send
from falproxy.server.asgi.request_head import Scope
from falproxy.server.asgi.response_parser import Message
from tests.support.asgi_client import DISCONNECT, JSON, LOCAL, AsgiCall, call_asgi, http_scope
from tests.support.asgi_servers import ASGI_SERVERS, AsgiApp, serve_asgi
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY, RUN
from tests.support.waiting import wait_until

HEALTH = http_scope("GET", "/health", LOCAL)
QUEUED = {
    "request_id": "1",
    "status_url": "https://queue.fal.run/a/b/requests/1/status",
    "response_url": "https://queue.fal.run/a/b/requests/1",
    "cancel_url": "https://queue.fal.run/a/b/requests/1/cancel",
}


@pytest.fixture
def settings(fal: FakeFal, tmp_path: Path) -> falproxy.Settings:
    return make_settings(
        fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path, drain=2.0, cache=False
    )


async def lifespan_of(app: AsgiProxy, during: Callable[[], Awaitable[object]]) -> list[Message]:
    """Send lifespan events, with calls between start and stop. Return the events sent back."""
    call = AsgiCall(app, {"type": "lifespan"}, [{"type": "lifespan.startup"}])
    await call.until_sent(1)
    await during()
    call.feed({"type": "lifespan.shutdown"})
    await call.finish()
    return call.sent


async def test_the_lifespan_starts_and_stops_the_proxy(settings: falproxy.Settings) -> None:
    app = falproxy.asgi(settings)

    async def during() -> None:
        assert "started" in repr(app)
        assert (await call_asgi(app, HEALTH)).status == 200

    sent = await lifespan_of(app, during)
    assert [event["type"] for event in sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert "None" in repr(app)


async def test_a_failed_start_is_reported_to_the_server(
    settings: falproxy.Settings, tmp_path: Path
) -> None:
    def fail(app: web.Application) -> None:
        raise OSError("no space")

    async def fail_at_start(app: web.Application) -> None:
        fail(app)

    app = falproxy.asgi(settings)
    assert app._app is not None
    app._app.on_startup.append(fail_at_start)
    call = await call_asgi(app, {"type": "lifespan"}, [{"type": "lifespan.startup"}])
    assert call.sent == [{"type": "lifespan.startup.failed", "message": "no space"}]
    assert (await call_asgi(app, HEALTH)).status == 200, "the next start is another try"
    await app.__aexit__()


def test_wrong_settings_are_found_when_the_application_is_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        falproxy.asgi(make_settings(fal_key=CANARY, data_dir=tmp_path, allowed_origins=("*",)))


@pytest.mark.parametrize("embed", ["asgi", "setup"])
def test_an_embedded_proxy_does_not_send_calls_of_the_sandbox_to_fal(
    tmp_path: Path, embed: str
) -> None:
    def create(**fields: str) -> None:
        settings = make_settings(fal_key=CANARY, data_dir=tmp_path, sandbox=True, **fields)
        if embed == "asgi":
            falproxy.asgi(settings)
        else:
            falproxy.setup(web.Application(), settings)

    with pytest.raises(SettingsError, match="FALPROXY_UPSTREAM_ORIGIN"):
        create()
    create(upstream_origin="http://127.0.0.1:8081")


async def test_the_first_requests_start_the_proxy_once(settings: falproxy.Settings) -> None:
    app = falproxy.asgi(settings)
    calls = [AsgiCall(app, HEALTH) for _ in range(20)]
    assert [(await call.finish()).status for call in calls] == [200] * 20
    await app.__aexit__()


async def test_a_first_client_that_leaves_does_not_stop_the_start(
    settings: falproxy.Settings,
) -> None:
    app = falproxy.asgi(settings)
    first, second = AsgiCall(app, HEALTH), AsgiCall(app, HEALTH)
    await asyncio.sleep(0)
    first.task.cancel()
    assert (await second.finish()).status == 200
    await app.__aexit__()


def test_without_a_lifespan_the_end_of_the_event_loop_stops_the_proxy(tmp_path: Path) -> None:
    closed: list[str] = []
    app = falproxy.asgi(make_settings(fal_key=CANARY, data_dir=tmp_path))
    assert app._app is not None

    async def note_close(app: web.Application) -> None:
        closed.append("closed")

    app._app.on_cleanup.append(note_close)

    async def serve_one_request() -> None:
        assert (await call_asgi(app, HEALTH)).status == 200

    asyncio.run(serve_one_request())
    assert closed == ["closed"]
    asyncio.run(serve_one_request())  # such as the next test of an application


async def test_a_stop_waits_for_the_running_call(settings: falproxy.Settings, fal: FakeFal) -> None:
    go_on = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        await go_on.wait()
        return web.json_response({"done": True})

    fal.respond = slow
    app = falproxy.asgi(settings)
    async with app:
        call = AsgiCall(app, http_scope("GET", headers=LOCAL))
        await wait_until(lambda: fal.seen)
        asyncio.get_running_loop().call_later(0.2, go_on.set)
    await call.finish()
    assert (call.status, call.body) == (200, b'{"done": true}')


async def test_a_stop_ends_a_call_that_takes_too_long(
    settings: falproxy.Settings, fal: FakeFal, tmp_path: Path
) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    fal.respond = endless
    quick = make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path, drain=0.2)
    app = falproxy.asgi(quick)
    async with asyncio.timeout(10):
        async with app:
            call = AsgiCall(app, http_scope("GET", headers=LOCAL))
            while not fal.seen:
                await asyncio.sleep(0.01)
        with pytest.raises(ConnectionResetError):
            await call.finish()


async def queue_urls(url: str, **headers: str) -> set[str]:
    """Submit a job by the base URL of the queue, and return where its URLs point to."""
    async with (
        ClientSession() as session,
        session.post(f"{url}/api/fal/queue/a/b", json={}, headers=headers) as response,
    ):
        assert response.status == 200
        document = await response.json()
    assert document["status_url"].endswith("/api/fal/queue/a/b/requests/1/status")
    return {url.partition("/api/")[0] for name, url in document.items() if name.endswith("_url")}


async def respond_queued(request: web.Request) -> web.StreamResponse:
    return web.json_response(QUEUED)


def mounted_in_starlette(proxy: AsgiProxy, path: str) -> AsgiApp:
    return Starlette(routes=[Mount(path, proxy)])


def mounted_in_fastapi(proxy: AsgiProxy, path: str) -> AsgiApp:
    app = FastAPI(lifespan=proxy.lifespan)
    app.mount(path, proxy)
    return app


def nested(proxy: AsgiProxy, path: str) -> AsgiApp:
    outer, inner, head = FastAPI(), FastAPI(), path.rpartition("/")[0]
    inner.mount(path.removeprefix(head), proxy)
    outer.mount(head or "/", inner)
    return outer


HOSTS = [mounted_in_starlette, mounted_in_fastapi, nested]


@pytest.mark.parametrize("kind", ASGI_SERVERS)
@pytest.mark.parametrize("mount", HOSTS)
@pytest.mark.parametrize("path", ["/fal", "/deep/er"])
async def test_urls_of_jobs_contain_the_path_of_the_mount(
    settings: falproxy.Settings,
    fal: FakeFal,
    kind: str,
    mount: Callable[[AsgiProxy, str], AsgiApp],
    path: str,
) -> None:
    fal.respond = respond_queued
    proxy = falproxy.asgi(settings)
    async with proxy, serve_asgi(mount(proxy, path), kind) as origin:
        assert await queue_urls(origin + path) == {origin + path}
        https = origin.replace("http:", "https:") + path
        assert await queue_urls(origin + path, **{"X-Forwarded-Proto": "https"}) == {https}
        async with ClientSession() as session:
            async with session.get(f"{origin}{path}/") as page:
                assert (page.status, page.content_type) == (200, "text/html")
            async with session.get(f"{origin}{path}/openapi.json") as response:
                assert (await response.json())["servers"][0]["url"] == origin + path


async def test_urls_of_jobs_contain_the_path_of_an_outer_proxy(
    settings: falproxy.Settings, fal: FakeFal
) -> None:
    fal.respond = respond_queued
    proxy = falproxy.asgi(settings)
    mounted = mounted_in_starlette(proxy, "/fal")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await mounted({**scope, "root_path": "/outer"}, receive, send)

    async with proxy, serve_asgi(app, "uvicorn") as origin:
        assert await queue_urls(f"{origin}/fal") == {f"{origin}/outer/fal"}


async def test_a_prefix_is_for_hosts_that_do_not_mount(
    settings: falproxy.Settings, fal: FakeFal
) -> None:
    fal.respond = respond_queued
    proxy = falproxy.asgi(settings, prefix="/fal/")
    async with proxy, serve_asgi(proxy, "uvicorn") as origin:
        assert await queue_urls(f"{origin}/fal") == {f"{origin}/fal"}
        async with ClientSession() as session:
            for path in (PROXY, "/falx/health", "/health"):
                async with session.get(origin + path) as response:
                    assert response.status == 404
            async with session.get(f"{origin}/fal/health") as response:
                assert response.status == 200


async def test_the_scheme_of_the_server_is_that_of_the_urls(
    settings: falproxy.Settings, fal: FakeFal
) -> None:
    fal.respond = respond_queued
    async with falproxy.asgi(settings) as app:
        scope = http_scope("POST", "/api/fal/queue/a/b", (LOCAL[0], *JSON), scheme="https")
        call = await call_asgi(app, scope)
    assert b'"https://localhost/api/fal/queue/a/b/requests/1/status"' in call.body


async def test_the_hook_reads_the_scope_of_the_host(
    settings: falproxy.Settings, fal: FakeFal
) -> None:
    async def user(request: web.Request) -> str | None:
        assert request.remote == "192.0.2.7"
        name: str | None = falproxy.asgi_scope(request).get("user")
        return name

    async with falproxy.asgi(settings, authenticate=user) as app:
        assert (await call_asgi(app, http_scope("GET", headers=LOCAL))).status == 401
        assert fal.seen == []
        call = await call_asgi(app, http_scope("GET", headers=LOCAL, user="ada"))
        assert call.status == 200


@asynccontextmanager
async def with_base_middleware(proxy: AsgiProxy, kind: str) -> AsyncIterator[str]:
    """Serve the proxy inside Starlette's middleware that relays bodies itself."""

    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    middleware = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)]
    app = Starlette(routes=[Mount("/fal", proxy)], middleware=middleware)
    async with proxy, serve_asgi(app, kind) as origin:
        yield f"{origin}/fal"


@pytest.mark.parametrize("kind", ASGI_SERVERS)
async def test_middleware_of_the_host_can_relay_bodies(
    settings: falproxy.Settings, fal: FakeFal, kind: str
) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await request.read(), content_type="application/json")

    fal.respond = echo
    async with with_base_middleware(falproxy.asgi(settings), kind) as base, ClientSession() as one:
        body = b'{"a": "%s"}' % (b"x" * 3_000_000)
        headers = {"x-fal-target-url": RUN, "Content-Type": "application/json"}
        async with one.post(base + PROXY, data=io.BytesIO(body), headers=headers) as response:
            assert await response.read() == body


async def test_http_2_works_with_hypercorn(settings: falproxy.Settings, fal: FakeFal) -> None:
    h2 = pytest.importorskip("h2.connection")
    events = pytest.importorskip("h2.events")
    fal.respond = respond_queued
    proxy = falproxy.asgi(settings)
    async with proxy, serve_asgi(proxy, "hypercorn") as origin:
        port = int(origin.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        connection = h2.H2Connection()
        connection.initiate_connection()
        heads = {
            1: [(":method", "GET"), ("x-fal-target-url", RUN)],
            3: [(":method", "POST"), ("x-fal-target-url", RUN)],
            5: [(":method", "POST"), ("x-fal-target-url", "https://evil.tld/")],
        }
        common = [(":scheme", "http"), (":authority", "localhost"), (":path", PROXY)]
        for stream, head in heads.items():
            method, *others = head
            fields = [method, *common, *others, ("content-type", "application/json")]
            connection.send_headers(stream, fields, end_stream=stream == 1)
        connection.send_data(3, b'{"a": 1}', end_stream=True)
        connection.send_data(5, b"{}", end_stream=True)
        statuses: dict[int, bytes] = {}
        open_streams = {*heads}
        async with asyncio.timeout(20):
            while open_streams:
                writer.write(connection.data_to_send())
                for event in connection.receive_data(await reader.read(2**16)):
                    if isinstance(event, events.ResponseReceived):
                        statuses[event.stream_id] = dict(event.headers)[b":status"]
                    elif isinstance(event, events.StreamEnded):
                        open_streams.discard(event.stream_id)
        writer.close()
    assert statuses == {1: b"200", 3: b"200", 5: b"412"}
    assert sorted(seen.body for seen in fal.seen) == [b"", b'{"a": 1}']


async def test_requests_leave_no_objects_behind(settings: falproxy.Settings) -> None:
    async with falproxy.asgi(settings) as app:
        for _ in range(5):
            await call_asgi(app, HEALTH)
        leaving = AsgiCall(app, HEALTH)
        leaving.feed(DISCONNECT)
        await leaving.finish()
        await asyncio.sleep(0)
        gc.collect()
        names = [type(each).__name__ for each in gc.get_objects()]
        assert names.count("MemoryTransport") == 0
        assert threading.active_count() < 20
