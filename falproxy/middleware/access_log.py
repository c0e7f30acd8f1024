"""The access log: one line for each call, and the headers with its id and its timings."""

import asyncio
import json
import logging
import re
import time
from functools import lru_cache, partial
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.ids import IdGenerator, new_id
from falproxy.log import ACCESS_LOGGER, access_log_handler
from falproxy.metrics import NO_OPERATION, Metrics
from falproxy.proxy.call import (
    CACHE_OUTCOME,
    CALL,
    ERROR_CODE,
    JOB_ID,
    PRINCIPAL,
    REHOST_STATUS,
    REQUEST_ID,
    UPSTREAM_SECONDS,
    USER,
)
from falproxy.proxy.client_address import client_address
from falproxy.proxy.forward import DIRECT_WRITE, DirectWrite, RelayedResponse
from falproxy.proxy.head_only import any_request_id
from falproxy.proxy.headers import NOSNIFF
from falproxy.proxy.local_responses import FAL_REQUEST_ID
from falproxy.proxy.upstream import PREFETCHED

logger = logging.getLogger(ACCESS_LOGGER)

REQUEST_ID_HEADER = "X-Request-ID"
SERVER_TIMING = "Server-Timing"
# The ids that a client may give; other characters could forge log lines.
CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
# fal's ids that are logged: UUIDs, or what a client put into the URL in their place.
LOGGED_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# nginx's status for a client that disconnected before the response; fal uses it as well.
CLIENT_CLOSED_REQUEST = 499
# Entries of the cache of `labels_json`, and characters of the longest endpoint and caller in it.
LABELS_CACHE_SIZE, LABELS_LENGTH_MAX = 1024, 512

STARTED_AT = web.RequestKey("falproxy.started_at", float)

TimingHeaders = tuple[tuple[str, str], tuple[str, str]]


def access_log(metrics: Metrics, direct_write: DirectWrite | None = None) -> Middleware:
    """Middleware: set the request id; count and log the call when its response has been sent.

    direct_write: whether responses may be written directly; not used for requests to an application
        that embeds this one.
    """
    ids = IdGenerator()

    @any_request_id
    @web.middleware
    async def access_log_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if direct_write is not None and len(request.match_info.apps) == 1:
            request[DIRECT_WRITE] = direct_write
        request[REQUEST_ID] = client_request_id(request) or ids.next_id()
        prefetched = request.get(PREFETCHED)  # set if the fast path gave the request back
        client_address(request)  # read again at the end, when aiohttp has reset the application
        request[STARTED_AT] = prefetched.started if prefetched else time.perf_counter()
        if prefetched is not None:
            prefetched.is_consumed = True
            handler = partial(close_unused, handler=handler)
        metrics.in_progress += 1
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            finish_call(
                metrics, request, CLIENT_CLOSED_REQUEST, elapsed_seconds(request), complete=False
            )
            raise
        except web.HTTPException as redirect:
            # Raised by the auth hook; inner layers have converted errors to responses.
            finish_call(metrics, request, redirect.status, elapsed_seconds(request), complete=True)
            raise
        if (request_id := fal_request_id(request, response)) is not None:
            request[JOB_ID] = request_id
        finish = partial(finish_call, metrics, request, response.status, elapsed_seconds(request))
        if isinstance(response, RelayedResponse):
            response.on_sent = finish
        else:
            finish(complete=True)
        return response

    return access_log_middleware


