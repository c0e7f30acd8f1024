"""A small load balancer: sends each request to the next of several proxies."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import ClientError, ClientSession, DummyCookieJar, TCPConnector, web
from aiohttp.test_utils import TestServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


HEALTH_INTERVAL = 0.1  # seconds


@dataclass(slots=True)
class Balancer:
    """The proxies of a balancer, in the order of their next requests.

    failures: requests that a proxy did not respond to. None is sent again.
    """

    targets: list[str]
    failures: list[str] = field(default_factory=list)

    def next_target(self) -> str:
        self.targets.append(self.targets.pop(0))
        return self.targets[-1]

    async def check_health(self, session: ClientSession) -> None:
        """Send requests only to proxies that are ready."""
        origins = [*self.targets]
        while True:
            for origin in origins:
                try:
                    async with session.get(f"{origin}/health/ready") as response:
                        is_ready = response.status == 200
                except ClientError:
                    is_ready = False
                if is_ready and origin not in self.targets:
                    self.targets.append(origin)
                elif not is_ready and origin in self.targets:
                    self.targets.remove(origin)
            await asyncio.sleep(HEALTH_INTERVAL)


@asynccontextmanager
async def balancing(*origins: str) -> AsyncIterator[str]:
    """Context: the origin of a balancer over the proxies at these origins."""
    async with open_balancer(*origins) as (origin, _):
        yield origin


@asynccontextmanager
async def open_balancer(
    *origins: str, checks_health: bool = False
) -> AsyncIterator[tuple[str, Balancer]]:
    """Context: the origin of a balancer over the proxies at these origins, and its state."""
    balancer = Balancer([*origins])

    async def relay(request: web.Request) -> web.Response:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        body = await request.read()
        url = balancer.next_target() + request.raw_path
        try:
            async with session.request(
                request.method, url, headers=headers, data=body or None, allow_redirects=False
            ) as response:
                relayed = [
                    (k, v) for k, v in response.headers.items() if k.lower() not in HOP_BY_HOP
                ]
                content = await response.read()
                return web.Response(status=response.status, headers=relayed, body=content)
        except ClientError as error:
            balancer.failures.append(f"{request.method} {url}: {type(error).__name__}")
            raise

    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", relay)
    async with (
        ClientSession(
            auto_decompress=False, cookie_jar=DummyCookieJar(), connector=TCPConnector(limit=0)
        ) as session,
        TestServer(app) as server,
    ):
        checking = asyncio.ensure_future(balancer.check_health(session)) if checks_health else None
        try:
            yield f"http://127.0.0.1:{server.port}", balancer
        finally:
            if checking is not None:
                checking.cancel()
