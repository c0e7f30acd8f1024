"""The proxy as an ASGI application, for FastAPI, Starlette, Django and other Python servers."""

import asyncio
import logging
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from aiohttp import web
from aiohttp.web_server import Server

from falproxy.app import create_app, require_upstream, warn_if_open
from falproxy.media.fetch import Fetcher
from falproxy.middleware.access import AuthHook
from falproxy.server.asgi.bridge import Receive, Send, serve_request
from falproxy.server.asgi.request_head import Scope
from falproxy.server.fast_path.protocol import FastPathRunner
from falproxy.settings import Settings

logger = logging.getLogger(__name__)

SCOPE = "asgi_scope"


def asgi(
    settings: Settings, prefix: str = "", *, authenticate: AuthHook | None = None
) -> "AsgiProxy":
    """Create the proxy as an ASGI application, such as for `app.mount("/fal", asgi(settings))`.

    prefix: path below which the proxy is found, if the application that calls it does not set
        `root_path`, as `mount` does.
    authenticate: returns the name of a request's caller, or None; used besides the access keys and
        tokens of the settings. `asgi_scope(request)` returns the host application's scope.
    """
    return AsgiProxy(settings, prefix=prefix, authenticate=authenticate)


def asgi_scope(request: web.BaseRequest) -> MutableMapping[str, Any]:
    """Return the ASGI scope of a request, with the session and the user that the host
    application's middleware has added.

    Raises: LookupError, the request did not come by ASGI, or its client has left.
    """
    scope: MutableMapping[str, Any] | None = request.get_extra_info(SCOPE)
    if scope is None:
        raise LookupError("The request has no ASGI scope")
    return scope


class AsgiProxy:
    """The proxy as an ASGI application.

    It is started by the host's lifespan events, by `lifespan` or `async with`, or else by the first
    request. It is stopped in the same way, or else when the event loop ends: `asyncio.run` then
    cancels all tasks and waits for them.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        prefix: str = "",
        authenticate: AuthHook | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        require_upstream(settings)
        # Each connection has one request: the fast path is for those with many.
        self._settings = replace(settings, server=replace(settings.server, fast_path=False))
        self._prefix = prefix.rstrip("/")
        self._authenticate = authenticate
        self._fetcher = fetcher
        self._app: web.Application | None = self._create_app()
        self._instance: Instance | None = None
        warn_if_open(settings, authenticate)

    def __repr__(self) -> str:
        return f"<AsgiProxy at {self._prefix or '/'}, {self._instance!r}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            server = await self._start()
            await serve_request(
                server,
                scope,
                receive,
                send,
                prefix=self._prefix,
                head_timeout=self._settings.server.head_timeout,
            )
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})  # before it was accepted: a 403
        elif scope["type"] == "lifespan":
            await self._handle_lifespan(receive, send)
        else:
            raise ValueError(f"falproxy does not serve {scope['type']}")

    async def __aenter__(self) -> "AsgiProxy":
        await self._start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stop()

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Start and stop the proxy, as the parameter `lifespan` of FastAPI and Starlette."""
        async with self:
            yield

    async def _handle_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._start()
        except Exception as error:
            logger.exception("The proxy did not start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> Server:
        """Return the HTTP server, started if it is not. Raises: the exception of the start."""
        instance = self._instance
        if instance is None or not instance.is_usable():
            app, self._app = self._app or self._create_app(), None
            instance = self._instance = Instance(app, self._settings.server.drain)
        return await asyncio.shield(instance.started)

    async def _stop(self) -> None:
        instance, self._instance = self._instance, None
        if instance is not None:
            await instance.stop()

    def _create_app(self) -> web.Application:
        return create_app(self._settings, authenticate=self._authenticate, fetcher=self._fetcher)


class Instance:
    """The proxy's resources, opened and closed by one task.

    started: the HTTP server.
    """

    def __init__(self, app: web.Application, drain: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.started: asyncio.Future[Server] = self._loop.create_future()
        self._stopping = asyncio.Event()
        # aiohttp waits for this time twice: for handlers to finish, and for those it has cancelled.
        runner = FastPathRunner(
            app, access_log=None, shutdown_timeout=drain / 2, lingering_time=0.0
        )
        self._task = self._loop.create_task(self._run(runner))

    def __repr__(self) -> str:
        state = "stopped" if self._task.done() else "started" if self.started.done() else "starting"
        return f"<Instance {state}>"

    def is_usable(self) -> bool:
        """Return whether requests of the running event loop can be served, now or soon."""
        is_here = self._loop is asyncio.get_running_loop()
        return is_here and not self._task.done() and not self._stopping.is_set()

    async def stop(self) -> None:
        """Let the running requests finish, and close the resources."""
        if self._loop is asyncio.get_running_loop():
            self._stopping.set()
            await asyncio.wait([self._task])

    async def _run(self, runner: FastPathRunner) -> None:
        try:
            await runner.setup()
            assert runner.server is not None
            self.started.set_result(runner.server)
            await self._stopping.wait()
        except Exception as error:
            self.started.set_exception(error)
        finally:
            self._stopping.set()
            self.started.cancel()  # without effect if it is done
            await runner.cleanup()
