"""Serving an application until a signal says to stop, and stopping without losing a call."""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http import HttpRequestParser

from falproxy.errors import SettingsError
from falproxy.log import ACCESS_LOGGER
from falproxy.server.fast_path.protocol import FastPathRunner
from falproxy.server.memory import trim_when_idle

logger = logging.getLogger(__name__)

BACKLOG = 1024
C_PARSER = "aiohttp._http_parser"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GC_FREEZE_DELAY = (
    1.0  # seconds after the start; a collection takes some milliseconds, and calls wait
)
GC_THRESHOLD = 10_000  # objects more than were freed

Address = tuple[socket.AddressFamily, tuple[object, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where an application is served. drain: seconds that what runs has to finish at a stop.
    leash: a pipe that ends when this is to stop, of one process among several on the same port."""

    host: str
    port: int
    drain: float
    stop_pipe: int | None = None


async def serve(
    app: web.Application, config: ListenConfig, on_started: Callable[[int], None]
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what runs.

    started: called with the port, which is a free one if 0 was asked for, once calls are
    accepted. A second signal does not wait any longer; for one of several processes, who holds
    its leash says when that is. Raises: SettingsError, nothing can listen on that address.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    if config.stop_pipe is not None:
        loop.add_reader(config.stop_pipe, stop.set)
    # aiohttp waits this long twice: for handlers to finish, and for those it then cancelled.
    runner = FastPathRunner(app, access_log=None, shutdown_timeout=config.drain / 2)
    try:
        await runner.setup()
        await listen(runner, config)
        on_started(runner.addresses[0][1])
        if HttpRequestParser.__module__ != C_PARSER:
            logger.warning("aiohttp's C extension is missing: slow, and lax with odd messages")
        loop.call_later(GC_FREEZE_DELAY, freeze_gc)
        await stop.wait()
        flush_access_log()
        logger.info(
            "Stopping: no new connections, what runs has %g seconds to finish", config.drain
        )
        if config.stop_pipe is not None:
            loop.remove_reader(config.stop_pipe)
        else:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
    finally:
        await runner.cleanup()


def flush_access_log() -> None:
    """A second signal does not wait for lines that wait for others."""
    for handler in logging.getLogger(ACCESS_LOGGER).handlers:
        handler.flush()


def freeze_gc() -> None:
    """What is there now is there for good: the garbage collector need not look through it again.
    Calls leave next to nothing that only the collector finds, and it comes more rarely. What they
    free goes back to the system when there is time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 50)
    trim_when_idle()


async def listen(runner: web.AppRunner, config: ListenConfig) -> None:
    """Raises: SettingsError, the address is taken or is not one of this machine."""
    is_shared = config.stop_pipe is not None
    try:
        await web.TCPSite(
            runner, config.host, config.port, backlog=BACKLOG, reuse_port=is_shared
        ).start()
    except (OSError, UnicodeError) as error:
        raise cannot_listen(error, config.host, config.port) from error


def cannot_listen(error: OSError | UnicodeError, host: str, port: int) -> SettingsError:
    code = getattr(error, "errno", None) or 0
    reason = os.strerror(code).lower() if code > 0 else "there is no such host"
    return SettingsError(
        f"Cannot listen on {host}:{port}: {reason}. Choose another with --host and --port."
    )


@contextmanager
def reserve_port(host: str, port: int) -> Iterator[tuple[int, list[socket.socket]]]:
    """The port, which is a free one for 0, and what keeps it for as long as this lasts: others of
    the same user could listen there too, and get some of the calls. Raises: SettingsError."""
    sockets: list[socket.socket] = []
    with ExitStack() as stack:
        try:
            for family, address in listen_addresses(host, port):
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    bind(probe, (address[0], port, *address[2:]))
                    place = probe.getsockname()
                kept = stack.enter_context(closing(socket.socket(family, socket.SOCK_STREAM)))
                kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                bind(kept, place)
                sockets.append(kept)
                port = place[1]
        except (OSError, UnicodeError) as error:
            raise cannot_listen(error, host, port) from error
        yield port, sockets


def listen_addresses(host: str, port: int) -> dict[Address, None]:
    """Where asyncio would listen; an address may be found twice."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return dict.fromkeys((family, address) for family, _, _, _, address in found)


def bind(listener: socket.socket, address: tuple[object, ...]) -> None:
    """Connections of an earlier process that are about to end are no obstacle."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(address)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
