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
from falproxy.arguments import parse_arguments, read_settings
from falproxy.cache import StoreError
from falproxy.config import Settings, SettingsError
from falproxy.exposure import Level, check_access, is_loopback
from falproxy.fetch import FETCHER
from falproxy.logs import write_logs
from falproxy.middleware.cors import refuse_foreign_names
from falproxy.parts import FILES
from falproxy.server import Site, reserved, serve
from falproxy.version import __version__

if TYPE_CHECKING:
    from falproxy.sandbox import Sandbox
    from falproxy.workers import Worker

logger = logging.getLogger(__name__)

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE = ("127.0.0.1", "::1", "0.0.0.0", "::", "")  # localhost reaches them all
SANDBOX_PREFIX = "/sandbox"  # where the proxy's own port shows the sandbox's files
PLACES = {"supabase": "go to Supabase", "disk": "stay on the disk", "off": "stay with fal"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 after a clean stop, 130 after one that did not wait, 1 when the doctor found a
    problem, 2 with one sentence on standard error for a bad start."""
    return attempt(partial(start, parse_arguments(arguments)))


def start(options: argparse.Namespace) -> int:
    settings = read_settings(options)
    write_logs(settings.log_level)
    if options.command == "serve" and settings.workers > 1:
        return run_workers(settings)
    return run(command(options, settings))


def run(work: Coroutine[object, object, int | None]) -> int:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(work) or 0


def attempt(work: Callable[[], int]) -> int:
    try:
        return work()
    except SettingsError as error:
        sys.stderr.write(f"falproxy: {error}\n")
        return 2
    except KeyboardInterrupt:  # a second one, which does not wait
        return 130


def command(
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
    return run_offline(settings) if settings.sandbox else run_proxy(settings)


def loop_factory() -> Callable[[], AbstractEventLoop]:
    """uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def run_doctor(settings: Settings) -> int:
    """Says what was found; 1 when it is not safe to start."""
    from falproxy.doctor import examine  # each command imports what it alone needs

    findings = await examine(settings)
    for finding in findings:
        mend = f"\n{'':9}{finding.mend}" if finding.mend else ""
        sys.stdout.write(f"{finding.level:<9}{finding.text}{mend}\n")
    return int(any(finding.level is Level.PROBLEM for finding in findings))


async def run_cache(options: argparse.Namespace, settings: Settings) -> int:
    """Says what was asked; 1 when the store cannot be used."""
    from falproxy.explain import clear, explain, stats

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
    from falproxy.ledger import LedgerError
    from falproxy.usage import Question, usage

    asked = Question(options.since, options.until, options.by, options.json)
    try:
        async for line in usage(settings, asked):
            sys.stdout.write(f"{line}\n")
    except LedgerError as error:
        sys.stderr.write(f"falproxy: The ledger cannot be read: {error}.\n")
        return 1
    return 0


async def run_files(options: argparse.Namespace, settings: Settings) -> int:
    """Says what is not needed any more; 1 when the disk cannot be used, or something is needed."""
    from falproxy.outputs import MEMO_SECONDS
    from falproxy.storage import StorageError
    from falproxy.unused import delete_unused

    if options.older_than < (least := max(settings.cache_ttl, MEMO_SECONDS)):
        sys.stderr.write(f"falproxy: Results name files for {least:g} s: keep them for as long.\n")
        return 1
    try:
        for line in delete_unused(settings.data_dir / FILES, options.older_than, options.delete):
            sys.stdout.write(f"{line}\n")
    except StorageError as error:
        sys.stderr.write(f"falproxy: {error}\n")
        return 1
    return 0


def warn_when_open(settings: Settings) -> None:
    for finding in check_access(settings):
        if finding.level is Level.PROBLEM:
            logger.warning("%s %s", finding.text, finding.mend)


def run_workers(settings: Settings) -> int:
    """The proxy in several processes, and this one, which only looks after them."""
    from falproxy.workers import Worker, supervise

    if settings.sandbox:
        raise SettingsError("The sandbox lives in one process: leave FALPROXY_WORKERS at 1.")
    with reserved(settings.host, settings.port) as (port, sockets):

        def work(worker: Worker) -> int:
            for kept in sockets:  # nobody is kept from the port by who finishes what it does
                kept.close()
            return attempt(lambda: run(run_proxy(replace(settings, port=port), worker)))

        def started() -> None:
            announce(settings, port, f" with {settings.workers} workers")

        return supervise(settings.workers, work, drain=settings.drain, started=started)


def announce(settings: Settings, port: int, how: str = "") -> None:
    warn_when_open(settings)
    logger.info(
        "falproxy %s listens on %s%s and sends to %s; outputs %s",
        __version__,
        url_of(settings.host, port),
        how,
        settings.upstream_origin or "fal.ai",
        PLACES[settings.rehost_to],
    )


async def run_proxy(settings: Settings, worker: "Worker | None" = None) -> None:
    app = create_app(settings)
    if is_loopback(settings.host) and not settings.is_locked and not settings.public_url:
        app.middlewares.append(refuse_foreign_names(LOCAL_NAMES))
    if worker is None:
        await serve_with(app, settings, partial(announce, settings))
    else:
        worker.join(app)
        await serve_with(app, settings, worker.tell_ready, worker.leash)


async def run_offline(settings: Settings) -> None:
    """The proxy with a sandbox behind it, in one process and on one public port."""
    sandbox = new_sandbox()
    from falproxy.sandbox import create_app as create_sandbox
    from falproxy.sandbox import create_cdn
    from falproxy.storage.disk import find_file

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
                find = partial(find_file, settings.data_dir / FILES)
                app[FETCHER].find_here = sandbox.files.find_external = find
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
    started: Callable[[int], None],
    leash: int | None = None,
) -> None:
    site = Site(host=settings.host, port=settings.port, drain=settings.drain, leash=leash)
    await serve(app, site, started)


def public_url(settings: Settings, port: int) -> str:
    host = "localhost" if settings.host in EVERYWHERE else settings.host
    return settings.public_url or url_of(host, port)


def url_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
