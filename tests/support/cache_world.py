"""The proxy with the sandbox behind it, for fal's Python and JavaScript clients."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

import falproxy
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.support.empty_ledger import with_empty_ledger
from tests.support.fal_client_world import ClientWorld, check_credentials, photo
from tests.support.js_world import origin_of
from tests.support.key_search import CANARY
from tests.support.settings import make_settings


@asynccontextmanager
async def open_world(data_dir: Path, **options: Any) -> AsyncIterator[ClientWorld]:
    """Run the proxy with the sandbox as its upstream, and an image for pages and scripts.

    At the end it checks that fal was called with the proxy's key only.
    """

    async def fixture(request: web.Request) -> web.Response:
        return web.Response(body=photo(), content_type="image/png")

    @web.middleware
    async def record(request: web.Request, handler: Any) -> Any:
        at_proxy.append(request)
        return await handler(request)

    sandbox = Sandbox(speed=50)
    at_proxy: list[web.Request] = []
    app = web.Application(middlewares=[record], handler_args={"handler_cancellation": True})
    app.router.add_get("/fixtures/photo.png", fixture)
    async with TestServer(create_sandbox(sandbox)) as fal, ClientSession() as session:
        sandbox.public_url = origin_of(fal)
        settings = make_settings(
            fal_key=CANARY, upstream_origin=origin_of(fal), data_dir=data_dir, **options
        )
        falproxy.setup(app, with_empty_ledger(settings))
        async with TestServer(app) as gateway:
            yield ClientWorld(origin_of(gateway), origin_of(fal), sandbox, session, at_proxy)
    for call in sandbox.seen:
        check_credentials(call)
