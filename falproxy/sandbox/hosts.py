"""Checks of the browser's headers: any web page can send requests to a program on this machine."""

from fnmatch import fnmatchcase
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import web

from falproxy.sandbox.request import SERVICES
from falproxy.sandbox.responses import detail_error
from falproxy.sandbox.state import Sandbox

CROSS_ORIGIN_SITES = ("cross-site", "same-site")


def check_host(request: web.Request, sandbox: Sandbox) -> None:
    """Check that the Host header has an IP address, `localhost`, a host of fal, or a name of this
    sandbox. A web page can make its own name point to this machine (DNS rebinding).

    Raises:
        FalError: 403 if it has another name.
    """
    if not all(is_known_host(host, sandbox) for host in request.headers.getall("Host", ())):
        raise detail_error(
            403,
            "The sandbox is not called by this host name: set FALPROXY_ALLOWED_HOSTS to the name, "
            "or FALPROXY_PUBLIC_URL to the address that clients use.",
        )


def is_known_host(host: str, sandbox: Sandbox) -> bool:
    try:
        parts = urlsplit(f"//{host}")
        name = (parts.hostname or "").removesuffix(".")
        is_plain = parts.netloc == host and "@" not in host and (parts.port or 0) >= 0
    except ValueError:
        return False
    if not name or not is_plain:
        return False
    is_local = name == "localhost" or name.endswith(".localhost")
    if is_local or name in SERVICES or name == urlsplit(sandbox.public_url).hostname:
        return True
    return is_address(name) or any(fnmatchcase(name, pattern) for pattern in sandbox.hosts)


def is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def check_webhook_origin(request: web.Request) -> None:
    """Check that no web page of another origin asks for a webhook: the sandbox would send a request
    to a port of this machine for it.

    Raises:
        FalError: 403 if one does.
    """
    origin = request.headers.get("Origin")
    is_foreign = origin is not None and origin.partition("://")[2] != request.host
    if is_foreign or request.headers.get("Sec-Fetch-Site") in CROSS_ORIGIN_SITES:
        raise detail_error(403, "The sandbox sends no webhooks for web pages of another origin.")
