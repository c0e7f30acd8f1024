"""Where a client sees the proxy."""

import re
from collections.abc import Callable

from aiohttp import hdrs, web

EMPTY_PATTERN = re.compile("")
HOST = re.compile(r"[\w.-]+(?::\d+)?|\[[0-9a-fA-F:.]+\](?::\d+)?")


def public_origin(request: web.Request) -> str:
    """The proxy's origin by the client's Host header, and by what a load balancer says of the
    scheme. It is the client's own word, to appear in its own answer only."""
    scheme = request.headers.get(hdrs.X_FORWARDED_PROTO, request.scheme)
    host = request.host if HOST.fullmatch(request.host) else "localhost"
    return f"{'https' if scheme == 'https' else 'http'}://{host}"


def files_base_url(
    files_route: web.AbstractRoute, public_url: str | None
) -> Callable[[web.Request], str]:
    """The address that a request's client puts the path of kept files behind."""

    def here(request: web.Request) -> str:
        assert files_route.resource is not None
        named = dict.fromkeys(
            files_route.resource.get_info().get("pattern", EMPTY_PATTERN).groupindex, ""
        )
        parts = named | {key: request.match_info.get(key, "") for key in named if key != "name"}
        path = files_route.resource.url_for(
            **parts
        ).path  # with the prefixes of nested applications
        return public_url or public_origin(request) + path.removesuffix("/files/")

    return here
