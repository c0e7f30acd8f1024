"""The command line: `falproxy serve`, `sandbox`, `doctor`, `usage`, `cache` and `files`."""

import argparse
import asyncio
import logging
import sys
from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from falproxy.app import create_app
from falproxy.cli.arguments import parse_arguments, read_settings
from falproxy.cli.security_checks import Level, check_access, is_loopback
from falproxy.errors import SettingsError
from falproxy.log import configure_logging
from falproxy.media.fetch import FETCHER
from falproxy.middleware.cors import check_host
from falproxy.server.runner import ListenConfig, reserve_port, serve
from falproxy.settings import Settings
from falproxy.storage_backends import BACKENDS, FILES_FOLDER
from falproxy.stores.cache import StoreError
from falproxy.version import __version__

if TYPE_CHECKING:
    from falproxy.sandbox import Sandbox
    from falproxy.server.supervisor import WorkerContext

logger = logging.getLogger(__name__)

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
LOCALHOST_ADDRESSES = ("127.0.0.1", "::1", "0.0.0.0", "::", "")  # localhost reaches them all
SANDBOX_PREFIX = "/sandbox"  # where the proxy's own port shows the sandbox's files
NOT_REHOSTED = "stay with fal"  # completes "outputs ..." in the log line of the start


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 after a clean stop, 130 after one that did not wait, 1 when the doctor found a
    problem, 2 with one sentence on standard error for a bad start."""
    return run_with_exit_code(partial(dispatch, parse_arguments(arguments)))


def dispatch(options: argparse.Namespace) -> int:
    settings = read_settings(options)
    configure_logging(settings.log_level)
    if options.command == "serve" and settings.workers > 1:
        return run_workers(settings)
    return run_coroutine(create_command(options, settings))


def run_coroutine(coroutine: Coroutine[object, object, int | None]) -> int:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(coroutine) or 0


def run_with_exit_code(work: Callable[[], int]) -> int:
    try:
        return work()
    except SettingsError as error:
        sys.stderr.write(f"falproxy: {error}\n")
        return 2
    except KeyboardInterrupt:  # a second one, which does not wait
        return 130


def create_command(
    options: argparse.Namespace, settings: Settings
) -> Coroutine[object, object, int | None]:
    if options.command == "sandbox":
        return run_sandbox(settings)
    if options.command == "doctor":
        return run_doctor(settings)
    if options.command == "cache":
        return run_cache(options, settings)
    if options.command == "files":
        return run_files(options, settings)
    if options.command == "usage":
        return run_usage(options, settings)
    return run_with_sandbox(settings) if settings.sandbox else run_proxy(settings)


def loop_factory() -> Callable[[], AbstractEventLoop]:
    """uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def run_doctor(settings: Settings) -> int:
    """Says what was found; 1 when it is not safe to start."""
    from falproxy.cli.doctor import run_checks  # each command imports what it alone needs

    findings = await run_checks(settings)
    for finding in findings:
        mend = f"\n{'':9}{finding.fix}" if finding.fix else ""
        sys.stdout.write(f"{finding.level:<9}{finding.text}{mend}\n")
    return int(any(finding.level is Level.PROBLEM for finding in findings))


async def run_cache(options: argparse.Namespace, settings: Settings) -> int:
    """Says what was asked; 1 when the store cannot be used."""
    from falproxy.cli.cache_command import clear, explain, stats

    answers = {"stats": stats, "clear": clear}
    ask = answers.get(options.question) or partial(explain, file=options.file)
    try:
        async for line in ask(settings):
            sys.stdout.write(f"{line}\n")
    except StoreError as error:
        sys.stderr.write(f"falproxy: {error}.\n")
        return 1
    return 0


async def run_usage(options: argparse.Namespace, settings: Settings) -> int:
    """Says what was asked; 1 when the ledger cannot be read."""
    from falproxy.cli.usage_command import UsageArguments, usage
    from falproxy.stores.ledger import LedgerError

    asked = UsageArguments(options.since, options.until, options.by, options.json)
    try:
        async for line in usage(settings, asked):
            sys.stdout.write(f"{line}\n")
    except LedgerError as error:
        sys.stderr.write(f"falproxy: The ledger cannot be read: {error}.\n")
        return 1
    return 0


async def run_files(options: argparse.Namespace, settings: Settings) -> int:
    """Says what is not needed any more; 1 when the disk cannot be used, or something is needed."""
    from falproxy.cli.files_command import collect_unused
    from falproxy.stores.files import StorageError
    from falproxy.stores.files.rehosting import URL_CACHE_TTL

    if options.older_than < (least := max(settings.cache_ttl, URL_CACHE_TTL)):
        sys.stderr.write(f"falproxy: Results name files for {least:g} s: keep them for as long.\n")
        return 1
    try:
        for line in collect_unused(
            settings.data_dir / FILES_FOLDER, options.older_than, options.delete
        ):
            sys.stdout.write(f"{line}\n")
    except StorageError as error:
        sys.stderr.write(f"falproxy: {error}\n")
        return 1
    return 0


