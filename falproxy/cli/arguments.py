"""Arguments of the command line, and the settings that result from them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

from falproxy.environment import read_environment
from falproxy.errors import SettingsError
from falproxy.parsers import parse_age
from falproxy.settings import SANDBOX_KEY, Settings
from falproxy.version import __version__

# The input of `falproxy cache explain`.
CALL_EXAMPLE = """{
  "endpoint": "fal-ai/flux-pro/kontext",
  "input": {"prompt": "a cat", "image_url": "https://..."},
  "headers": {"Cache-Control": "no-cache"},
  "principal": "key:ann"
}"""
SANDBOX_PORT = "8081"
# Options that override a setting → the variable of the setting.
FLAG_VARIABLES = {
    "host": "FALPROXY_HOST",
    "port": "FALPROXY_PORT",
    "uds": "FALPROXY_UDS",
    "log_level": "FALPROXY_LOG_LEVEL",
    "workers": "FALPROXY_WORKERS",
}
# Commands of `falproxy cache` → one line of help, and the rest of the description.
CACHE_COMMANDS = {
    "stats": (
        "show the number and size of cached results",
        "flights: calls to fal that are running. ids: request ids that the proxy has issued.",
    ),
    "clear": ("delete all cached results", "Running calls are not affected."),
    "explain": (
        "show the cache key of a call, and whether it would be a hit",
        "Nothing is sent to fal; images are downloaded from their URLs. FILE contains the call:\n\n"
        f"{indent(CALL_EXAMPLE, '  ')}\n\n"
        "endpoint: its id, or fal's https URL. headers, principal: optional;\n"
        "the principal matters with FALPROXY_CACHE_SCOPE=principal.",
    ),
}
GC_DESCRIPTION = """Delete stored outputs and inputs that have not been used for a while, in the
Supabase bucket or on this machine's disk, wherever FALPROXY_REHOST stores them.

A file counts as used when a result that contains it is created or fetched, and on the disk also
when the file is downloaded. In a bucket, files that falproxy has not stored are left alone. URLs of
deleted files no longer work. Without --delete, files are only listed."""
ESTIMATE_DESCRIPTION = f"""Show the price of a call, without making it. FILE contains the call:

{indent(CALL_EXAMPLE, "  ")}

