"""Where a client sees the proxy."""

import re
from collections.abc import Callable

from aiohttp import hdrs, web

NOTHING = re.compile("")
HOST = re.compile(r"[\w.-]+(?::\d+)?|\[[0-9a-fA-F:.]+\](?::\d+)?")


def seen_origin(request: web.Request) -> str:
    """The proxy's origin by the client's Host header, and by what a load balancer says of the
    scheme. It is the client's own word, to appear in its own answer only."""
    scheme = request.headers.get(hdrs.X_FORWARDED_PROTO, request.scheme)
    host = request.host if HOST.fullmatch(request.host) else "localhost"
    return f"{'https' if scheme == 'https' else 'http'}://{host}"


def seen_above(files: web.AbstractRoute, public_url: str | None) -> Callable[[web.Request], str]:
    """The address that a request's client puts the path of kept files behind."""

    def here(request: web.Request) -> str:
        assert files.resource is not None
        named = dict.fromkeys(files.resource.get_info().get("pattern", NOTHING).groupindex, "")
        parts = named | {key: request.match_info.get(key, "") for key in named if key != "name"}
        path = files.resource.url_for(**parts).path  # with the prefixes of nested applications
        return public_url or seen_origin(request) + path.removesuffix("/files/")

    return here
