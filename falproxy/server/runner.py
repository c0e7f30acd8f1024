"""Serves an application until a signal, then stops without losing a call."""

import asyncio
import gc
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http import HttpRequestParser

from falproxy.log import ACCESS_LOGGER
from falproxy.server.draining import drain_connections, stop_listening
from falproxy.server.listeners import listen_error
from falproxy.server.memory import trim_when_idle
from falproxy.server.open_files import raise_open_files_limit
from falproxy.server.reload import CreateApp, ReloadableRunner, Reloader
from falproxy.server.service_manager import NO_SERVICE_MANAGER, ServiceManager
from falproxy.server.signals import StopRequest

logger = logging.getLogger(__name__)

BACKLOG = 1024
# Connections that asyncio accepts at once. With more, a burst could use up all descriptors before
# the limit on connections can act.
ACCEPT_BATCH = 16
C_PARSER = "aiohttp._http_parser"
GC_FREEZE_DELAY = 1.0  # seconds after the start, since a collection blocks for some milliseconds
STOP_TIMED_OUT = 1  # exit code
GC_THRESHOLD = 10_000  # net new objects before a collection


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The sockets of the server, and how it stops.

    are_passed: another process has the sockets too.
    drain: seconds for running calls to finish.
    delay: seconds before that, at most, in which calls are still accepted.
    stop_pipe: for a worker process: reaches its end when the worker has to stop.
    exit_timeout: seconds after the signal at which the process ends whatever it waits for, such as
        a thread that hangs; None for a process that has other work.
    create_app: called on SIGHUP; None if the application cannot be replaced.
    manager: is notified; none in a worker process, whose supervisor does it.
    """

    listeners: Sequence[socket.socket]
    are_passed: bool = False
    drain: float
    delay: float = 0.0
    stop_pipe: int | None = None
    exit_timeout: float | None = None
    create_app: CreateApp | None = None
    manager: ServiceManager = NO_SERVICE_MANAGER


async def serve(app: web.Application, config: ServeConfig, on_started: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let running calls finish. A second signal ends the
    process at once; in a worker process, the supervisor does that.

    on_started: called once calls are accepted.

    Raises: SettingsError, the sockets cannot be used.
    """
    raise_open_files_limit()
    # aiohttp waits for this time twice: for handlers to finish, then for those it has cancelled.
    runner = ReloadableRunner(app, access_log=None, shutdown_timeout=config.drain / 2)
    reloader = Reloader(runner, config.create_app, config.manager)
    stop = StopRequest(config.stop_pipe, reloader.request)
    stop.listen()
    try:
        await runner.setup()
        await listen(runner, config.listeners)
        on_started()
        config.manager.ready()
        if HttpRequestParser.__module__ != C_PARSER:
            logger.warning("aiohttp's C extension is missing: parsing is slower and less strict")
        asyncio.get_running_loop().call_later(GC_FREEZE_DELAY, freeze_gc)
        async with running(reloader.run()), running(config.manager.keep_alive()):
            is_urgent = await stop.wait()
            if config.exit_timeout is not None:
                exit_after(config.exit_timeout)
        flush_access_log()
        config.manager.stopping()
        logger.info("Stopping: %g seconds for running calls", config.drain)
        stop.ignore_further()
        if not is_urgent:
            await drain_connections(runner, config.delay)
            await stop_listening(runner, config.listeners, are_passed=config.are_passed)
    finally:
        await runner.cleanup()


@asynccontextmanager
async def running(coroutine: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Context manager: run a coroutine until the end of the block."""
    task = asyncio.ensure_future(coroutine)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def exit_after(seconds: float) -> None:
    """End the process after a time, if it still runs then."""

    def end() -> None:
        logger.warning("The stop takes too long: the process ends now")
        flush_access_log()
        os._exit(STOP_TIMED_OUT)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def flush_access_log() -> None:
    """Write the lines that wait for their batch: a second signal would lose them."""
    for handler in logging.getLogger(ACCESS_LOGGER).handlers:
        handler.flush()


def freeze_gc() -> None:
    """Exclude the objects of the start-up from garbage collection, and make collections rarer:
    calls leave hardly any reference cycles. Also start to trim the heap in idle moments."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 50)
    trim_when_idle()


async def listen(runner: web.AppRunner, listeners: Sequence[socket.socket]) -> None:
    """Start to listen. Raises: SettingsError, another process listens on the address."""
    for listener in listeners:
        try:
            if listener.family != socket.AF_UNIX:
                # Inherited by connections: the port can be used again while they are closing.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await web.SockSite(runner, listener, backlog=ACCEPT_BATCH).start()
            # asyncio uses one number for the connections that it accepts at once and for those that
            # the system holds until then.
            listener.listen(BACKLOG)
        except OSError as error:
            raise listen_error(error, listener) from error