async def close_unused(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Call a handler, and close fal's response if it was not used, because the caller is refused by
    now."""
    try:
        return await handler(request)
    finally:
        if (unused := request.pop(PREFETCHED, None)) is not None:
            unused.close()


def identify_requests() -> Middleware:
    """Middleware for paths that are not logged as calls: set the request id and the start time,
    which responses have as headers."""

    @any_request_id
    @web.middleware
    async def identify_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        identify_request(request)
        return await handler(request)

    return identify_middleware


def identify_request(request: web.Request) -> None:
    """Set the request id and the start time, unless they are set."""
    if STARTED_AT not in request:
        request[REQUEST_ID] = client_request_id(request) or new_id()
        request[STARTED_AT] = time.perf_counter()


def client_request_id(request: web.Request) -> str | None:
    """Return the id set by the client or its load balancer, None without a valid one."""
    return valid_request_id(request.headers.get(REQUEST_ID_HEADER, ""))


def valid_request_id(value: str) -> str | None:
    """Return the value of an X-Request-ID, None if it cannot be in a log line."""
    return value if CLIENT_REQUEST_ID.fullmatch(value) else None


def fal_request_id(request: web.Request, response: web.StreamResponse) -> str | None:
    """Return fal's id of the request that a response is about."""
    call = request.get(CALL)
    if call is None or call.target.request_id is not None:
        return None if call is None else call.target.request_id
    if isinstance(response, RelayedResponse):
        return response.upstream_headers.get(FAL_REQUEST_ID)
    return response.headers.get(FAL_REQUEST_ID)


class CallLabels(NamedTuple):
    """The labels of a call in metrics and log. Many calls share the same labels."""

    method: str
    principal: str | None
    operation: str | None
    endpoint: str | None
    status: int
    error: str | None = None
    cache: str | None = None
    rehost: str | None = None
    complete: bool = True
    user: str | None = None


class CallIds(NamedTuple):
    """Identifies a call in the log.

    fal: fal's request id.
    client: address of the client.
    """

    request: str
    fal: str | None
    client: str


class Timings(NamedTuple):
    """Seconds of one call.

    first_byte: until the response began. Later, fal and the client set the pace.
    total: until the response was sent, or the client left.
    upstream: fal's share of `first_byte`, None without a request to fal.
    """

    first_byte: float
    total: float
    upstream: float | None


def finish_call(
    metrics: Metrics, request: web.Request, status: int, seconds: float, complete: bool
) -> None:
    """Count and log a call that is over.

    seconds: until the response began.
    """
    call = request.get(CALL)
    labels = CallLabels(
        request.method,
        request.get(PRINCIPAL),
        call.target.operation if call else None,
        call.target.endpoint if call else None,
        status,
        request.get(ERROR_CODE),
        request.get(CACHE_OUTCOME),
        request.get(REHOST_STATUS),
        complete,
        request.get(USER),
    )
    timings = Timings(seconds, elapsed_seconds(request), request.get(UPSTREAM_SECONDS))
    fal_id = request.get(JOB_ID) or (call.target.request_id if call else None)
    ids = CallIds(request[REQUEST_ID], fal_id, client_address(request))
    record_call(metrics, labels, ids, timings)


def record_call(metrics: Metrics, labels: CallLabels, ids: CallIds, timings: Timings) -> None:
    metrics.in_progress -= 1
    first_byte, _, upstream = timings
    metrics.record_request(
        labels.operation or NO_OPERATION,
        labels.status,
        labels.cache or "",
        first_byte if upstream is None else first_byte - upstream,
        upstream,
    )
    if labels.error is not None:
        metrics.record_error(labels.error)
    if labels.rehost is not None:
        metrics.record_rehost(labels.rehost)
    failed = labels.error is not None and labels.status >= web.HTTPInternalServerError.status_code
    level = logging.WARNING if failed else logging.INFO
    if logger.isEnabledFor(level):
        if ids.fal is not None and not LOGGED_ID.fullmatch(ids.fal):
            ids = ids._replace(fal=None)
        log_call(level, labels, ids, timings)


def log_call(level: int, labels: CallLabels, ids: CallIds, timings: Timings) -> None:
    """Write the line of a call: ids, labels and numbers only, never another header, a body, a query
    or a key. The ids need no escapes."""
    total, upstream = round(timings.total, 6), round(timings.upstream or 0.0, 6)
    if (handler := access_log_handler(logger)) is not None:
        texts = labels.endpoint, labels.principal, labels.user
        is_short = sum(len(text) for text in texts if text is not None) <= LABELS_LENGTH_MAX
        fields_json = (labels_json if is_short else labels_json.__wrapped__)(labels)
        fal = "" if ids.fal is None else f'"fal_request_id": "{ids.fal}", '
        client = f'"client": "{ids.client}", ' if ids.client else ""
        ids_json = f'"request_id": "{ids.request}", {fal}{client}{fields_json}'
        handler.write(level, f'{ids_json}, "seconds": {total!r}, "upstream_seconds": {upstream!r}')
        return
    ids_given = {"fal_request_id": ids.fal, "client": ids.client}
    fields = {
        "request_id": ids.request,
        **{name: value for name, value in ids_given.items() if value},
        **labels._asdict(),
        "seconds": total,
        "upstream_seconds": upstream,
    }
    logger.log(level, "call", extra={"fields": fields})


@lru_cache(LABELS_CACHE_SIZE)
def labels_json(labels: CallLabels) -> str:
    """Return the labels as JSON without its braces."""
    fields = {name: value for name, value in labels._asdict().items() if value is not None}
    return json.dumps(fields)[1:-1]


def elapsed_seconds(request: web.BaseRequest) -> float:
    return time.perf_counter() - request[STARTED_AT]


async def add_timing_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Add request id and timings to the response of an identified request
    (`on_response_prepare`)."""
    if STARTED_AT not in request:
        return
    if isinstance(response, RelayedResponse):
        response.drop_default_headers()
    request_id, timing = timing_headers(request)
    response.headers.setdefault(*request_id)
    response.headers.add(*timing)
    response.headers.setdefault(*NOSNIFF)


def timing_headers(request: web.BaseRequest) -> TimingHeaders:
    """Return the headers with the request id and the timings so far."""
    upstream = request.get(UPSTREAM_SECONDS, 0.0)
    return format_timing_headers(request[REQUEST_ID], elapsed_seconds(request) - upstream, upstream)


def format_timing_headers(
    request_id: str, proxy_seconds: float, upstream_seconds: float
) -> TimingHeaders:
    timing = f"falproxy;dur={proxy_seconds * 1e3:.2f}, fal;dur={upstream_seconds * 1e3:.2f}"
    return (REQUEST_ID_HEADER, request_id), (SERVER_TIMING, timing)
