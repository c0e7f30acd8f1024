"""A small load balancer: sends each request to the next of several proxies."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle

from aiohttp import ClientSession, DummyCookieJar, TCPConnector, web
from aiohttp.test_utils import TestServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


@asynccontextmanager
async def balancing(*origins: str) -> AsyncIterator[str]:
    """Context: the origin of a balancer over the proxies at these origins."""
    targets = cycle(origins)

    async def relay(request: web.Request) -> web.Response:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        url = next(targets) + request.raw_path
        body = await request.read()
        async with session.request(
            request.method, url, headers=headers, data=body or None, allow_redirects=False
        ) as response:
            relayed = [(k, v) for k, v in response.headers.items() if k.lower() not in HOP_BY_HOP]
            return web.Response(status=response.status, headers=relayed, body=await response.read())

    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", relay)
    async with (
        ClientSession(
            auto_decompress=False, cookie_jar=DummyCookieJar(), connector=TCPConnector(limit=0)
        ) as session,
        TestServer(app) as server,
    ):
        yield f"http://127.0.0.1:{server.port}"
