"""Settings: what one process runs with, read once. Only this module reads the environment."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Self

from dotenv import dotenv_values

MIB = 2**20
SIZE = re.compile(r"(\d+) ?(?:([KMG])(?:i?B)?)?", re.IGNORECASE)
SIZE_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# No user, query or fragment: what we build on it ends in a path of ours.
PLAIN_URL = re.compile(r"https?://(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?(?:/[^\s?#@]*)?")
LOG_LEVELS = ("debug", "info", "warning", "error")
# What the sandbox is called with when there is no key.
SANDBOX_KEY = "sandbox:sandbox"


class SettingsError(ValueError):
    """A setting is missing or makes no sense. The message names it, never a secret's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one process runs with. Durations are seconds, sizes are bytes."""

    fal_key: str = field(repr=False)  # secrets never reach a log through repr
    host: str = "127.0.0.1"
    port: int = 8080
    log_level: str = "info"
    max_body: int = 100 * MIB
    connect_timeout: float = 5.0
    upstream_timeout: float = 3600.0  # silence; as long as fal lets an app run
    upstream_origin: str | None = None  # the sandbox's origin; None sends to the target itself
    drain: float = 30.0
    sandbox: bool = False
    public_url: str | None = None  # how clients reach the proxy; None is localhost and the port

    def __post_init__(self) -> None:
        check_key(self.fal_key)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Self:
        """Raises SettingsError: no key, one with stray characters, or a value without sense."""
        parsers: dict[str, tuple[str, Callable[[str], object]]] = {
            "FALPROXY_HOST": ("host", str),
            "FALPROXY_PORT": ("port", parse_port),
            "FALPROXY_LOG_LEVEL": ("log_level", parse_log_level),
            "FALPROXY_MAX_BODY": ("max_body", parse_size),
            "FALPROXY_CONNECT_TIMEOUT": ("connect_timeout", parse_seconds),
            "FALPROXY_UPSTREAM_TIMEOUT": ("upstream_timeout", parse_seconds),
            "FALPROXY_UPSTREAM_ORIGIN": ("upstream_origin", parse_origin),
            "FALPROXY_DRAIN": ("drain", parse_seconds),
            "FALPROXY_SANDBOX": ("sandbox", parse_flag),
            "FALPROXY_PUBLIC_URL": ("public_url", parse_url),
        }
        given: dict[str, Any] = {
            name: read(variable, env[variable], parse)
            for variable, (name, parse) in parsers.items()
            if env.get(variable)
        }
        return cls(fal_key=read_key(env, sandbox=given.get("sandbox", False)), **given)


def environment(dotenv: Path = Path(".env")) -> dict[str, str]:
    """The process's environment over what a `.env` file says."""
    from_file = {name: value for name, value in dotenv_values(dotenv).items() if value is not None}
    return from_file | os.environ


def read_key(env: Mapping[str, str], *, sandbox: bool) -> str:
    """FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, as fal's own clients read them."""
    if key := env.get("FAL_KEY"):
        return key
    if (key_id := env.get("FAL_KEY_ID")) and (secret := env.get("FAL_KEY_SECRET")):
        return f"{key_id}:{secret}"
    if sandbox:
        return SANDBOX_KEY
    raise SettingsError(
        "FAL_KEY is not set: put your key from https://fal.ai/dashboard/keys there, "
        "or start with --sandbox to work offline without an account."
    )


def check_key(key: str) -> None:
    """Raises SettingsError: the key could not be sent in a header. It says where, never what."""
    for position, character in enumerate(key, start=1):
        if not "!" <= character <= "~" or character in "\"'":
            raise SettingsError(
                f"The fal key has a stray character ({describe(character)}) "
                f"at position {position} of {len(key)}."
            )
    if not key:
        raise SettingsError("The fal key is empty.")


def describe(character: str) -> str:
    """A kind of character, in words that give nothing of a secret away."""
    if character in "\"'":
        return "a quote"
    if character.isspace():
        return "white space"
    return "not ASCII" if character > "~" else "a control character"


def read(variable: str, value: str, parse: Callable[[str], object]) -> object:
    try:
        return parse(value)
    except ValueError as error:
        raise SettingsError(f"{variable} {error}.") from error


def parse_port(value: str) -> int:
    if not value.isdecimal() or int(value) > 65535:
        raise ValueError(f"must be a port number from 0 to 65535, not {value!r}")
    return int(value)


def parse_log_level(value: str) -> str:
    if value.lower() not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}, not {value!r}")
    return value.lower()


def parse_size(value: str) -> int:
    """Bytes, or a binary unit after the number: `100M`, `1 GiB`."""
    match = SIZE.fullmatch(value)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"must be a number of bytes like 104857600 or 100M, not {value!r}")
    return int(match[1]) * SIZE_UNITS.get((match[2] or "").upper(), 1)


def parse_seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not isfinite(seconds) or seconds <= 0:
        raise ValueError(f"must be a number of seconds above 0, not {value!r}")
    return seconds


def parse_flag(value: str) -> bool:
    if value.lower() not in ("0", "1", "false", "true", "no", "yes", "off", "on"):
        raise ValueError(f"must be 0 or 1, not {value!r}")
    return value.lower() in ("1", "true", "yes", "on")


def parse_url(value: str) -> str:
    if not PLAIN_URL.fullmatch(value):
        raise ValueError("must be a URL like https://proxy.example.com")
    return value.rstrip("/")


def parse_origin(value: str) -> str:
    origin = parse_url(value)
    if "/" in origin.partition("://")[2]:
        raise ValueError("must be an origin like http://127.0.0.1:8081, without a path")
    return origin
