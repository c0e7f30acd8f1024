"""Access checks that run at every start, and the findings of `falproxy doctor`."""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from falproxy.settings import Settings


class Level(StrEnum):
    """Severity of a finding. A problem is a reason not to start the proxy."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    fix: instructions for the user; empty if there is nothing to do.
    """

    level: Level
    text: str
    fix: str = ""


def check_access(settings: Settings) -> Iterator[Finding]:
    """Check whether strangers could use the fal key."""
    if settings.auth.is_locked:
        yield Finding(Level.OK, "Callers must authenticate.")
        return
    if settings.auth.required and not settings.sandbox:
        yield Finding(
            Level.PROBLEM,
            "FALPROXY_REQUIRE_AUTH is on, but callers need not authenticate: it does not start.",
            "Set FALPROXY_ACCESS_KEYS or FALPROXY_JWT_SECRET.",
        )
    if "*" in settings.auth.allowed_hosts:
        yield Finding(
            Level.NOTE,
            "FALPROXY_ALLOWED_HOSTS allows any name: web pages can use the proxy (DNS rebinding).",
            "List the names by which the proxy is called.",
        )
    if settings.server.socket_file is not None:
        yield Finding(
            Level.OK, "Open, but only to users of this machine that may use its Unix socket."
        )
    elif all(map(is_loopback, settings.server.hosts)):
        yield Finding(
            Level.OK, f"Open, but only on {settings.server.host}: other machines cannot connect."
        )
    else:
        address = f"{settings.server.host}:{settings.server.port}"
        yield Finding(
            Level.PROBLEM,
            f"OPEN: anyone who can connect to {address} can spend your fal balance.",
            "Set FALPROXY_ACCESS_KEYS or FALPROXY_JWT_SECRET, or listen on 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
