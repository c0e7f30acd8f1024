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

from falproxy.ids import Names
from falproxy.log import CALLS, call_lines
from falproxy.metrics import NO_OPERATION, Metrics
from falproxy.proxy.call import (
    CACHE,
    CALL,
    ERROR_CODE,
    PRINCIPAL,
    REHOST,
    REQUEST_ID,
    UPSTREAM_SECONDS,
)
from falproxy.proxy.direct_write import SHORT_CUT, ShortCut
from falproxy.proxy.forward import UpstreamResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.upstream import IN_HAND

logger = logging.getLogger(CALLS)

REQUEST_ID_HEADER = "X-Request-ID"
SERVER_TIMING = "Server-Timing"
# What a load balancer may call a request; anything else could write into our log.
GIVEN_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
# nginx's word for a client that left before its answer; fal uses it as well.
CLIENT_LEFT = 499
KINDS = 1024  # of calls, whose words are remembered

STARTED = web.RequestKey("falproxy.started", float)

# Headers of an answer.
Signature = tuple[tuple[str, str], tuple[str, str]]


def observe(metrics: Metrics, short_cut: ShortCut | None = None) -> Middleware:
    """Middleware: gives the request its id; counts and logs the call when its answer is out."""

    names = Names()

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if short_cut is not None and len(request.match_info.apps) == 1:
            request[SHORT_CUT] = short_cut
        request[REQUEST_ID] = given_name(request) or names.next()
        in_hand = request.get(IN_HAND)
        request[STARTED] = in_hand.started if in_hand else time.perf_counter()
        if in_hand is not None:
            in_hand.is_taken = True
        metrics.in_progress += 1
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            end_call(metrics, request, CLIENT_LEFT, seconds_of(request), complete=False)
            raise
        except web.HTTPException as redirect:  # of somebody's hook; errors are answers by now
            end_call(metrics, request, redirect.status, seconds_of(request), complete=True)
            raise
        end = partial(end_call, metrics, request, response.status, seconds_of(request))
        if isinstance(response, UpstreamResponse):
            response.on_sent = end
        else:
            end(complete=True)
        return response

    return middleware


def given_name(request: web.Request) -> str | None:
    """The id that the client or its load balancer gave the request."""
    given = request.headers.get(REQUEST_ID_HEADER)
    return given if given is not None and GIVEN_ID.fullmatch(given) else None


class Kind(NamedTuple):
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


class Times(NamedTuple):
    """Seconds of one call. first: until its answer began; what comes after it is as fast as fal
    and the client are. whole: until it was over. upstream: fal's share of the first; None where
    fal was not asked."""

    first: float
    whole: float
    upstream: float | None


def end_call(
    metrics: Metrics, request: web.Request, status: int, seconds: float, complete: bool
) -> None:
    """seconds: until the answer began."""
    call = request.get(CALL)
    kind = Kind(
        request.method,
        request.get(PRINCIPAL),
        call.target.operation if call else None,
        call.target.endpoint if call else None,
        status,
        request.get(ERROR_CODE),
        request.get(CACHE),
        request.get(REHOST),
        complete,
    )
    times = Times(seconds, seconds_of(request), request.get(UPSTREAM_SECONDS))
    tell(metrics, kind, request[REQUEST_ID], times)


def tell(metrics: Metrics, kind: Kind, request_id: str, times: Times) -> None:
    """Counts and logs a call that is over."""
    metrics.in_progress -= 1
    first, _, upstream = times
    metrics.count(
        kind.operation or NO_OPERATION,
        kind.status,
        kind.cache or "",
        first if upstream is None else first - upstream,
        upstream,
    )
    if kind.error is not None:
        metrics.fail(kind.error)
    if kind.rehost is not None:
        metrics.keep(kind.rehost)
    failed = kind.error is not None and kind.status >= web.HTTPInternalServerError.status_code
    level = logging.WARNING if failed else logging.INFO
    if logger.isEnabledFor(level):
        log_call(level, kind, request_id, times)


def log_call(level: int, kind: Kind, request_id: str, times: Times) -> None:
    """The line: names and numbers only, never a header, a body, a query or a key."""
    whole, upstream = round(times.whole, 6), round(times.upstream or 0.0, 6)
    if (lines := call_lines(logger)) is not None:
        named = f'"request_id": "{request_id}", {words_of(kind)}'  # an id needs no quoting
        lines.take(level, f'{named}, "seconds": {whole!r}, "upstream_seconds": {upstream!r}')
        return
    timed = {"seconds": whole, "upstream_seconds": upstream}
    fields = {"request_id": request_id, **kind._asdict(), **timed}
    logger.log(level, "call", extra={"fields": fields})


@lru_cache(KINDS)
def words_of(kind: Kind) -> str:
    """The fields of a line that other lines have as well, as JSON without its braces."""
    known = {name: value for name, value in kind._asdict().items() if value is not None}
    return json.dumps(known)[1:-1]


def seconds_of(request: web.BaseRequest) -> float:
    """How long a request has been here."""
    return time.perf_counter() - request[STARTED]


async def sign_answer(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Puts request id and timings on the answer to an observed request (`on_response_prepare`)."""
    if STARTED not in request:
        return
    if isinstance(response, UpstreamResponse):
        response.drop_defaults()
    (_, request_id), (_, timing) = signature(request)
    response.headers.setdefault(REQUEST_ID_HEADER, request_id)
    response.headers.add(SERVER_TIMING, timing)


def signature(request: web.BaseRequest) -> Signature:
    """The request's id, and what took how long."""
    upstream = request.get(UPSTREAM_SECONDS, 0.0)
    return signed(request[REQUEST_ID], seconds_of(request) - upstream, upstream)


def signed(request_id: str, ours: float, upstream: float) -> Signature:
    """What an answer says about itself. ours, upstream: seconds."""
    timing = f"falproxy;dur={ours * 1e3:.2f}, fal;dur={upstream * 1e3:.2f}"
    return (REQUEST_ID_HEADER, request_id), (SERVER_TIMING, timing)
