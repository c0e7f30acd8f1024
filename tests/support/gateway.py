"""The proxy under test, on loopback."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web_runner import BaseRunner

from falproxy.server.fast_path.protocol import FastPathRunner
from tests.support.key_search import LEAKS
from tests.support.urls import PROXY


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


class FastPathTestServer(TestServer):
    """A server with the fast path, as in `falproxy serve`."""

    async def _make_runner(self, **options: Any) -> BaseRunner:
        return FastPathRunner(self.app, **options)
