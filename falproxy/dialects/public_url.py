"""URLs of the proxy as its clients see them."""

import re
from collections.abc import Callable

from aiohttp import web

from falproxy.proxy.client_address import client_scheme

EMPTY_PATTERN = re.compile("")
HOST = re.compile(r"[\w.-]+(?::\d+)?|\[[0-9a-fA-F:.]+\](?::\d+)?")


# Set for a request that outlives its connection.
ROOT_PATH = web.RequestKey("falproxy.root_path", str)


def public_origin(request: web.Request) -> str:
    """Return the proxy's origin according to the `Host` and `X-Forwarded-Proto` headers.

    The client may have forged these headers: use the origin only in responses to the same client.
    """
    scheme = client_scheme(request)
    host = request.host if HOST.fullmatch(request.host) else "localhost"
    return f"{'https' if scheme == 'https' else 'http'}://{host}"


def public_base_url(request: web.Request) -> str:
    """Return the proxy's origin with the path below which it is mounted."""
    return public_origin(request) + root_path(request)


def root_path(request: web.Request) -> str:
    """Return the path below which an ASGI application has mounted the proxy, percent-encoded."""
    path: str = request.get(ROOT_PATH) or request.get_extra_info("root_path", "")
    return path


def files_base_url(
    files_route: web.AbstractRoute, public_url: str | None
) -> Callable[[web.Request], str]:
    """Create a function that returns the URL below which the client of a request finds the route of
    stored files.

    public_url: the configured URL of the proxy; None derives the URL from the request.
    """

    def base_url(request: web.Request) -> str:
        assert files_route.resource is not None
        pattern = files_route.resource.get_info().get("pattern", EMPTY_PATTERN)
        parts = {
            key: "" if key == "name" else request.match_info.get(key, "")
            for key in pattern.groupindex
        }
        path = files_route.resource.url_for(
            **parts
        ).path  # includes prefixes of nested applications
        return public_url or public_base_url(request) + path.removesuffix("/files/")

    return base_url
