"""Serves an application until a signal, then stops without losing a call."""

import asyncio
import gc
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http import HttpRequestParser

from falproxy.errors import SettingsError
from falproxy.log import ACCESS_LOGGER
from falproxy.server.fast_path.protocol import FastPathRunner
from falproxy.server.memory import trim_when_idle
from falproxy.server.open_files import raise_open_files_limit

logger = logging.getLogger(__name__)

BACKLOG = 1024
# Connections that asyncio accepts at once. With more, a burst could use up all descriptors before
# the limit on connections can act.
ACCEPT_BATCH = 16
C_PARSER = "aiohttp._http_parser"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GC_FREEZE_DELAY = 1.0  # seconds after the start, since a collection blocks for some milliseconds
STOP_TIMED_OUT = 1  # exit code
GC_THRESHOLD = 10_000  # net new objects before a collection

Address = tuple[socket.AddressFamily, tuple[object, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """The address of the server, and how it stops.

    drain: seconds for running calls to finish.
    stop_pipe: for a worker process: reaches its end when the worker has to stop. The port is then
        shared.
    exit_timeout: seconds after the signal at which the process ends whatever it waits for, such as
        a thread that hangs; None for a process that has other work.
    """

    host: str
    port: int
    drain: float
    stop_pipe: int | None = None
    exit_timeout: float | None = None


async def serve(
    app: web.Application, config: ListenConfig, on_started: Callable[[int], None]
) -> None:
    """Serve until SIGTERM or SIGINT, then let running calls finish. A second signal ends the
    process at once; in a worker process, the supervisor does that.

    on_started: called with the port once calls are accepted; a free one if the port is 0.

    Raises: SettingsError, the address cannot be used.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    if config.stop_pipe is not None:
        loop.add_reader(config.stop_pipe, stop.set)
    raise_open_files_limit()
    # aiohttp waits for this time twice: for handlers to finish, then for those it has cancelled.
    runner = FastPathRunner(app, access_log=None, shutdown_timeout=config.drain / 2)
    try:
        await runner.setup()
        await listen(runner, config)
        on_started(runner.addresses[0][1])
        if HttpRequestParser.__module__ != C_PARSER:
            logger.warning("aiohttp's C extension is missing: parsing is slower and less strict")
        loop.call_later(GC_FREEZE_DELAY, freeze_gc)
        await stop.wait()
        if config.exit_timeout is not None:
            exit_after(config.exit_timeout)
        flush_access_log()
        logger.info("Stopping: no new connections, %g seconds for running calls", config.drain)
        if config.stop_pipe is not None:
            loop.remove_reader(config.stop_pipe)
        else:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
    finally:
        await runner.cleanup()


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


async def listen(runner: web.AppRunner, config: ListenConfig) -> None:
    """Start to listen. Raises: SettingsError, the address is in use or not of this machine."""
    is_shared = config.stop_pipe is not None
    try:
        site = web.TCPSite(
            runner, config.host, config.port, backlog=ACCEPT_BATCH, reuse_port=is_shared
        )
        await site.start()
    except (OSError, UnicodeError) as error:
        raise cannot_listen(error, config.host, config.port) from error
    set_backlog(site, BACKLOG)


def set_backlog(site: web.BaseSite, backlog: int) -> None:
    """Set how many connections the system holds until they are accepted. asyncio uses one number
    for this and for the connections that it accepts at once."""
    for listener in getattr(site._server, "sockets", ()):
        with socket.socket(fileno=os.dup(listener.fileno())) as duplicate:
            duplicate.listen(backlog)


def cannot_listen(error: OSError | UnicodeError, host: str, port: int) -> SettingsError:
    code = getattr(error, "errno", None) or 0
    reason = os.strerror(code).lower() if code > 0 else "there is no such host"
    address = f"{host}:{port}" if is_address(host) else f"the address of FALPROXY_HOST, port {port}"
    return SettingsError(
        f"Cannot listen on {address}: {reason}. Choose another with --host and --port."
    )


def is_address(host: str) -> bool:
    """Return whether a host can be shown: an IP address or `localhost`."""
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


@contextmanager
def reserve_port(host: str, port: int) -> Iterator[tuple[int, list[socket.socket]]]:
    """Context manager: reserve a port for worker processes, and return it with its sockets.

    The bound sockets keep other programs from the port. Without them, a program of the same user
    could share it and get some of the calls.

    port: 0 for a free one.

    Raises: SettingsError, the address cannot be used.
    """
    sockets: list[socket.socket] = []
    with ExitStack() as stack:
        try:
            for family, address in listen_addresses(host, port):
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    bind(probe, (address[0], port, *address[2:]))
                    bound_address = probe.getsockname()
                reserved = stack.enter_context(closing(socket.socket(family, socket.SOCK_STREAM)))
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                bind(reserved, bound_address)
                sockets.append(reserved)
                port = bound_address[1]
        except (OSError, UnicodeError) as error:
            raise cannot_listen(error, host, port) from error
        yield port, sockets


def listen_addresses(host: str, port: int) -> dict[Address, None]:
    """Return the distinct addresses that asyncio would listen on."""
    results = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return dict.fromkeys((family, address) for family, _, _, _, address in results)


def bind(listener: socket.socket, address: tuple[object, ...]) -> None:
    """Bind a socket, even if connections of an earlier process are still closing."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(address)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
