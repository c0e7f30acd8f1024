"""`falproxy serve`: the proxy, in one process or several."""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from falproxy.app import create_app
from falproxy.app.components import create_registry
from falproxy.app.key_mode import database_has_keys, resolve_key_mode
from falproxy.app.start_checks import check_services
from falproxy.cli.cluster_checks import check_cluster, check_shared_outputs
from falproxy.cli.exit_codes import run_coroutine, run_with_exit_code
from falproxy.cli.security_checks import Level, check_access
from falproxy.cli.system_checks import check_temporary_folder
from falproxy.environment import read_variables
from falproxy.errors import SettingsError
from falproxy.metrics import METRICS
from falproxy.server.listeners import (
    ListenAddress,
    describe,
    open_listeners,
    reserve_address,
)
from falproxy.server.reload import NOT_RELOADED, CreateApp
from falproxy.server.runner import ServeConfig, serve
from falproxy.server.service_manager import VARIABLES, ServiceManager
from falproxy.settings import ServerSettings, Settings, setting_fields
from falproxy.storage_backends import BACKENDS
from falproxy.version import __version__

if TYPE_CHECKING:
    from falproxy.server.supervisor import WorkerContext

logger = logging.getLogger(__name__)

LOCALHOST_ADDRESSES = ("127.0.0.1", "::1", "0.0.0.0", "::")  # reachable as `localhost`
STOP_TIMEOUT = 4.5  # seconds beyond the drain, and the half of it that paid jobs have in addition
# Fields of the server's settings that are read again on SIGHUP, as all of the other groups are.
RELOADED = ("public_url", "max_body", "fast_path")
NOT_REHOSTED = "stay with fal"  # completes "outputs ..." in the log line of the start

ReadSettings = Callable[[], Settings]  # reads the settings again; raises SettingsError
Listeners = Sequence[socket.socket]


def run_workers(settings: Settings, read_settings: ReadSettings) -> int:
    """Run the proxy in several processes, supervised by this one. Returns the exit code."""
    from falproxy.server.supervisor import SupervisorConfig, WorkerContext, supervise

    check_authentication(settings)
    if settings.sandbox:
        raise SettingsError("The sandbox runs in one process: leave FALPROXY_WORKERS at 1.")
    manager = service_manager()
    current = settings
    with reserve_address(listen_address(settings, manager)) as (address, listeners):

        def run_worker(worker: WorkerContext) -> int:
            for reserved in listeners if address.is_tcp else ():
                reserved.close()  # a stopping worker must not keep the port in use
            return run_with_exit_code(
                lambda: run_coroutine(
                    run_worker_proxy(current, read_settings, worker, address, listeners)
                )
            )

        def log_workers() -> None:
            workers = f" with {settings.server.workers} workers"
            log_startup(settings, describe(address, listeners), workers)

        def reload() -> bool:
            nonlocal current
            try:
                changed = reread(current, read_settings)
                create_registry(changed)
            except SettingsError as error:
                logger.warning(NOT_RELOADED, error)
                return False
            current = changed
            return True

        return supervise(
            SupervisorConfig(
                count=settings.server.workers,
                work=run_worker,
                stop_timeout=settings.server.drain + settings.server.delay,
                on_started=log_workers,
                on_reload=reload,
                manager=manager,
            ),
            settings.data_dir,
        )


async def run_worker_proxy(
    settings: Settings,
    read_settings: ReadSettings,
    worker: "WorkerContext",
    address: ListenAddress,
    listeners: Listeners,
) -> None:
    """Run the proxy in a worker process.

    listeners: of the supervisor, for addresses that are not TCP.
    """
    app = create_app(settings)
    worker.join(app)
    check_services(app, settings, is_logged=worker.is_first)
    with ExitStack() as stack:
        if address.is_tcp:
            listeners = stack.enter_context(open_listeners(address, is_shared=True))
        config = replace(
            serve_config(settings, listeners, address),
            stop_pipe=worker.stop_pipe,
            create_app=app_creator(settings, read_settings, worker),
        )
        await serve(app, config, worker.signal_ready)


def check_authentication(settings: Settings) -> None:
    """Raises: SettingsError, the proxy would be open although authentication is required."""
    if settings.auth.required and not (settings.auth.is_locked or settings.sandbox):
        raise SettingsError(
            "The proxy would be open to all programs that can connect, with your fal key: set "
            "FALPROXY_ACCESS_KEYS to name:secret for each caller, or FALPROXY_REQUIRE_AUTH=0."
        )


