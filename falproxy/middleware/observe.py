"""One log line a call, and what every answer says about itself."""

import asyncio
import logging
import re
import time
from functools import partial
from uuid import uuid4

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
from falproxy.proxy import UpstreamResponse

logger = logging.getLogger("falproxy.calls")

REQUEST_ID_HEADER = "X-Request-ID"
SERVER_TIMING = "Server-Timing"
# What a load balancer may call a request; anything else could write into our log.
GIVEN_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
# nginx's word for a client that left before its answer; fal uses it as well.
CLIENT_LEFT = 499

STARTED = web.RequestKey("falproxy.started", float)


def observe() -> Middleware:
    """Middleware: gives the request its id, and logs the call when its answer is out."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = name_request(request)
        request[STARTED] = time.perf_counter()
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            log_call(request, CLIENT_LEFT, complete=False)
            raise
        if isinstance(response, UpstreamResponse):
            response.on_sent = partial(log_call, request, response.status)
        else:
            log_call(request, response.status, complete=True)
        return response

    return middleware


def name_request(request: web.Request) -> str:
    """The id that the client or its load balancer gave the request, else a new one."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if GIVEN_ID.fullmatch(given) else uuid4().hex


def log_call(request: web.Request, status: int, complete: bool) -> None:
    """The line: names and numbers only, never a header, a body, a query or a key."""
    call, error = request.get(CALL), request.get(ERROR_CODE)
    fields = {
        "request_id": request[REQUEST_ID],
        "method": request.method,
        "principal": request.get(PRINCIPAL),
        "operation": call.target.operation if call else None,
        "endpoint": call.target.endpoint if call else None,
        "status": status,
        "error": error,
        "cache": request.get(CACHE),
        "rehost": request.get(REHOST),
        "complete": complete,
        "seconds": round(seconds_of(request), 6),
        "upstream_seconds": round(request.get(UPSTREAM_SECONDS, 0.0), 6),
    }
    failed = error is not None and status >= web.HTTPInternalServerError.status_code
    logger.log(logging.WARNING if failed else logging.INFO, "call", extra={"fields": fields})


def seconds_of(request: web.BaseRequest) -> float:
    """How long a request has been here."""
    return time.perf_counter() - request[STARTED]


async def sign_answer(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Puts request id and timings on the answer to an observed request (`on_response_prepare`)."""
    if STARTED not in request:
        return
    if isinstance(response, UpstreamResponse):
        response.drop_defaults()
    upstream = request.get(UPSTREAM_SECONDS, 0.0)
    ours = seconds_of(request) - upstream
    response.headers.setdefault(REQUEST_ID_HEADER, request[REQUEST_ID])
    response.headers.add(
        SERVER_TIMING, f"falproxy;dur={ours * 1e3:.2f}, fal;dur={upstream * 1e3:.2f}"
    )
