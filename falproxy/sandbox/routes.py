"""Which path of which host goes to which handler."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from falproxy.sandbox import cdn, model_metadata, pages, queue, realtime, rest, run
from falproxy.sandbox.request import (
    CDN,
    LOCAL,
    PLATFORM,
    QUEUE,
    REST,
    RUN,
    SITE,
    Address,
    Handler,
)
from falproxy.sandbox.responses import Answer, FalError, plain


@dataclass(frozen=True, slots=True)
class Route:
    """The first route of a service whose pattern fits the whole path is taken."""

    service: str
    pattern: re.Pattern[str]
    methods: Mapping[str, Handler]
    needs_key: bool


def route(
    service: str, pattern: str, methods: Mapping[str, Handler], *, needs_key: bool = False
) -> Route:
    return Route(service, re.compile(pattern), methods, needs_key)


ENDPOINT = "/(?P<endpoint>[^/]+/.*[^/])"
REQUEST = f"{ENDPOINT}/requests/(?P<id>[^/]+)"
KEY = "(?P<key>[^/]+/[^/]+)"
PARTS = f"/files/b/{KEY}/multipart/(?P<upload>[^/]+)"
NUMBER = r"/(?P<number>\d{1,5})"
ROUTES = (
    route(RUN, f"{ENDPOINT}/realtime", {"GET": realtime.connect}),
    route(RUN, f"{ENDPOINT}/stream", {"POST": run.stream}, needs_key=True),
    route(RUN, ENDPOINT, {"POST": run.run}, needs_key=True),
    route(QUEUE, f"{REQUEST}/status/stream", {"GET": queue.status_stream}),
    route(QUEUE, f"{REQUEST}/status", {"GET": queue.status}),
    route(QUEUE, f"{REQUEST}/cancel", {"PUT": queue.cancel}),
    route(QUEUE, f"{REQUEST}(?:/response)?", {"GET": queue.result}),
    route(QUEUE, ENDPOINT, {"POST": queue.submit}, needs_key=True),
    route(REST, "/tokens/?", {"POST": rest.tokens}, needs_key=True),
    route(REST, "/tokens/realtime", {"POST": rest.realtime_tokens}, needs_key=True),
    route(REST, "/storage/auth/token", {"POST": rest.cdn_token}, needs_key=True),
    route(REST, "/storage/upload/initiate(?:-multipart)?", {"POST": rest.initiate}, needs_key=True),
    route(REST, r"/\.well-known/jwks\.json", {"GET": rest.jwks}),
    route(SITE, r"/api/openapi/queue/openapi\.json", {"GET": model_metadata.openapi}),
    route(PLATFORM, "/v1/models/pricing", {"GET": model_metadata.pricing}, needs_key=True),
    route(CDN, "/files/upload", {"POST": cdn.upload}),
    route(CDN, "/files/upload/multipart", {"POST": cdn.upload_parts}),
    route(CDN, PARTS + NUMBER, {"PUT": cdn.put_part}),
    route(CDN, f"{PARTS}/complete", {"POST": cdn.complete}),
    route(CDN, f"/files/(?:b/)?{KEY}", {"GET": cdn.serve_file, "HEAD": cdn.serve_file}),
    route(CDN, "/upload/(?P<upload>[^/]+)", {"PUT": cdn.put_announced}),
    route(CDN, f"/upload/(?P<upload>[^/]+){NUMBER}", {"PUT": cdn.put_part}),
    route(CDN, "/upload/(?P<upload>[^/]+)/complete", {"POST": cdn.complete}),
    route(LOCAL, "/sandbox/state", {"GET": pages.state}),
    route(LOCAL, "/", {"GET": pages.hello}),
)


def find_route(address: Address) -> tuple[Route, dict[str, str]]:
    """The route and the named parts of its path. Raises FalError: 404 in the host's own shape."""
    for candidate in ROUTES:
        match = candidate.pattern.fullmatch(address.path)
        if match and candidate.service == address.service:
            return candidate, match.groupdict()
    if address.service in (RUN, QUEUE):
        raise plain(404, f'Application "{address.path.strip("/")}" not found')
    if address.service == PLATFORM:
        raise FalError(Answer(404, {"error": {"type": "not_found", "message": "Not found"}}))
    raise plain(404, "Not Found")
