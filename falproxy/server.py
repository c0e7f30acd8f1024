"""Serving an application until a signal says to stop, and stopping without losing a call."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable

from aiohttp import web
from aiohttp.http import HttpRequestParser

from falproxy.config import SettingsError

logger = logging.getLogger(__name__)

BACKLOG = 1024
C_PARSER = "aiohttp._http_parser"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(
    app: web.Application, host: str, port: int, *, drain: float, started: Callable[[int], None]
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what runs within `drain` seconds.

    started: called with the port, which is a free one if 0 was asked for, once calls are
    accepted. A second signal does not wait any longer. Raises: SettingsError, nothing can listen
    on that address.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    # aiohttp waits this long twice: for handlers to finish, and for those it then cancelled.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=drain / 2)
    try:
        await runner.setup()
        await listen(web.TCPSite(runner, host, port, backlog=BACKLOG), f"{host}:{port}")
        started(runner.addresses[0][1])
        if HttpRequestParser.__module__ != C_PARSER:
            logger.warning("aiohttp's C extension is missing: slow, and lax with odd messages")
        await stop.wait()
        logger.info("Stopping: no new connections, what runs has %g seconds to finish", drain)
        for number in SIGNALS:
            loop.remove_signal_handler(number)
    finally:
        await runner.cleanup()


async def listen(site: web.TCPSite, address: str) -> None:
    """Raises: SettingsError, the address is taken or is not one of this machine."""
    try:
        await site.start()
    except (OSError, UnicodeError) as error:
        code = getattr(error, "errno", None) or 0
        reason = os.strerror(code).lower() if code > 0 else "there is no such host"
        raise SettingsError(
            f"Cannot listen on {address}: {reason}. Choose another with --host and --port."
        ) from error
