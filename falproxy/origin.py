"""Where a client sees the proxy."""

import re

from aiohttp import hdrs, web

HOST = re.compile(r"[\w.-]+(?::\d+)?|\[[0-9a-fA-F:.]+\](?::\d+)?")


def seen_origin(request: web.Request) -> str:
    """The proxy's origin by the client's Host header, and by what a load balancer says of the
    scheme. It is the client's own word, to appear in its own answer only."""
    scheme = request.headers.get(hdrs.X_FORWARDED_PROTO, request.scheme)
    host = request.host if HOST.fullmatch(request.host) else "localhost"
    return f"{'https' if scheme == 'https' else 'http'}://{host}"