async def run_proxy(settings: Settings, read_settings: ReadSettings) -> None:
    check_authentication(settings)
    app = create_app(settings)
    check_services(app, settings)
    create = app_creator(settings, read_settings)
    await serve_app(app, settings, partial(log_startup, settings), create)


def app_creator(
    settings: Settings, read_settings: ReadSettings, worker: "WorkerContext | None" = None
) -> CreateApp:
    """Return the function that creates an application with new settings."""

    async def create(old: web.Application) -> web.Application:
        nonlocal settings
        changed = reread(settings, read_settings)
        changed = resolve_key_mode(changed, has_keys=await database_has_keys(changed))
        check_authentication(changed)
        app = create_app(changed, metrics=old[METRICS])
        if worker is None:
            warn_if_open(changed)
        else:
            worker.join(app)
        settings = changed
        return app

    return create


def reread(settings: Settings, read_settings: ReadSettings) -> Settings:
    """Return new settings, with the current values of those that are read at the start only.

    Raises: SettingsError, the new settings are invalid.
    """
    changed = read_settings()
    if changed.sandbox != settings.sandbox:
        raise SettingsError("A change of FALPROXY_SANDBOX needs a restart.")
    variables = ["FALPROXY_LOG_LEVEL"] * (changed.log_level != settings.log_level)
    variables += [
        field.metadata["variable"]
        for field in setting_fields(ServerSettings)
        if field.name not in RELOADED
        and getattr(changed.server, field.name) != getattr(settings.server, field.name)
    ]
    if variables:
        logger.warning("Changes of %s need a restart", ", ".join(variables))
    kept = replace(settings.server, **{name: getattr(changed.server, name) for name in RELOADED})
    changed = replace(changed, server=kept)
    check_authentication(changed)
    return changed


async def serve_app(
    app: web.Application,
    settings: Settings,
    on_started: Callable[[str], None],
    create: CreateApp | None = None,
) -> None:
    """Serve an application in this process until a signal stops it.

    on_started: called with the URLs.
    create: creates an application with new settings; None if they are read at the start only.
    """
    manager = service_manager()
    address = listen_address(settings, manager)
    with open_listeners(address) as listeners:
        config = replace(
            serve_config(settings, listeners, address), create_app=create, manager=manager
        )
        await serve(app, config, lambda: on_started(describe(address, listeners)))


def serve_config(settings: Settings, listeners: Listeners, address: ListenAddress) -> ServeConfig:
    server = settings.server
    return ServeConfig(
        listeners=listeners,
        are_passed=address.passed_sockets > 0,
        drain=server.drain,
        delay=server.delay,
        exit_timeout=server.delay + server.drain * 1.5 + STOP_TIMEOUT,
    )


def service_manager() -> ServiceManager:
    return ServiceManager.from_variables(read_variables(VARIABLES), os.getpid())


def listen_address(settings: Settings, manager: ServiceManager) -> ListenAddress:
    server = settings.server
    return ListenAddress(
        hosts=server.hosts,
        port=server.port,
        socket_file=server.socket_file,
        passed_sockets=manager.passed_sockets,
    )


def log_startup(settings: Settings, urls: str, workers_note: str = "") -> None:
    warn_if_open(settings)
    findings = (
        *check_cluster(settings),
        *check_shared_outputs(settings),
        *check_temporary_folder(),
    )
    for finding in findings:
        logger.warning("%s %s", finding.text, finding.fix)
    backend = BACKENDS.get(settings.storage_backend)
    logger.info(
        "falproxy %s listens on %s%s and sends to %s; outputs %s",
        __version__,
        urls,
        workers_note,
        settings.upstream.origin or "fal.ai",
        backend.log_phrase if backend else NOT_REHOSTED,
    )


def warn_if_open(settings: Settings) -> None:
    for finding in check_access(settings):
        if finding.level is Level.PROBLEM:
            logger.warning("%s %s", finding.text, finding.fix)


def public_url(settings: Settings, urls: str) -> str:
    """Return the URL under which clients reach this process.

    urls: those it listens on.
    """
    first = urls.partition(" ")[0]
    if settings.server.hosts[0] in LOCALHOST_ADDRESSES:
        first = f"http://localhost:{first.rpartition(':')[2]}"
    return settings.server.public_url or first
