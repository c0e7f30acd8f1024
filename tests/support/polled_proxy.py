"""Proxies with the fast path, whose clients poll jobs on connections that stay open."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import jwt
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy import create_app
from falproxy.middleware.access import AuthHook
from falproxy.server.fast_path.protocol import ROUTE_CACHE
from falproxy.server.fast_path.route_cache import RouteCache
from tests.support.empty_ledger import with_empty_ledger
from tests.support.fake_fal import FakeFal, respond_as_queue
from tests.support.gateway import FastPathTestServer
from tests.support.key_search import CANARY
from tests.support.polling_client import PollingClient, poll_request, submit_request
from tests.support.settings import make_settings
from tests.support.waiting import wait_until

SECRET = "a-secret-that-is-long-enough-for-hmac-with-sha-512-so-that-nothing-warns-here"


def token_of(subject: str, *, secret: str = SECRET, **changes: object) -> str:
    claims = {"sub": subject, "aud": "authenticated", "exp": time.time() + 60} | changes
    return jwt.encode(claims, secret)


def new_id() -> str:
    return str(uuid4())


async def respond_with_path(request: web.Request) -> web.StreamResponse:
    """A response of fal."""
    return web.json_response({"path": request.path})


def recording(seen: list[str], declare: Callable[[Middleware], Middleware]) -> Middleware:
    """Return a middleware that reads each request, and records its X-Request-ID.

    declare: for the fast path.
    """

    @web.middleware
    async def record(request: web.Request, handler: Handler) -> web.StreamResponse:
        await request.read()
        seen.append(request.headers.get("X-Request-ID", ""))
        return await handler(request)

    return declare(record)


def bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


def refreshes_a_price() -> bool:
    """Return whether a price is being read, from its file or from fal."""
    return any("PriceBook._refresh" in repr(task.get_coro()) for task in asyncio.all_tasks())


@dataclass(slots=True)
class PolledProxy:
    server: FastPathTestServer
    stack: AsyncExitStack
    fal: FakeFal

    @property
    def routes(self) -> RouteCache:
        return self.server.app[ROUTE_CACHE]

    @property
    def hits(self) -> int:
        return self.routes.hits

    async def client(self) -> PollingClient:
        assert self.server.port is not None
        return await self.stack.enter_async_context(PollingClient(self.server.port))

    async def submit(self, *lines: str) -> str:
        """Return the request id of a new job."""
        status, body = await (await self.client()).request(submit_request(*lines))
        assert status == 200
        return str(json.loads(body)["request_id"])

    async def until_fal_is_idle(self) -> None:
        """Wait until no request to fal is under way or about to be sent, such as that for a price
        after a submit."""
        pool = self.routes._pool
        assert pool is not None
        await wait_until(
            lambda: (
                len(pool._open_connections) == sum(map(len, pool._idle.values()))
                and not refreshes_a_price()
            )
        )

    async def poll_of(self, *lines: str) -> bytes:
        """Return the poll of a new job of the caller."""
        return poll_request(await self.submit(*lines), *lines)


MakeProxy = Callable[..., Awaitable[PolledProxy]]


@asynccontextmanager
async def polled_proxies(fal: FakeFal, data_dir: Path) -> AsyncIterator[MakeProxy]:
    """Context: starts proxies, with a hook and settings."""
    fal.respond = respond_as_queue
    async with AsyncExitStack() as stack:

        async def start(hook: AuthHook | None = None, **options: object) -> PolledProxy:
            settings: dict[str, Any] = {"fal_key": CANARY, "upstream_origin": fal.origin}
            settings |= {"data_dir": data_dir, "allowed_hosts": ("*",)} | options
            app = create_app(with_empty_ledger(make_settings(**settings)), authenticate=hook)
            server = FastPathTestServer(app)
            await server.start_server()
            stack.push_async_callback(server.close)
            return PolledProxy(server, await stack.enter_async_context(AsyncExitStack()), fal)

        yield start
