"""Replacing the application of a running server, without closing a connection."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from aiohttp import web

from falproxy.errors import SettingsError
from falproxy.server.fast_path.protocol import FastPathRunner, ProxyServer
from falproxy.server.service_manager import ServiceManager

logger = logging.getLogger(__name__)

NOT_RELOADED = "The settings were not reloaded, and the old ones stay: %s"
RETIRE_TIMEOUT = 3600.0  # seconds for calls of the old application; fal apps may run for an hour
CHECK_INTERVAL = 0.2  # seconds

# Returns an application with new settings, to replace the current one. Raises: SettingsError.
CreateApp = Callable[[web.Application], Awaitable[web.Application]]


class ReloadableRunner(FastPathRunner):
    """Serves an application that can be replaced.

    Requests that are being handled stay with the old application, and all later ones, on the same
    connections too, go to the new one. The old one is closed after its last request.
    """

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, **options)
        self._options = options
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_stopping, self._handlers_ended = asyncio.Event(), asyncio.Event()

    async def replace_app(self, app: web.Application) -> None:
        """Start a new application, and send all new requests there.

        Raises: the exceptions of its start. The current application then stays.
        """
        starting = FastPathRunner(app, **self._options)
        try:
            await starting.setup()
        except BaseException:
            await app.cleanup()
            raise
        assert isinstance(self.server, ProxyServer)
        assert isinstance(starting.server, ProxyServer)
        old, self._app = self._app, app
        self.server.adopt(starting.server)
        task = asyncio.ensure_future(self._retire(old, self.server))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(self, app: web.Application, server: ProxyServer) -> None:
        """Close an application after its last request."""
        # The tasks of requests that have just begun start, so that they are among the work.
        await asyncio.sleep(0)
        work = server.current_work()
        deadline = asyncio.get_running_loop().time() + RETIRE_TIMEOUT
        while any(each.is_current for each in work) and not self._is_stopping.is_set():
            if asyncio.get_running_loop().time() > deadline:
                logger.warning("Calls of old settings take too long: they end now")
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVAL):
                    await self._is_stopping.wait()
        await app.shutdown()
        if self._is_stopping.is_set():
            await self._handlers_ended.wait()
        await app.cleanup()

    async def shutdown(self) -> None:
        self._is_stopping.set()
        await super().shutdown()

    async def _cleanup_server(self) -> None:
        self._handlers_ended.set()
        await asyncio.gather(super()._cleanup_server(), *self._retiring)


class Reloader:
    """Replaces the application of a runner when it is asked to, one time after the other.

    create_app: reads the settings again; called with the current application. Raises:
        SettingsError. None if it cannot be replaced.
    """

    def __init__(
        self,
        runner: ReloadableRunner,
        create_app: CreateApp | None,
        manager: ServiceManager,
    ) -> None:
        self._runner = runner
        self._create_app = create_app
        self._manager = manager
        self._requested = asyncio.Event()

    def request(self) -> None:
        """Signal handler: reload soon."""
        self._requested.set()

    async def run(self) -> None:
        """Reload whenever it is requested, until the task is cancelled."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            if self._create_app is None:
                logger.warning("The settings are not reloaded: the sandbox needs a restart")
                continue
            self._manager.reloading()
            await self._reload(self._create_app)
            self._manager.ready()

    async def _reload(self, create_app: CreateApp) -> None:
        try:
            await self._runner.replace_app(await create_app(self._runner.app))
        except SettingsError as error:
            logger.warning(NOT_RELOADED, error)
        except Exception as error:  # its text may be a value of a setting
            logger.warning(NOT_RELOADED, type(error).__name__)
        else:
            logger.info("The settings were reloaded")
