"""The proxy under test, on loopback."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession, TCPConnector, web
from aiohttp.test_utils import BaseTestServer, TestClient, TestServer
from aiohttp.web_runner import BaseRunner
from yarl import URL

from falproxy import create_app
from falproxy.app.asgi import AsgiProxy
from falproxy.media.fetch import Fetcher
from falproxy.server.fast_path.protocol import FastPathRunner
from falproxy.stores.cache.result_cache import RESULT_CACHE
from tests.support.asgi_servers import ASGI_SERVERS, RunningServer, serve_asgi
from tests.support.empty_ledger import with_empty_ledger
from tests.support.key_search import CANARY, LEAKS, leak_trace
from tests.support.settings import make_settings
from tests.support.urls import PROXY

# A test that uses `shared_gateway`, `shared_fal` or `shared_session` runs in their event loop.
SHARED = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True, slots=True)
class Gateway:
    """The proxy under test, and a client of it.

    origin: the proxy's URL without a path.
    has_reasons: whether the server relays reason phrases.
    """

    client: TestClient[web.Request, web.Application]
    origin: str
    has_reasons: bool = True

    async def call(
        self, target: str | None, method: str = "POST", **options: object
    ) -> ClientResponse:
        """Send a request to the proxy route as fal's clients do."""
        headers = list(options.pop("headers", []))  # type: ignore[call-overload]
        if target is not None:
            headers.append(("x-fal-target-url", target))
        return await self.client.request(method, PROXY, headers=headers, **options)  # type: ignore[arg-type]

    async def forget_results(self) -> None:
        """Empty the result cache of a shared proxy."""
        app = self.client.app
        assert app is not None
        await app[RESULT_CACHE].breaker.store.clear()

    async def send_raw(self, request: bytes) -> bytes:
        """Send bytes that no client library would send, and return everything received."""
        port = int(self.origin.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        async with asyncio.timeout(5):
            received = await reader.read()
        writer.close()
        LEAKS.search(received.decode("latin-1"), "raw response")
        return received


MakeGateway = Callable[..., Awaitable[Gateway]]


def open_session() -> ClientSession:
    """Return a client that neither decompresses bodies nor limits header fields."""
    return ClientSession(auto_decompress=False, max_field_size=65536)


class FastPathTestServer(TestServer):
    """A server with the fast path, as in `falproxy serve`."""

    async def _make_runner(self, **options: Any) -> BaseRunner:
        return FastPathRunner(self.app, **options)


@asynccontextmanager
async def open_gateway(
    origin: str,
    data_dir: Path,
    server_kind: str,
    /,
    fetcher: Fetcher | None = None,
    **options: object,
) -> AsyncIterator[Gateway]:
    """Start the proxy.

    origin: of fal.
    server_kind: as of the fixture.
    options: settings; they may have another `data_dir`.
    """
    is_fast = server_kind == "fast"
    settings = {"fal_key": CANARY, "upstream_origin": origin, "data_dir": data_dir}
    transport = "aiohttp" if server_kind == "session" else "pool"
    settings |= {"fast_path": is_fast, "transport": transport} | options
    # The policy and the check of host names have tests of their own.
    settings = {"allowed_targets": ("**",), "allowed_hosts": ("*",)} | settings
    made = with_empty_ledger(make_settings(**settings))
    async with AsyncExitStack() as stack:
        server: BaseTestServer
        if server_kind in ASGI_SERVERS:
            app = AsgiProxy(made, fetcher=fetcher)
            url = await stack.enter_async_context(serve_asgi(app, server_kind))
            server = RunningServer(URL(url))
        else:
            native = create_app(made, fetcher=fetcher)
            server = FastPathTestServer(native) if is_fast else TestServer(native)
        client: Any = TestClient(
            server,
            auto_decompress=False,
            max_field_size=65536,
            connector=TCPConnector(limit=0),
            trace_configs=[leak_trace()],
        )
        await stack.enter_async_context(client)
        has_reasons = server_kind not in ASGI_SERVERS
        yield Gateway(client, f"http://127.0.0.1:{client.port}", has_reasons)