endpoint: its id, or fal's https URL. Only it and the input are read. Without FAL_KEY, the prices
are those of the registry, and those that a proxy has stored in FALPROXY_DATA_DIR."""
KEYS_DESCRIPTION = """Keys for callers, with limits of their own. They are stored beside the
ledger; running proxies that require authentication accept a new key at once, and refuse a revoked
one within five seconds. Times are UTC."""
# Commands of `falproxy keys` → one line of help.
KEYS_COMMANDS = {
    "create": "make a key, and show its secret once",
    "list": "show the keys",
    "show": "show a key",
    "rotate": "replace the secret of a key",
    "revoke": "refuse a key from now on",
}
# Options of `falproxy keys create` → metavar and help.
KEY_OPTIONS = {
    "expires": ("WHEN", "such as 90d, 12h or 2027-01-31 (default never)"),
    "rate": ("RATE", "model calls in a window, such as 60/minute"),
    "concurrency": ("N", "model calls at once"),
    "budget": ("BUDGET", "USD in a window, such as 5/day or 100/month"),
    "endpoints": (
        "PATTERNS",
        "endpoint ids that the key may call, comma separated, such as 'fal-ai/flux**' (default all "
        "that the proxy allows)",
    ),
}
USAGE_DESCRIPTION = """Show calls, errors, cache hits, costs and durations from the ledger. The
proxy need not be running. Times and days are UTC; durations are averages per call."""
TRACE_DESCRIPTION = """Show what the ledger has about a request: the call that started it, its
result, cost, cache outcome, failures, and its job in /api/images or /v1/videos. REQUEST_ID is fal's
id, the proxy's (the header X-Request-ID, and request_id in log lines), or that of the job. With
DATABASE_URL it does not matter which machine served it. Status polls are not recorded. Times are
UTC."""
USAGE_GROUPS = ("endpoint", "principal", "user", "route", "minute", "hour", "day")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    address = argparse.ArgumentParser(add_help=False)
    address.add_argument(
        "--host", help="address to listen on, or several with commas (default 127.0.0.1)"
    )
    address.add_argument("--port", help="port to listen on, 0 for a free one")
    address.add_argument("--uds", metavar="PATH", help="Unix socket to listen on instead")
    address.add_argument("--log-level", help="debug, info, warning or error")

    parser = argparse.ArgumentParser(prog="falproxy", description="A transparent proxy for fal.ai.")
    parser.add_argument("--version", action="version", version=f"falproxy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sandbox", parents=[address], help="run the offline fal by itself")
    commands.add_parser(
        "doctor", parents=[address], help="check the settings, and show how to fix problems"
    )
    add_estimate(commands.add_parser("estimate", help="show what a call would cost"))
    add_cache_commands(commands.add_parser("cache", help="inspect or clear the result cache"))
    add_keys(commands.add_parser("keys", help="manage the keys of callers"))
    add_files(commands.add_parser("files", help="manage stored outputs and inputs"))
    gc = commands.add_parser("gc", help="delete what is older than its retention")
    gc.add_argument("--delete", action="store_true", help="delete it instead of counting it")
    add_usage(commands.add_parser("usage", help="show calls, errors, durations and costs"))
    add_trace(commands.add_parser("trace", help="show what happened to a request"))
    serve = commands.add_parser("serve", parents=[address], help="run the proxy")
    serve.add_argument("--workers", metavar="N", help="processes that share the port (default 1)")
    serve.add_argument(
        "--sandbox",
        nargs="?",
        const="always",
        choices=["always", "auto"],
        help="work offline without an account; auto does so only when there is no FAL_KEY",
    )
    return parser.parse_args(arguments)


def add_cache_commands(cache: argparse.ArgumentParser) -> None:
    commands = cache.add_subparsers(dest="cache_command", metavar="COMMAND", required=True)
    for name, (summary, details) in CACHE_COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "explain":
            command.add_argument("file", type=Path, metavar="FILE", help="the call, as above")


def add_estimate(estimate: argparse.ArgumentParser) -> None:
    estimate.description = ESTIMATE_DESCRIPTION
    estimate.formatter_class = argparse.RawDescriptionHelpFormatter
    estimate.add_argument("file", type=Path, metavar="FILE", help="the call; - is standard input")
    estimate.add_argument("--json", action="store_true", help="print JSON, like /api/estimate")


def add_usage(usage: argparse.ArgumentParser) -> None:
    usage.description = USAGE_DESCRIPTION
    examples = "such as 7d, 12h, 2026-11-01 or 2026-11-01T09:30Z"
    usage.add_argument("--since", default="7d", metavar="WHEN", help=f"{examples} (default 7d)")
    usage.add_argument("--until", metavar="WHEN", help="end of the time range (default now)")
    usage.add_argument("--by", default="endpoint", choices=USAGE_GROUPS, help="(default endpoint)")
    usage.add_argument("--limit", metavar="N", help="number of rows (default and at most 1000)")
    usage.add_argument("--offset", metavar="N", help="number of rows to leave out before them")
    usage.add_argument("--json", action="store_true", help="print JSON, like /api/usage")


def add_trace(trace: argparse.ArgumentParser) -> None:
    trace.description = TRACE_DESCRIPTION
    trace.add_argument("request_id", metavar="REQUEST_ID")
    trace.add_argument("--json", action="store_true", help="print JSON")


def add_keys(keys: argparse.ArgumentParser) -> None:
    keys.description = KEYS_DESCRIPTION
    commands = keys.add_subparsers(dest="keys_command", metavar="COMMAND", required=True)
    for name, summary in KEYS_COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        if name == "list":
            command.add_argument("--all", action="store_true", help="show revoked keys too")
        else:
            command.add_argument("name", metavar="NAME", help="name of the key, or its id")
        command.add_argument("--json", action="store_true", help="print JSON, like /api/keys")
        if name == "create":
            for option, (metavar, text) in KEY_OPTIONS.items():
                command.add_argument(f"--{option}", metavar=metavar, help=text)
        elif name == "rotate":
            command.add_argument(
                "--grace",
                metavar="AGE",
                help="how long the old secret stays valid, such as 1h (default not at all)",
            )


def add_files(files: argparse.ArgumentParser) -> None:
    commands = files.add_subparsers(dest="files_command", metavar="COMMAND", required=True)
    gc = commands.add_parser(
        "gc",
        help="delete files that have not been used for a while",
        description=GC_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gc.add_argument(
        "--older-than",
        type=parse_age_argument,
        required=True,
        metavar="AGE",
        help="such as 30d or 12h",
    )
    gc.add_argument(
        "--delete", action="store_true", help="delete the files instead of listing them"
    )


def parse_age_argument(text: str) -> float:
    """Parse an age to seconds. Raises: ArgumentTypeError."""
    try:
        return parse_age(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_settings(options: argparse.Namespace) -> Settings:
    """Read the settings from the environment; options of the command line override them.

    Raises: SettingsError, the settings are invalid.
    """
    env = read_environment()
    if options.command == "sandbox":
        env |= {"FALPROXY_SANDBOX": "1", "FALPROXY_PORT": SANDBOX_PORT}
    elif options.command == "serve" and wants_sandbox(options, env):
        env["FALPROXY_SANDBOX"] = "1"
    elif options.command in ("cache", "files", "gc", "keys", "trace", "usage"):
        # These commands send nothing to fal and report errors themselves. Without a key the proxy
        # was started with the sandbox (`make run`), whose defaults differ.
        if not has_key(env):
            env["FALPROXY_SANDBOX"] = "1"
        env |= {"FAL_KEY": SANDBOX_KEY, "FALPROXY_LOG_LEVEL": "error"}
    elif options.command == "estimate" and not has_key(env):
        env |= {"FALPROXY_SANDBOX": "1", "FALPROXY_LOG_LEVEL": "error"}
    elif options.command in ("doctor", "estimate"):
        env.setdefault("FALPROXY_LOG_LEVEL", "error")
    return Settings.from_env(env | option_values(options))


def option_values(options: argparse.Namespace) -> dict[str, str]:
    """Return the variables that options of the command line set. Raises: SettingsError, an option
    is empty."""
    given = {flag: getattr(options, flag, None) for flag in FLAG_VARIABLES}
    for flag, value in given.items():
        if value == "":
            name = flag.replace("_", "-")
            raise SettingsError(f"--{name} is empty: leave it out, or give it a value.")
    return {FLAG_VARIABLES[flag]: value for flag, value in given.items() if value is not None}


def wants_sandbox(options: argparse.Namespace, env: dict[str, str]) -> bool:
    return options.sandbox == "always" or (options.sandbox == "auto" and not has_key(env))


def has_key(env: dict[str, str]) -> bool:
    halves = env.get("FAL_KEY_ID") and env.get("FAL_KEY_SECRET")
    return bool(env.get("FAL_KEY") or env.get("AI_KEYS") or halves)
