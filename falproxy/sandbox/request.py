"""One request to the offline fal, and the fal host and path that it addresses."""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web

from falproxy.sandbox.state import Sandbox

RUN, QUEUE, REST, LIVE = "fal.run", "queue.fal.run", "rest.fal.ai", "wma.fal.run"
SITE, PLATFORM, CDN, LOCAL = "fal.ai", "api.fal.ai", "cdn", "local"
SERVICES: Mapping[str, str] = {
    "fal.run": RUN,
    "falrun.com": RUN,
    "queue.fal.run": QUEUE,
    "queue.falrun.com": QUEUE,
    "rest.fal.ai": REST,
    "rest.alpha.fal.ai": REST,
    "wma.fal.run": LIVE,
    "fal.ai": SITE,
    "api.fal.ai": PLATFORM,
    "v3.fal.media": CDN,
    "v3b.fal.media": CDN,
    "fal.media": CDN,
}
TAGS_HEADER = "X-Fal-Tags"
TAGS_MAX, TAGS_MAX_BYTES, RESERVED_TAG_PREFIX = 10, 1024, "fal."
CDN_PATH = re.compile(r"/(?:files|upload)/")


@dataclass(frozen=True, slots=True)
class RequestTarget:
    """Destination of a request.

    host: the host as the client named it.
    service: canonical fal host, `cdn`, or `local` for the pages in `pages.py`.
    path: path without a leading host segment, percent-encoded as received.
    query: query string as received, without the question mark.
    """

    host: str
    service: str
    path: str
    query: str


@dataclass(frozen=True, slots=True)
class FalRequest:
    """A request with everything that its handler needs.

    http_request: the aiohttp request.
    path_params: named groups of the route's pattern.
    request_id: fal's request id, in case the request becomes a model call.
    account: key id of the caller, set once the key has been checked.
    """

    sandbox: Sandbox
    http_request: web.Request
    target: RequestTarget
    path_params: Mapping[str, str]
    request_id: str
    account: str = ""


Handler = Callable[[FalRequest], Awaitable[web.StreamResponse]]


def parse_tags(headers: Sequence[str]) -> tuple[str, ...]:
    """Return the valid tags of a request as `key=value`. Bad ones are dropped: without `=`, with an
    empty or a reserved key, beyond the first ten, or all of them if the header is too long."""
    value = ",".join(headers)
    if len(value.encode("utf-8", "surrogateescape")) > TAGS_MAX_BYTES:
        return ()
    tags: dict[str, str] = {}
    for pair in value.split(","):
        key, equals, text = (part.strip() for part in pair.partition("="))
        if equals and key and not key.lower().startswith(RESERVED_TAG_PREFIX):
            tags[key] = text
    return tuple(f"{key}={text}" for key, text in tags.items())[:TAGS_MAX]


def resolve_target(raw_path: str, host: str) -> RequestTarget:
    """Return the target of a request.

    The service is determined by the Host header, else by the first path segment, else by the path:
    the CDN for its paths, `local` for all others.

    raw_path: path and query as received.
    host: the Host header, with or without a port.
    """
    path, _, query = raw_path.partition("?")
    hostname = host.lower().partition(":")[0]
    if hostname in SERVICES:
        return RequestTarget(hostname, SERVICES[hostname], path, query)
    first, _, rest = path.lstrip("/").partition("/")
    if first.lower() in SERVICES:
        return RequestTarget(first.lower(), SERVICES[first.lower()], f"/{rest}", query)
    return RequestTarget(host, CDN if CDN_PATH.match(path) else LOCAL, path, query)
