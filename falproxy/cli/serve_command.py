"""`falproxy serve`: the proxy, in one process or several."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from falproxy.app import create_app
from falproxy.cli.cluster_checks import check_cluster, check_shared_outputs
from falproxy.cli.exit_codes import run_coroutine, run_with_exit_code
from falproxy.cli.security_checks import Level, check_access
from falproxy.errors import SettingsError
from falproxy.server.runner import ListenConfig, reserve_port, serve
from falproxy.settings import Settings
from falproxy.storage_backends import BACKENDS
from falproxy.version import __version__

if TYPE_CHECKING:
    from falproxy.server.supervisor import WorkerContext

logger = logging.getLogger(__name__)

LOCALHOST_ADDRESSES = ("127.0.0.1", "::1", "0.0.0.0", "::", "")  # reachable as `localhost`
STOP_TIMEOUT = 4.5  # seconds beyond the drain, and the half of it that paid jobs have in addition
NOT_REHOSTED = "stay with fal"  # completes "outputs ..." in the log line of the start


def run_workers(settings: Settings) -> int:
    """Run the proxy in several processes, supervised by this one. Returns the exit code."""
    from falproxy.server.supervisor import WorkerContext, supervise

    check_authentication(settings)
    if settings.sandbox:
        raise SettingsError("The sandbox runs in one process: leave FALPROXY_WORKERS at 1.")
    with reserve_port(settings.server.host, settings.server.port) as (port, sockets):

        def run_worker(worker: WorkerContext) -> int:
            for reserved in sockets:  # a stopping worker must not keep the port in use
                reserved.close()
            server = replace(settings.server, port=port)
            return run_with_exit_code(
                lambda: run_coroutine(run_proxy(replace(settings, server=server), worker))
            )

        def log_workers() -> None:
            log_startup(settings, port, f" with {settings.server.workers} workers")

        return supervise(
            settings.server.workers,
            run_worker,
            drain=settings.server.drain,
            on_started=log_workers,
        )


def check_authentication(settings: Settings) -> None:
    """Raises: SettingsError, the proxy would be open although authentication is required."""
    if settings.auth.required and not (settings.auth.is_locked or settings.sandbox):
        raise SettingsError(
            "The proxy would be open to all programs that can connect, with your fal key: set "
            "FALPROXY_ACCESS_KEYS to name:secret for each caller, or FALPROXY_REQUIRE_AUTH=0."
        )


async def run_proxy(settings: Settings, worker: "WorkerContext | None" = None) -> None:
    check_authentication(settings)
    app = create_app(settings)
    if worker is None:
        await serve_app(app, settings, partial(log_startup, settings))
    else:
        worker.join(app)
        await serve_app(app, settings, worker.signal_ready, worker.stop_pipe)


async def serve_app(
    app: web.Application,
    settings: Settings,
    on_started: Callable[[int], None],
    stop_pipe: int | None = None,
) -> None:
    """Serve an application until a signal stops it.

    on_started: called with the port.
    stop_pipe: file descriptor of a pipe that is closed to stop a worker.
    """
    config = ListenConfig(
        host=settings.server.host,
        port=settings.server.port,
        drain=settings.server.drain,
        stop_pipe=stop_pipe,
        exit_timeout=settings.server.drain * 1.5 + STOP_TIMEOUT,
    )
    await serve(app, config, on_started)


def log_startup(settings: Settings, port: int, workers_note: str = "") -> None:
    warn_if_open(settings)
    for finding in (*check_cluster(settings), *check_shared_outputs(settings)):
        logger.warning("%s %s", finding.text, finding.fix)
    backend = BACKENDS.get(settings.storage_backend)
    logger.info(
        "falproxy %s listens on %s%s and sends to %s; outputs %s",
        __version__,
        http_url(settings.server.host, port),
        workers_note,
        settings.upstream.origin or "fal.ai",
        backend.log_phrase if backend else NOT_REHOSTED,
    )


def warn_if_open(settings: Settings) -> None:
    for finding in check_access(settings):
        if finding.level is Level.PROBLEM:
            logger.warning("%s %s", finding.text, finding.fix)


def public_url(settings: Settings, port: int) -> str:
    """Return the URL under which clients reach this process."""
    host = "localhost" if settings.server.host in LOCALHOST_ADDRESSES else settings.server.host
    return settings.server.public_url or http_url(host, port)


def http_url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
