"""The command line: `falproxy serve` and the other commands."""

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial

from falproxy.app.key_mode import database_has_keys, resolve_key_mode
from falproxy.cli.arguments import parse_arguments, read_settings
from falproxy.cli.exit_codes import run_coroutine, run_with_exit_code
from falproxy.cli.sandbox_command import run_sandbox, run_with_sandbox
from falproxy.cli.security_checks import Level
from falproxy.cli.serve_command import run_proxy, run_workers
from falproxy.log import configure_logging
from falproxy.settings import Settings
from falproxy.stores.cache import StoreError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success, or a clean stop. 1: the command failed, or the doctor found a problem. 2: invalid
    arguments or settings, with one sentence on standard error. 130: stopped without waiting.
    """
    return run_with_exit_code(partial(dispatch, parse_arguments(arguments)))


def dispatch(options: argparse.Namespace) -> int:
    settings = read_settings(options)
    configure_logging(settings.log_level)
    if options.command in ("serve", "doctor"):
        settings = resolve_keys(settings)
    if options.command == "serve" and settings.server.workers > 1:
        return run_workers(settings, partial(read_settings, options))
    return run_coroutine(create_command(options, settings))


def resolve_keys(settings: Settings) -> Settings:
    """Decide at start whether keys that are made at run time are accepted, for all processes."""
    has_keys = asyncio.run(database_has_keys(settings))
    return resolve_key_mode(settings, has_keys=has_keys)


def create_command(
    options: argparse.Namespace, settings: Settings
) -> Coroutine[object, object, int | None]:
    if options.command == "sandbox":
        return run_sandbox(settings)
    if options.command == "doctor":
        return run_doctor(settings)
    if (command := REPORTS.get(options.command)) is not None:
        return command(options, settings)
    if settings.sandbox:
        return run_with_sandbox(settings)
    return run_proxy(settings, partial(read_settings, options))


# Each of the following commands imports its module itself: `serve` does not need them.


async def run_doctor(settings: Settings) -> int:
    """Print the findings. Returns 1 if one of them is a problem."""
    from falproxy.cli.doctor import run_checks

    findings = await run_checks(settings)
    for finding in findings:
        fix = f"\n{'':9}{finding.fix}" if finding.fix else ""
        sys.stdout.write(f"{finding.level:<9}{finding.text}{fix}\n")
    return int(any(finding.level is Level.PROBLEM for finding in findings))


async def run_cache(options: argparse.Namespace, settings: Settings) -> int:
    """Print the lines of a cache command. Returns 1 if the store cannot be used."""
    from falproxy.cli.cache_command import clear, explain, stats

    commands = {"stats": stats, "clear": clear}
    command = commands.get(options.cache_command) or partial(explain, file=options.file)
    try:
        async for line in command(settings):
            sys.stdout.write(f"{line}\n")
    except StoreError as error:
        sys.stderr.write(f"falproxy: {error}.\n")
        return 1
    return 0


async def run_usage(options: argparse.Namespace, settings: Settings) -> int:
    """Print the usage report. Returns 1 if the ledger cannot be read."""
    from falproxy.cli.usage_command import UsageArguments, usage
    from falproxy.stores.ledger import LedgerError

    arguments = UsageArguments(
        options.since, options.until, options.by, options.json, options.limit, options.offset
    )
    try:
        async for line in usage(settings, arguments):
            sys.stdout.write(f"{line}\n")
    except LedgerError as error:
        sys.stderr.write(f"falproxy: The ledger cannot be read: {error}.\n")
        return 1
    return 0


async def run_trace(options: argparse.Namespace, settings: Settings) -> int:
    """Print what the ledger has about a request. Returns 1 if that is nothing."""
    from falproxy.cli.trace_command import NOT_FOUND, UnknownRequest, trace
    from falproxy.stores.ledger import LedgerError

    try:
        async for line in trace(settings, options.request_id, is_json=options.json):
            sys.stdout.write(f"{line}\n")
    except UnknownRequest:
        sys.stderr.write(f"falproxy: {NOT_FOUND}\n")
        return 1
    except LedgerError as error:
        sys.stderr.write(f"falproxy: The ledger cannot be read: {error}.\n")
        return 1
    return 0


async def run_estimate(options: argparse.Namespace, settings: Settings) -> int:
    """Print the estimate of a call. Returns 1 if there is no price."""
    from falproxy.cli.estimate_command import EstimateError, estimate

    try:
        async for line in estimate(settings, options.file, is_json=options.json):
            sys.stdout.write(f"{line}\n")
    except EstimateError as error:
        sys.stderr.write(f"falproxy: {error}.\n")
        return 1
    return 0


async def run_keys(options: argparse.Namespace, settings: Settings) -> int:
    from falproxy.cli import keys_command

    return await keys_command.run_keys(options, settings)


async def run_files(options: argparse.Namespace, settings: Settings) -> int:
    """Print the unused files. Returns 1 if the age is too low or the storage cannot be used."""
    from falproxy.cli.files_command import collect_unused
    from falproxy.stores.files import StorageError

    try:
        async for line in collect_unused(settings, options.older_than, delete=options.delete):
            sys.stdout.write(f"{line}\n")
    except StorageError as error:
        sys.stderr.write(f"falproxy: {error}\n")
        return 1
    return 0


async def run_gc(options: argparse.Namespace, settings: Settings) -> int:
    """Print what is older than its retention. Returns 1 if a store cannot be used."""
    from falproxy.cli.gc_command import collect_old
    from falproxy.stores.files import StorageError
    from falproxy.stores.ledger import LedgerError

    try:
        async for line in collect_old(settings, delete=options.delete):
            sys.stdout.write(f"{line}\n")
    except (LedgerError, StoreError, StorageError) as error:
        sys.stderr.write(f"falproxy: {error}\n")
        return 1
    return 0


REPORTS: Mapping[str, Callable[[argparse.Namespace, Settings], Coroutine[object, object, int]]] = {
    "cache": run_cache,
    "estimate": run_estimate,
    "files": run_files,
    "gc": run_gc,
    "keys": run_keys,
    "trace": run_trace,
    "usage": run_usage,
}
