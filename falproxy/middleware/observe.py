"""One log line a call, and what every answer says about itself."""

import asyncio
import logging
import re
import time
from dataclasses import dataclass, field
from functools import partial
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.call import CALL, ERROR_CODE, REQUEST_ID
from falproxy.proxy import UpstreamResponse

logger = logging.getLogger("falproxy.calls")

REQUEST_ID_HEADER = "X-Request-ID"
SERVER_TIMING = "Server-Timing"
# What a load balancer may call a request; anything else could write into our log.
GIVEN_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
# nginx's word for a client that left before its answer; fal uses it as well.
CLIENT_LEFT = 499


@dataclass(slots=True)
class Observation:
    """What is known of one request so far. Seconds; `waited` is fal's share of them."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


OBSERVATION = web.RequestKey("falproxy.observation", Observation)


def observe() -> Middleware:
    """Middleware: gives the request its id, and logs the call when its answer is out."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = name_request(request)
        observation = request[OBSERVATION] = Observation()
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            log_call(request, CLIENT_LEFT, complete=False)
            raise
        if isinstance(response, UpstreamResponse):
            observation.waited = response.waited
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
    call, observation = request.get(CALL), request[OBSERVATION]
    error = request.get(ERROR_CODE)
    fields = {
        "request_id": request[REQUEST_ID],
        "method": request.method,
        "operation": call.target.operation if call else None,
        "endpoint": call.target.endpoint if call else None,
        "status": status,
        "error": error,
        "complete": complete,
        "seconds": round(observation.seconds, 6),
        "upstream_seconds": round(observation.waited, 6),
    }
    failed = error is not None and status >= web.HTTPInternalServerError.status_code
    logger.log(logging.WARNING if failed else logging.INFO, "call", extra={"fields": fields})


async def sign_answer(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Puts request id and timings on the answer to an observed request (`on_response_prepare`)."""
    observation = request.get(OBSERVATION)
    if observation is None:
        return
    if isinstance(response, UpstreamResponse):
        response.drop_defaults()
    ours = observation.seconds - observation.waited
    response.headers.setdefault(REQUEST_ID_HEADER, request[REQUEST_ID])
    response.headers.add(
        SERVER_TIMING, f"falproxy;dur={ours * 1e3:.2f}, fal;dur={observation.waited * 1e3:.2f}"
    )
