"""ASGI servers of other projects, on loopback and in the event loop of the test. They are imported
when a test needs them: every process of the tests imports this module."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from aiohttp.test_utils import BaseTestServer
from aiohttp.web_runner import BaseRunner
from yarl import URL

STOP_TIMEOUT = 5  # seconds for requests that still run at the end of a test

AsgiApp = Callable[..., Coroutine[Any, Any, None]]


async def run_uvicorn(app: AsgiApp, listener: socket.socket, stop: asyncio.Event) -> None:
    import uvicorn

    class QuietUvicorn(uvicorn.Server):
        """uvicorn without handlers of signals, which would replace pytest's."""

        capture_signals = staticmethod(nullcontext)  # type: ignore[assignment]

    config = uvicorn.Config(
        app,
        http="httptools",
        lifespan="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=STOP_TIMEOUT,
    )
    server = QuietUvicorn(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    server.should_exit = True
    await serving


async def run_hypercorn(app: AsgiApp, listener: socket.socket, stop: asyncio.Event) -> None:
    import hypercorn.asyncio
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.include_server_header = config.include_date_header = False
    config.graceful_timeout = STOP_TIMEOUT
    config.errorlog = config.accesslog = None
    config.h11_max_incomplete_size = 2**18
    await hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait)


ASGI_SERVERS = {"uvicorn": run_uvicorn, "hypercorn": run_hypercorn}


@asynccontextmanager
async def serve_asgi(app: AsgiApp, kind: str) -> AsyncIterator[str]:
    """Serve an ASGI application with one of ASGI_SERVERS, and return its origin."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    stop = asyncio.Event()
    serving = asyncio.create_task(ASGI_SERVERS[kind](app, listener, stop))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop.set()
        await serving


class RunningServer(BaseTestServer):
    """A server that runs outside of aiohttp, for aiohttp's test client."""

    def __init__(self, root: URL) -> None:
        super().__init__(host=str(root.host), port=root.port)
        self._root = root

    async def start_server(
        self, loop: asyncio.AbstractEventLoop | None = None, **options: Any
    ) -> None:
        """Do nothing: the server is started by `serve_asgi`."""

    async def _make_runner(self, **options: Any) -> BaseRunner:
        raise NotImplementedError

    async def close(self) -> None:
        """Do nothing: the server is stopped by `serve_asgi`."""