def warn_if_open(settings: Settings) -> None:
    for finding in check_access(settings):
        if finding.level is Level.PROBLEM:
            logger.warning("%s %s", finding.text, finding.fix)


def run_workers(settings: Settings) -> int:
    """The proxy in several processes, and this one, which only looks after them."""
    from falproxy.server.supervisor import WorkerContext, supervise

    if settings.sandbox:
        raise SettingsError("The sandbox lives in one process: leave FALPROXY_WORKERS at 1.")
    with reserve_port(settings.host, settings.port) as (port, sockets):

        def work(worker: WorkerContext) -> int:
            for kept in sockets:  # nobody is kept from the port by who finishes what it does
                kept.close()
            return run_with_exit_code(
                lambda: run_coroutine(run_proxy(replace(settings, port=port), worker))
            )

        def started() -> None:
            log_startup(settings, port, f" with {settings.workers} workers")

        return supervise(settings.workers, work, drain=settings.drain, on_started=started)


def log_startup(settings: Settings, port: int, workers_note: str = "") -> None:
    warn_if_open(settings)
    backend = BACKENDS.get(settings.rehost_to)
    logger.info(
        "falproxy %s listens on %s%s and sends to %s; outputs %s",
        __version__,
        url_of(settings.host, port),
        workers_note,
        settings.upstream_origin or "fal.ai",
        backend.log_phrase if backend else NOT_REHOSTED,
    )


async def run_proxy(settings: Settings, worker: "WorkerContext | None" = None) -> None:
    app = create_app(settings)
    if is_loopback(settings.host) and not settings.is_locked and not settings.public_url:
        app.middlewares.append(check_host(LOCAL_HOSTS))
    if worker is None:
        await serve_with(app, settings, partial(log_startup, settings))
    else:
        worker.join(app)
        await serve_with(app, settings, worker.signal_ready, worker.stop_pipe)


async def run_with_sandbox(settings: Settings) -> None:
    """The proxy with a sandbox behind it, in one process and on one public port."""
    sandbox = new_sandbox()
    from falproxy.sandbox import create_app as create_sandbox
    from falproxy.sandbox import create_cdn
    from falproxy.stores.files.disk import find_file

    behind = web.AppRunner(create_sandbox(sandbox), access_log=None)
    await behind.setup()
    try:
        await web.TCPSite(behind, "127.0.0.1", 0).start()
        origin = url_of("127.0.0.1", behind.addresses[0][1])
        app = create_app(replace(settings, upstream_origin=origin))
        app.add_subapp(SANDBOX_PREFIX, create_cdn(sandbox))

        def started(port: int) -> None:
            here = public_url(settings, port)
            sandbox.public_url = here + SANDBOX_PREFIX
            app[FETCHER].trust(f"{sandbox.public_url}/")
            if settings.rehost_to == "disk":
                find = partial(find_file, settings.data_dir / FILES_FOLDER)
                app[FETCHER].find_local = sandbox.files.find_elsewhere = find
            logger.info(
                "falproxy %s listens on %s with the SANDBOX: nothing leaves this machine, "
                "nothing costs money. Set FAL_KEY to use fal.ai.",
                __version__,
                url_of(settings.host, port),
            )

        await serve_with(app, settings, started)
    finally:
        await behind.cleanup()


async def run_sandbox(settings: Settings) -> None:
    sandbox = new_sandbox()
    from falproxy.sandbox import create_app as create_sandbox

    def started(port: int) -> None:
        sandbox.public_url = public_url(settings, port)
        logger.info(
            "The SANDBOX plays fal.ai on %s. Send a proxy there with FALPROXY_UPSTREAM_ORIGIN.",
            url_of(settings.host, port),
        )

    await serve_with(create_sandbox(sandbox), settings, started)


def new_sandbox() -> "Sandbox":
    """Raises: SettingsError, the sandbox's own packages are not installed."""
    try:
        from falproxy.sandbox import Sandbox
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"The sandbox needs {error.name}: pip install 'falproxy[sandbox]'."
        ) from error
    return Sandbox(public_url="")


async def serve_with(
    app: web.Application,
    settings: Settings,
    on_started: Callable[[int], None],
    stop_pipe: int | None = None,
) -> None:
    site = ListenConfig(
        host=settings.host, port=settings.port, drain=settings.drain, stop_pipe=stop_pipe
    )
    await serve(app, site, on_started)


def public_url(settings: Settings, port: int) -> str:
    host = "localhost" if settings.host in LOCALHOST_ADDRESSES else settings.host
    return settings.public_url or url_of(host, port)


def url_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
