"""CPU time of a status poll in each layer of the proxy, in microseconds, without sockets.

Run it with `make bench`. The real handlers of a real application are measured, each with all
handlers inside it; the share of a layer is the difference to the next inner one. The transport
responds at once, so that the innermost is `forward` alone.
"""

import asyncio
import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy import Settings, create_app
from falproxy.app.pipeline import layer_name
from falproxy.log import ACCESS_LOGGER, AccessLogHandler
from falproxy.proxy.transport import TransportResponse, UpstreamRequest
from falproxy.proxy.upstream import UPSTREAM, Upstream
from falproxy.settings import AuthSettings, StorageSettings
from falproxy.stores.ownership import RequestOwner

REQUEST_ID = "7e2f0b8a-0001-4000-8000-000000000000"
TARGET = f"https://queue.fal.run/fal-ai/flux/requests/{REQUEST_ID}/status"
CALLS_PER_ROUND = 500
ROUNDS = 5
KEY = "a-key-of-16-chars"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
EVERYTHING: dict[str, Any] = {
    "auth": AuthSettings(
        access_keys=(("app", KEY),),
        allowed_origins=("https://app.example",),
        allowed_endpoints=("fal-ai/**",),
    ),
    "storage": StorageSettings(backend="disk"),
}
BODY = json.dumps({"status": "IN_PROGRESS", "request_id": "7e2f0b8a", "logs": None}).encode()
RAW = (
    (b"Content-Type", b"application/json"),
    (b"Content-Length", str(len(BODY)).encode()),
    (b"Date", b"Sat, 21 Nov 2026 12:00:00 GMT"),
    *((b"x-fal-%d" % number, b"some value") for number in range(10)),
)


class ImmediateResponse:
    """A complete response."""

    method, status, reason, raw_headers = "GET", 202, "Accepted", RAW
    is_complete = is_consumed = True
    headers = CIMultiDictProxy(CIMultiDict((n.decode(), v.decode()) for n, v in RAW))

    async def read(self) -> bytes:
        return BODY

    def drop_headers(self) -> None: ...

    def close(self) -> None: ...


class ImmediateTransport:
    """A transport that responds at once."""

    async def send(self, request: UpstreamRequest) -> TransportResponse:
        return ImmediateResponse()


def layers_of(handler: Any) -> Iterator[tuple[str, Handler]]:
    """Yield the layers of a composed handler with their names, outermost first."""
    while True:
        if isinstance(handler, partial):
            yield layer_name(handler.func), handler
            handler = handler.keywords["handler"]
        elif handler.__qualname__.startswith("dispatch_by_operation"):
            cells = [cell.cell_contents for cell in handler.__closure__]
            names = handler.__code__.co_freevars
            yield "dispatch_by_operation", handler
            handler = cells[names.index("poll")]
        else:
            yield handler.__name__, handler
            return


async def requests(app: web.Application, headers: dict[str, str], count: int) -> list[web.Request]:
    made = []
    for _ in range(count):
        request = make_mocked_request("GET", "/api/fal/proxy", headers=headers)
        match = await app.router.resolve(request)
        match.add_app(app)
        match.current_app = app
        request._match_info = match
        made.append(request)
    return made


async def register_owner(layers: list[tuple[str, Handler]]) -> None:
    """Register the caller as the owner of the polled request, if owners are checked."""
    for name, handler in layers:
        if name == "require_owner":
            function: Any = handler.func  # type: ignore[attr-defined]
            variables = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
            key = variables["key_pool"].cell_contents.next_key()
            await variables["ownership"].cell_contents.add(
                REQUEST_ID, RequestOwner("key:app", key.fingerprint)
            )


async def seconds_of(handler: Handler, batch: list[web.Request]) -> float:
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    for request in batch:
        await handler(request)
    seconds = time.perf_counter() - started
    gc.enable()
    return seconds / len(batch)


async def measure(title: str, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(fal_key="a:b", data_dir=Path(folder), **options)
        app = create_app(settings)
        runner = web.AppRunner(app)
        await runner.setup()
        app._state[UPSTREAM] = Upstream(ImmediateTransport(), app[UPSTREAM]._key)
        route = next(
            route for route in app.router.routes()
            if route.resource and route.resource.canonical == "/api/fal/proxy"
        )  # fmt: skip
        headers = {"x-fal-target-url": TARGET, "accept": "application/json", "user-agent": "fal"}
        headers |= {"Host": "localhost", "accept-encoding": "gzip", "Connection": "keep-alive"}
        if "auth" in options:
            headers |= {"x-falproxy-key": KEY, "Origin": "https://app.example"}
        layers = list(layers_of(route.handler))
        await register_owner(layers)
        print(f"\n{title}")
        rounds = [await one_round(app, headers, layers) for _ in range(ROUNDS)]
        inner = 0.0
        for position, (name, _) in reversed(list(enumerate(layers))):
            total = median(seconds[position] for seconds in rounds) * 1e6
            print(f"  {name:<22} {total - inner:6.2f}")
            inner = total
        print(f"  {'total':<22} {inner:6.2f}")
        await runner.cleanup()


async def one_round(
    app: web.Application, headers: dict[str, str], layers: list[tuple[str, Handler]]
) -> list[float]:
    """Return the seconds of each layer with all inner layers."""
    outermost = layers[0][1]
    seconds = []
    for _, handler in layers:
        batch = await requests(app, headers, CALLS_PER_ROUND)
        if handler is not outermost:
            await seconds_of(outermost, batch)  # sets the request values of the outer layers
        seconds.append(await seconds_of(handler, batch))
    return seconds


async def main() -> int:
    access_logger = logging.getLogger(ACCESS_LOGGER)
    with open(os.devnull, "w") as devnull:  # noqa: ASYNC230 - it never blocks
        access_logger.propagate, access_logger.handlers = False, [AccessLogHandler(devnull)]
        access_logger.setLevel(logging.INFO)
        print("microseconds of a status poll, by layer, the innermost first")
        await measure("default settings", storage=StorageSettings(backend="off"))
        await measure("every option on", **EVERYTHING)
        access_logger.handlers = []
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
