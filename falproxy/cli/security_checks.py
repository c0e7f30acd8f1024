"""Whether strangers can spend the account's money, which every start looks at, and how `falproxy
doctor` says what it finds."""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from falproxy.settings import Settings


class Level(StrEnum):
    """A problem is a reason not to start; a note is worth a thought."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. mend: what to do about it, empty where nothing."""

    level: Level
    text: str
    fix: str = ""


def check_access(settings: Settings) -> Iterator[Finding]:
    """Whether strangers can spend the account's money."""
    if settings.auth.is_locked:
        yield Finding(Level.OK, "Callers have to say who they are.")
    elif is_loopback(settings.server.host):
        yield Finding(Level.OK, f"Open, but on {settings.server.host} only: nobody else can call.")
    else:
        yield Finding(
            Level.PROBLEM,
            f"OPEN: whoever reaches {settings.server.host}:{settings.server.port} spends your fal "
            "balance.",
            "Set FALPROXY_ACCESS_KEYS or FALPROXY_JWT_SECRET, or listen on 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
