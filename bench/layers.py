"""What each layer of the proxy costs a status poll, in microseconds, without sockets.

Run it with `make bench`. The real handlers of a real application are called one inside the other,
and each layer is what its handler takes beyond the one inside it. fal answers at once here, so that
the innermost is the formula alone.
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
from falproxy.log import ACCESS_LOGGER, AccessLogHandler
from falproxy.proxy.transport import UpstreamRequest
from falproxy.proxy.upstream import UPSTREAM, Upstream
from falproxy.settings import AuthSettings, StorageSettings
from falproxy.stores.ownership import RequestOwner

REQUEST_ID = "7e2f0b8a-0001-4000-8000-000000000000"
TARGET = f"https://queue.fal.run/fal-ai/flux/requests/{REQUEST_ID}/status"
CALLS_AT_ONCE = 500
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


class Told:
    """An answer that is here at once."""

    method, status, reason, raw_headers = "GET", 202, "Accepted", RAW
    is_complete = is_consumed = True
    headers = CIMultiDictProxy(CIMultiDict((n.decode(), v.decode()) for n, v in RAW))

    async def read(self) -> bytes:
        return BODY

    def close(self) -> None: ...


class NoWay:
    """A way to fal that ends here."""

    async def send(self, request: UpstreamRequest) -> Told:
        return Told()


def layers_of(handler: Any) -> Iterator[tuple[str, Handler]]:
    """A handler and those inside it, the outermost first, by the names of their makers."""
    while True:
        if isinstance(handler, partial):
            maker, _, _ = handler.func.__qualname__.partition(".")
            yield maker, handler
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


async def own_the_request(layers: list[tuple[str, Handler]]) -> None:
    """The polled request was submitted by whoever polls it, where that is kept track of."""
    for name, handler in layers:
        if name == "bind_requests":
            function: Any = handler.func  # type: ignore[attr-defined]
            kept = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
            submission = RequestOwner("key:app", kept["ring"].cell_contents.next().mark)
            await kept["submissions"].cell_contents.add(REQUEST_ID, submission)


async def seconds_of(handler: Handler, asked: list[web.Request]) -> float:
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    for request in asked:
        await handler(request)
    took = time.perf_counter() - started
    gc.enable()
    return took / len(asked)


async def measure(title: str, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(fal_key="a:b", data_dir=Path(folder), **options)
        app = create_app(settings)
        runner = web.AppRunner(app)
        await runner.setup()
        app._state[UPSTREAM] = Upstream(NoWay(), app[UPSTREAM]._key)
        route = next(
            route for route in app.router.routes()
            if route.resource and route.resource.canonical == "/api/fal/proxy"
        )  # fmt: skip
        headers = {"x-fal-target-url": TARGET, "accept": "application/json", "user-agent": "fal"}
        headers |= {"Host": "localhost", "accept-encoding": "gzip", "Connection": "keep-alive"}
        if "auth" in options:
            headers |= {"x-falproxy-key": KEY, "Origin": "https://app.example"}
        layers = list(layers_of(route.handler))
        await own_the_request(layers)
        print(f"\n{title}")
        rounds = [await one_round(app, headers, layers) for _ in range(ROUNDS)]
        inner = 0.0
        for place, (name, _) in reversed(list(enumerate(layers))):
            total = median(each[place] for each in rounds) * 1e6
            print(f"  {name:<22} {total - inner:6.2f}")
            inner = total
        print(f"  {'all of it':<22} {inner:6.2f}")
        await runner.cleanup()


async def one_round(
    app: web.Application, headers: dict[str, str], layers: list[tuple[str, Handler]]
) -> list[float]:
    """Seconds of each layer with all that is inside it."""
    outermost = layers[0][1]
    took = []
    for _, handler in layers:
        asked = await requests(app, headers, CALLS_AT_ONCE)
        if handler is not outermost:
            await seconds_of(outermost, asked)  # what the outer ones put into a request is there
        took.append(await seconds_of(handler, asked))
    return took


async def main() -> int:
    calls = logging.getLogger(ACCESS_LOGGER)
    with open(os.devnull, "w") as nowhere:  # noqa: ASYNC230 - it never blocks
        calls.propagate, calls.handlers = False, [AccessLogHandler(nowhere)]
        calls.setLevel(logging.INFO)
        print("microseconds of a status poll, by layer, the innermost first")
        await measure("as it comes", storage=StorageSettings(backend="off"))
        await measure("with every option", **EVERYTHING)
        calls.handlers = []
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
