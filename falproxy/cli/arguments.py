"""The words of the command line, and the settings that they are."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

from falproxy.parsers import parse_age
from falproxy.settings import SANDBOX_KEY, Settings, read_environment
from falproxy.version import __version__

# A call, as `falproxy cache explain` reads it.
CALL_EXAMPLE = """{
  "endpoint": "fal-ai/flux-pro/kontext",
  "input": {"prompt": "a cat", "image_url": "https://..."},
  "headers": {"Cache-Control": "no-cache"},
  "principal": "key:ann"
}"""
SANDBOX_PORT = "8081"
# Flags that are settings as well, by the variable that they win over.
FLAG_VARIABLES = {
    "host": "FALPROXY_HOST",
    "port": "FALPROXY_PORT",
    "log_level": "FALPROXY_LOG_LEVEL",
    "workers": "FALPROXY_WORKERS",
}
# What can be asked about the result cache: in a line, and the rest.
CACHE_COMMANDS = {
    "stats": (
        "how much is kept, and where",
        "flights: calls that are on their way to fal. ids: request ids that the proxy answers for.",
    ),
    "clear": ("forget all results", "Calls that are on their way are not disturbed."),
    "explain": (
        "what a call would meet, and why",
        "Nothing is sent to fal; images are read from their addresses. FILE holds the call:\n\n"
        f"{indent(CALL_EXAMPLE, '  ')}\n\n"
        "endpoint: its id, or fal's https URL. headers, principal: may be left out;\n"
        "the principal matters with FALPROXY_CACHE_SCOPE=principal.",
    ),
}
GC_DESCRIPTION = """Delete the kept outputs on this machine's disk that nobody has
needed for a while.

A file is needed when a result that names it is made or fetched, and when somebody reads it. Links
to a deleted file are dead. Without --delete nothing is deleted, only shown."""
USAGE_DESCRIPTION = """What was called, what became of it and what it cost, by the ledger, whether
a proxy runs or not. Times and days are UTC; the seconds are those of a call, on average."""
USAGE_GROUPS = ("endpoint", "principal", "route", "minute", "hour", "day")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    address = argparse.ArgumentParser(add_help=False)
    address.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    address.add_argument("--port", help="port to listen on, 0 for a free one")
    address.add_argument("--log-level", help="debug, info, warning or error")

    parser = argparse.ArgumentParser(prog="falproxy", description="A transparent proxy for fal.ai.")
    parser.add_argument("--version", action="version", version=f"falproxy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sandbox", parents=[address], help="an offline fal by itself")
    commands.add_parser("doctor", parents=[address], help="what is wrong, and how to mend it")
    add_cache_commands(commands.add_parser("cache", help="the results that are kept for reuse"))
    add_files(commands.add_parser("files", help="the outputs that are kept on the disk"))
    add_usage(commands.add_parser("usage", help="calls, errors, seconds and money"))
    serving = commands.add_parser("serve", parents=[address], help="the proxy")
    serving.add_argument("--workers", metavar="N", help="processes that share the port (default 1)")
    serving.add_argument(
        "--sandbox",
        nargs="?",
        const="always",
        choices=["always", "auto"],
        help="work offline without an account; auto does so only when there is no FAL_KEY",
    )
    return parser.parse_args(arguments)


def add_cache_commands(cache: argparse.ArgumentParser) -> None:
    """`falproxy cache ...`"""
    questions = cache.add_subparsers(dest="question", metavar="QUESTION", required=True)
    for name, (about, more) in CACHE_COMMANDS.items():
        question = questions.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.\n\n{more}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "explain":
            question.add_argument("file", type=Path, metavar="FILE", help="the call, as above")


def add_usage(usage: argparse.ArgumentParser) -> None:
    """`falproxy usage`"""
    usage.description = USAGE_DESCRIPTION
    when = "such as 7d, 12h, 2026-11-01 or 2026-11-01T09:30Z"
    usage.add_argument("--since", default="7d", metavar="WHEN", help=f"{when} (default 7d)")
    usage.add_argument("--until", metavar="WHEN", help="the same (default now)")
    usage.add_argument("--by", default="endpoint", choices=USAGE_GROUPS, help="(default endpoint)")
    usage.add_argument("--json", action="store_true", help="as JSON, like /api/usage")


def add_files(files: argparse.ArgumentParser) -> None:
    """`falproxy files gc`"""
    tasks = files.add_subparsers(dest="task", metavar="TASK", required=True)
    gc = tasks.add_parser(
        "gc",
        help="delete those that nobody has needed for a while",
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
    gc.add_argument("--delete", action="store_true", help="delete them, and not only show them")


def parse_age_argument(text: str) -> float:
    """Seconds. Raises: ArgumentTypeError."""
    try:
        return parse_age(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_settings(options: argparse.Namespace) -> Settings:
    """The environment's settings under the command line's. Raises: SettingsError."""
    env = read_environment()
    if options.command == "sandbox":
        env |= {"FALPROXY_SANDBOX": "1", "FALPROXY_PORT": SANDBOX_PORT}
    elif options.command == "serve" and wants_sandbox(options, env):
        env["FALPROXY_SANDBOX"] = "1"
    elif options.command in ("cache", "files", "usage"):
        # They ask nothing of fal, and say themselves what is wrong. Without a key `make run` starts
        # the sandbox.
        if not has_key(env):
            env["FALPROXY_SANDBOX"] = "1"
        env |= {"FAL_KEY": SANDBOX_KEY, "FALPROXY_LOG_LEVEL": "error"}
    elif options.command == "doctor":
        env.setdefault("FALPROXY_LOG_LEVEL", "error")
    env |= {
        variable: value
        for flag, variable in FLAG_VARIABLES.items()
        if (value := getattr(options, flag, None)) is not None
    }
    return Settings.from_env(env)


def wants_sandbox(options: argparse.Namespace, env: dict[str, str]) -> bool:
    return options.sandbox == "always" or (options.sandbox == "auto" and not has_key(env))


def has_key(env: dict[str, str]) -> bool:
    halves = env.get("FAL_KEY_ID") and env.get("FAL_KEY_SECRET")
    return bool(env.get("FAL_KEY") or env.get("AI_KEYS") or halves)
