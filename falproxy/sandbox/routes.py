"""Routes: host, path pattern and method to handler."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from falproxy.sandbox import cdn, live, model_metadata, pages, queue, rest, run
from falproxy.sandbox.request import (
    CDN,
    LIVE,
    LOCAL,
    PLATFORM,
    QUEUE,
    REST,
    RUN,
    SITE,
    Handler,
    RequestTarget,
)
from falproxy.sandbox.responses import FalError, FalResponse, detail_error


@dataclass(frozen=True, slots=True)
class Route:
    """One entry of the route table.

    pattern: must match the complete path; its groups become the path parameters.
    needs_key: the request is authenticated before the handler is called.
    """

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
MULTIPART = f"/files/b/{KEY}/multipart/(?P<upload>[^/]+)"
NUMBER = r"/(?P<number>\d{1,5})"
ROUTES = (
    route(RUN, f"{ENDPOINT}/realtime", {"GET": run.connect_realtime}),
    route(RUN, f"{ENDPOINT}/stream", {"POST": run.stream}, needs_key=True),
    route(RUN, f"{ENDPOINT}/ice", {"POST": live.get_app_ice_servers}, needs_key=True),
    route(RUN, ENDPOINT, {"POST": run.run}, needs_key=True),
    route(QUEUE, f"{REQUEST}/status/stream", {"GET": queue.status_stream}),
    route(QUEUE, f"{REQUEST}/status", {"GET": queue.status}),
    route(QUEUE, f"{REQUEST}/cancel", {"PUT": queue.cancel}),
    route(QUEUE, f"{REQUEST}(?:/response)?", {"GET": queue.result}),
    route(QUEUE, ENDPOINT, {"POST": queue.submit}, needs_key=True),
    route(REST, "/tokens/?", {"POST": rest.create_token}, needs_key=True),
    route(REST, "/tokens/realtime", {"POST": rest.create_realtime_token}, needs_key=True),
    route(REST, "/storage/auth/token", {"POST": rest.create_cdn_token}, needs_key=True),
    route(
        REST,
        "/storage/upload/initiate(?:-multipart)?",
        {"POST": rest.initiate_upload},
        needs_key=True,
    ),
    route(REST, r"/\.well-known/jwks\.json", {"GET": rest.get_jwks}),
    route(SITE, r"/api/openapi/queue/openapi\.json", {"GET": model_metadata.get_openapi}),
    route(PLATFORM, "/v1/models", {"GET": model_metadata.get_models}),
    route(PLATFORM, "/v1/models/pricing", {"GET": model_metadata.get_pricing}, needs_key=True),
    route(CDN, "/files/upload", {"POST": cdn.upload_file}),
    route(CDN, "/files/upload/multipart", {"POST": cdn.start_multipart_upload}),
    route(CDN, MULTIPART + NUMBER, {"PUT": cdn.put_part}),
    route(CDN, f"{MULTIPART}/complete", {"POST": cdn.complete_upload}),
    route(CDN, f"/files/(?:b/)?{KEY}", {"GET": cdn.serve_file, "HEAD": cdn.serve_file}),
    route(CDN, "/upload/(?P<upload>[^/]+)", {"PUT": cdn.put_upload}),
    route(CDN, f"/upload/(?P<upload>[^/]+){NUMBER}", {"PUT": cdn.put_part}),
    route(CDN, "/upload/(?P<upload>[^/]+)/complete", {"POST": cdn.complete_upload}),
    route(LIVE, "/ice/?", {"POST": live.get_ice_servers}, needs_key=True),
    route(LIVE, "/session/?", {"POST": live.open_session}, needs_key=True),
    route(LIVE, "/session/heartbeat/?", {"POST": live.beat}, needs_key=True),
    route(LOCAL, "/sandbox/state", {"GET": pages.counters}),
    route(LOCAL, "/", {"GET": pages.index}),
)


def find_route(target: RequestTarget) -> tuple[Route, dict[str, str]]:
    """Return the first matching route and the path parameters.

    Raises:
        FalError: 404 in the shape of the addressed host.
    """
    for candidate in ROUTES:
        match = candidate.pattern.fullmatch(target.path)
        if match and candidate.service == target.service:
            return candidate, match.groupdict()
    if target.service in (RUN, QUEUE):
        raise detail_error(404, f'Application "{target.path.strip("/")}" not found')
    if target.service == PLATFORM:
        raise FalError(FalResponse(404, {"error": {"type": "not_found", "message": "Not found"}}))
    raise detail_error(404, "Not Found")
