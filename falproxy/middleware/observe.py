"""One log line a call, and what every answer says about itself."""

import asyncio
import logging
import re
import time
from collections.abc import Mapping
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.call import (
    CACHE,
    CALL,
    ERROR_CODE,
    PRINCIPAL,
    REHOST,
    REQUEST_ID,
    UPSTREAM_SECONDS,
)
from falproxy.ids import new_name
from falproxy.logs import CALLS, call_lines
from falproxy.metrics import NO_OPERATION, Metrics
from falproxy.proxy import UpstreamResponse
from falproxy.short_cut import SHORT_CUT, ShortCut

logger = logging.getLogger(CALLS)

REQUEST_ID_HEADER = "X-Request-ID"
SERVER_TIMING = "Server-Timing"
# What a load balancer may call a request; anything else could write into our log.
GIVEN_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
# nginx's word for a client that left before its answer; fal uses it as well.
CLIENT_LEFT = 499

STARTED = web.RequestKey("falproxy.started", float)


def observe(metrics: Metrics, short_cut: ShortCut | None = None) -> Middleware:
    """Middleware: gives the request its id; counts and logs the call when its answer is out."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if short_cut is not None and len(request.match_info.apps) == 1:
            request[SHORT_CUT] = short_cut
        request[REQUEST_ID] = name_request(request)
        request[STARTED] = time.perf_counter()
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


def name_request(request: web.Request) -> str:
    """The id that the client or its load balancer gave the request, else a new one."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if GIVEN_ID.fullmatch(given) else new_name()


def end_call(
    metrics: Metrics, request: web.Request, status: int, seconds: float, complete: bool
) -> None:
    """seconds: until the answer began; what comes after it is as fast as fal and the client are."""
    metrics.in_progress -= 1
    call, upstream = request.get(CALL), request.get(UPSTREAM_SECONDS)
    cache, error, told = request.get(CACHE), request.get(ERROR_CODE), request.get(REHOST)
    metrics.count(
        call.target.operation if call else NO_OPERATION,
        status,
        cache or "",
        seconds if upstream is None else seconds - upstream,
        upstream,
    )
    if error is not None:
        metrics.fail(error)
    if told is not None:
        metrics.keep(told)
    failed = error is not None and status >= web.HTTPInternalServerError.status_code
    level = logging.WARNING if failed else logging.INFO
    if not logger.isEnabledFor(level):
        return
    # Names and numbers only, never a header, a body, a query or a key.
    fields = {
        "request_id": request[REQUEST_ID],
        "method": request.method,
        "principal": request.get(PRINCIPAL),
        "operation": call.target.operation.value if call else None,
        "endpoint": call.target.endpoint if call else None,
        "status": status,
        "error": error,
        "cache": cache,
        "rehost": told,
        "complete": complete,
        "seconds": round(seconds_of(request), 6),
        "upstream_seconds": round(upstream or 0.0, 6),
    }
    log_call(level, fields)


def log_call(level: int, fields: Mapping[str, object]) -> None:
    """The line."""
    if (lines := call_lines(logger)) is not None:
        lines.take(logger, level, fields)
    else:
        logger.log(level, "call", extra={"fields": fields})


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


def signature(request: web.BaseRequest) -> tuple[tuple[str, str], tuple[str, str]]:
    """The request's id, and what took how long."""
    upstream = request.get(UPSTREAM_SECONDS, 0.0)
    ours = seconds_of(request) - upstream
    timing = f"falproxy;dur={ours * 1e3:.2f}, fal;dur={upstream * 1e3:.2f}"
    return (REQUEST_ID_HEADER, request[REQUEST_ID]), (SERVER_TIMING, timing)
