"""One log line a call, and what every answer says about itself."""

import asyncio
import json
import logging
import re
import time
from functools import lru_cache, partial
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.ids import IdGenerator
from falproxy.log import ACCESS_LOGGER, access_log_handler
from falproxy.metrics import NO_OPERATION, Metrics
from falproxy.proxy.call import (
    CACHE_OUTCOME,
    CALL,
    ERROR_CODE,
    PRINCIPAL,
    REHOST_STATUS,
    REQUEST_ID,
    UPSTREAM_SECONDS,
)
from falproxy.proxy.forward import DIRECT_WRITE, DirectWrite, RelayedResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.upstream import PREFETCHED

logger = logging.getLogger(ACCESS_LOGGER)

REQUEST_ID_HEADER = "X-Request-ID"
SERVER_TIMING = "Server-Timing"
# What a load balancer may call a request; anything else could write into our log.
CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
# nginx's word for a client that left before its answer; fal uses it as well.
CLIENT_CLOSED_REQUEST = 499
LABELS_CACHE_SIZE = 1024  # of calls, whose words are remembered

STARTED_AT = web.RequestKey("falproxy.started", float)

# Headers of an answer.
TimingHeaders = tuple[tuple[str, str], tuple[str, str]]


def access_log(metrics: Metrics, direct_write: DirectWrite | None = None) -> Middleware:
    """Middleware: gives the request its id; counts and logs the call when its answer is out."""

    names = IdGenerator()

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if direct_write is not None and len(request.match_info.apps) == 1:
            request[DIRECT_WRITE] = direct_write
        request[REQUEST_ID] = client_request_id(request) or names.next_id()
        in_hand = request.get(PREFETCHED)
        request[STARTED_AT] = in_hand.started if in_hand else time.perf_counter()
        if in_hand is not None:
            in_hand.is_consumed = True
        metrics.in_progress += 1
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            finish_call(
                metrics, request, CLIENT_CLOSED_REQUEST, elapsed_seconds(request), complete=False
            )
            raise
        except web.HTTPException as redirect:  # of somebody's hook; errors are answers by now
            finish_call(metrics, request, redirect.status, elapsed_seconds(request), complete=True)
            raise
        end = partial(finish_call, metrics, request, response.status, elapsed_seconds(request))
        if isinstance(response, RelayedResponse):
            response.on_sent = end
        else:
            end(complete=True)
        return response

    return middleware


def client_request_id(request: web.Request) -> str | None:
    """The id that the client or its load balancer gave the request."""
    given = request.headers.get(REQUEST_ID_HEADER)
    return given if given is not None and CLIENT_REQUEST_ID.fullmatch(given) else None


class CallLabels(NamedTuple):
    """What calls have in common that are counted alike, and logged with the same words."""

    method: str
    principal: str | None
    operation: str | None
    endpoint: str | None
    status: int
    error: str | None = None
    cache: str | None = None
    rehost: str | None = None
    complete: bool = True


class Timings(NamedTuple):
    """Seconds of one call. first: until its answer began; what comes after it is as fast as fal
    and the client are. whole: until it was over. upstream: fal's share of the first; None where
    fal was not asked."""

    first_byte: float
    total: float
    upstream: float | None


def finish_call(
    metrics: Metrics, request: web.Request, status: int, seconds: float, complete: bool
) -> None:
    """seconds: until the answer began."""
    call = request.get(CALL)
    kind = CallLabels(
        request.method,
        request.get(PRINCIPAL),
        call.target.operation if call else None,
        call.target.endpoint if call else None,
        status,
        request.get(ERROR_CODE),
        request.get(CACHE_OUTCOME),
        request.get(REHOST_STATUS),
        complete,
    )
    times = Timings(seconds, elapsed_seconds(request), request.get(UPSTREAM_SECONDS))
    record_call(metrics, kind, request[REQUEST_ID], times)


def record_call(metrics: Metrics, labels: CallLabels, request_id: str, timings: Timings) -> None:
    """Counts and logs a call that is over."""
    metrics.in_progress -= 1
    first, _, upstream = timings
    metrics.record_request(
        labels.operation or NO_OPERATION,
        labels.status,
        labels.cache or "",
        first if upstream is None else first - upstream,
        upstream,
    )
    if labels.error is not None:
        metrics.record_error(labels.error)
    if labels.rehost is not None:
        metrics.record_rehost(labels.rehost)
    failed = labels.error is not None and labels.status >= web.HTTPInternalServerError.status_code
    level = logging.WARNING if failed else logging.INFO
    if logger.isEnabledFor(level):
        log_call(level, labels, request_id, timings)


def log_call(level: int, labels: CallLabels, request_id: str, timings: Timings) -> None:
    """The line: names and numbers only, never a header, a body, a query or a key."""
    whole, upstream = round(timings.total, 6), round(timings.upstream or 0.0, 6)
    if (lines := access_log_handler(logger)) is not None:
        named = f'"request_id": "{request_id}", {labels_json(labels)}'  # an id needs no quoting
        lines.write(level, f'{named}, "seconds": {whole!r}, "upstream_seconds": {upstream!r}')
        return
    timed = {"seconds": whole, "upstream_seconds": upstream}
    fields = {"request_id": request_id, **labels._asdict(), **timed}
    logger.log(level, "call", extra={"fields": fields})


@lru_cache(LABELS_CACHE_SIZE)
def labels_json(labels: CallLabels) -> str:
    """The fields of a line that other lines have as well, as JSON without its braces."""
    known = {name: value for name, value in labels._asdict().items() if value is not None}
    return json.dumps(known)[1:-1]


def elapsed_seconds(request: web.BaseRequest) -> float:
    """How long a request has been here."""
    return time.perf_counter() - request[STARTED_AT]


async def add_timing_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Puts request id and timings on the answer to an observed request (`on_response_prepare`)."""
    if STARTED_AT not in request:
        return
    if isinstance(response, RelayedResponse):
        response.drop_default_headers()
    (_, request_id), (_, timing) = timing_headers(request)
    response.headers.setdefault(REQUEST_ID_HEADER, request_id)
    response.headers.add(SERVER_TIMING, timing)


def timing_headers(request: web.BaseRequest) -> TimingHeaders:
    """The request's id, and what took how long."""
    upstream = request.get(UPSTREAM_SECONDS, 0.0)
    return format_timing_headers(request[REQUEST_ID], elapsed_seconds(request) - upstream, upstream)


def format_timing_headers(
    request_id: str, proxy_seconds: float, upstream_seconds: float
) -> TimingHeaders:
    """What an answer says about itself. ours, upstream: seconds."""
    timing = f"falproxy;dur={proxy_seconds * 1e3:.2f}, fal;dur={upstream_seconds * 1e3:.2f}"
    return (REQUEST_ID_HEADER, request_id), (SERVER_TIMING, timing)
