"""Results for clients that do not queue: their calls are submitted, waited for and fetched here.

Every step takes the same way as a client's own would, so that access, cache and re-hosting are
the same for all. A busy account makes such a call wait, where a direct one would be refused.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from multidict import CIMultiDict, CIMultiDictProxy
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from tenacity.wait import wait_base

from falproxy.background import Background
from falproxy.errors import ProxyError
from falproxy.fal.policy import app_of
from falproxy.fal.target import QUEUE_HOST, Target
from falproxy.proxy.call import CACHE_OUTCOME, CALL, UPSTREAM_SECONDS, Call
from falproxy.proxy.forward import DOCUMENT_MAX, RelayedResponse
from falproxy.proxy.local_responses import CACHE_STATUS, LocalDocument
from falproxy.proxy.queue_job import INGRESS_ERRORS, is_completed
from falproxy.spool import Spool, spool_body
from falproxy.stores.cache.eligibility import parse_submit_response

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
RETRY_BACKOFF = wait_exponential(min=2, max=30)
# Seconds between two looks at a job, which grow from the first to the last.
POLL_INTERVAL_MIN, POLL_INTERVAL_MAX, POLL_INTERVAL_GROWTH = 0.1, 1.0, 1.3
# Of a client's headers, those that mean the same for the calls that are made for it.
FORWARDED_REQUEST_HEADERS = (hdrs.CACHE_CONTROL, hdrs.USER_AGENT, "traceparent", "tracestate")
# What the answer to a submit says of its result.
RESULT_HEADERS = (CACHE_STATUS, hdrs.AGE)
# fal's answers to who asks for a status and will not be told. Any other tells nothing of the job.
STATUS_DENIED = (401, 403, 404)
# Headers of what fal says about a job, and answers that say nothing of it without them.
JOB_HEADERS = {"x-fal-request-id", "x-fal-error-type"}
NOT_FROM_FAL = (401, 403, 429, 502, 503, 504)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BufferedResponse:
    """What became of one call: fal's result, or why there is none.

    request_id: of the job; None where fal took none.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitPolicy:
    """How long is waited, in seconds. total: for all calls of a request. wait: between attempts
    at a step that failed. goodbyes: where jobs are cancelled whose clients have left."""

    total: float
    background: Background
    retry_wait: wait_base = RETRY_BACKOFF


def submit_call(endpoint: str, body: bytes, headers: Mapping[str, str]) -> Call:
    """A submit of an endpoint. headers: the client's."""
    passed = {name: headers[name] for name in FORWARDED_REQUEST_HEADERS if name in headers}
    return Call(
        hdrs.METH_POST,
        Target(QUEUE_HOST, f"/{endpoint}", ""),
        CIMultiDictProxy(CIMultiDict(passed | {"Content-Type": "application/json"})),
        body=Spool(body).chunks(),
        length=len(body),
        needs_identity=True,
    )


@dataclass(slots=True)
class QueuedJob:
    """A job that fal has taken. is_kept: whether its result is kept, whoever waits for it. said:
    headers of the answer that are the result's too."""

    app: str
    request_id: str
    is_shared: bool
    result_headers: Mapping[str, str] = field(default_factory=dict)
    is_done: bool = False

    def target(self, suffix: str) -> Target:
        return Target(QUEUE_HOST, f"/{self.app}/requests/{self.request_id}{suffix}", "")


class RetryableError(Exception):
    """A step that may be made again. status: None where there was no answer."""

    def __init__(self, cause: ProxyError | BufferedResponse) -> None:
        super().__init__("a step failed that may be made again")
        self.cause = cause


class QueueClient:
    """One request's way through the queue."""

    def __init__(self, request: web.Request, handler: Handler, wait_policy: WaitPolicy) -> None:
        self._request = request
        self._app = request.app
        self._handler = handler
        self._wait_policy = wait_policy
        self._headers = CIMultiDictProxy(CIMultiDict[str]())
        self._is_accepted = False  # whether fal has taken a job
        self._main_call: Call | None = None  # what the request is about, whatever is asked after it

    async def submit_and_wait(self, calls: Sequence[Call]) -> list[BufferedResponse]:
        """What became of each call, in their order; only of the first that failed if one did. All
        are in the queue before the first is waited for.

        Raises: ProxyError 504 `upstream_timeout`, and what the way raises.
        """
        started = time.perf_counter()
        tickets: list[QueuedJob] = []
        try:
            async with asyncio.timeout(self._wait_policy.total):
                return await self._submit_and_wait_all(calls, tickets)
        except TimeoutError:
            message = f"fal.ai timed out after {self._wait_policy.total:g} s."
            raise ProxyError(504, "upstream_timeout", message) from None
        finally:
            self._request[UPSTREAM_SECONDS] = time.perf_counter() - started
            self.cancel_unfinished(tickets)

    async def submit(self, call: Call) -> QueuedJob | BufferedResponse:
        """The job that fal takes, or its refusal. Made again only where fal took none for sure.

        Raises: ProxyError.
        """
        content = await spool_body(call.body or Spool().chunks())

        async def attempt() -> QueuedJob | BufferedResponse:
            answer = await self._send(replace(call, body=content.chunks()), is_idempotent=False)
            request = parse_submit_response(answer.body) if answer.status == 200 else None
            if request is None:
                return answer
            app = request[1] or app_of(call.target.path.strip("/"))
            self._is_accepted = True
            said = {name: answer.headers[name] for name in RESULT_HEADERS if name in answer.headers}
            return QueuedJob(app, request[0], is_shared=self._is_shared, result_headers=said)

        return await self._with_retries(attempt)

    async def poll_done(self, job: QueuedJob) -> bool:
        """Whether a job has ended, or fal does not know it. Raises: ProxyError."""
        status = await self._with_retries(partial(self._get, job.target("/status")))
        return is_completed(status.body) or status.status in STATUS_DENIED

    async def wait_result(self, job: QueuedJob) -> BufferedResponse:
        """Waits for a job's end, and fetches what came of it. Raises: ProxyError."""
        pause = POLL_INTERVAL_MIN
        while not await self.poll_done(job):
            await asyncio.sleep(pause)
            pause = min(POLL_INTERVAL_MAX, pause * POLL_INTERVAL_GROWTH)
        answer = await self._with_retries(partial(self._get, job.target("")))
        if answer.status in NOT_FROM_FAL and not JOB_HEADERS & {*map(str.lower, answer.headers)}:
            raise result_unavailable()
        job.is_done = True
        told = {name: text for name, text in answer.headers.items() if name not in RESULT_HEADERS}
        headers = CIMultiDict({**told, **job.result_headers})
        return replace(answer, request_id=job.request_id, headers=headers)

    def detach_from_request(self) -> None:
        """Goes on after the request was answered. aiohttp has it belong to the outermost of nested
        applications by then, which is not ours."""
        self._request.match_info.current_app = self._app

    async def _submit_and_wait_all(
        self, calls: Sequence[Call], jobs: list[QueuedJob]
    ) -> list[BufferedResponse]:
        for call in calls:
            taking = asyncio.get_running_loop().create_task(self.submit(call))
            try:
                ticket = await asyncio.shield(taking)
            except asyncio.CancelledError:
                self._wait_policy.background.spawn(self._cancel_when_accepted(taking))
                raise
            if isinstance(ticket, BufferedResponse):
                return [ticket]
            jobs.append(ticket)
        answers = []
        for ticket in jobs:
            answer = await self.wait_result(ticket)
            if answer.status != web.HTTPOk.status_code:
                return [answer]
            answers.append(answer)
        return answers

    @property
    def _is_shared(self) -> bool:
        """Whether the last call's result is kept for others, and finished whoever leaves."""
        return self._request.get(CACHE_OUTCOME) in ("hit", "miss", "collapsed")

    async def _with_retries(self, step: Callable[[], Awaitable[T]]) -> T:
        attempts = AsyncRetrying(
            stop=stop_after_attempt(MAX_ATTEMPTS),
            wait=self._wait_policy.retry_wait,
            retry=retry_if_exception_type(RetryableError),
            reraise=True,
        )
        try:
            return await attempts(step)
        except RetryableError as error:
            if isinstance(error.cause, ProxyError):
                raise (result_unavailable() if self._is_accepted else error.cause) from None
            return error.cause  # type: ignore[return-value]  # the last answer is the answer

    async def _get(self, target: Target) -> BufferedResponse:
        call = Call(hdrs.METH_GET, target, self._headers, needs_identity=True)
        return await self._send(call, is_idempotent=True)

    async def _send(self, call: Call, *, is_idempotent: bool) -> BufferedResponse:
        """One step. is_safe: whether it may be made again though fal may have heard of it.

        Raises: RetryableError, ProxyError.
        """
        self._main_call = self._main_call or call
        self._request[CALL] = call
        try:
            answer = await read_response(await self._handler(self._request))
        except ProxyError as error:
            if error.code == "upstream_unreachable" or (is_idempotent and error.status >= 500):
                raise RetryableError(error) from error
            raise
        finally:
            self._request[CALL] = self._main_call
        if answer.status == web.HTTPTooManyRequests.status_code or (
            is_idempotent
            and answer.status in INGRESS_ERRORS
            and "x-fal-request-id" not in answer.headers
        ):
            raise RetryableError(answer)
        return answer

    def cancel_unfinished(self, jobs: Sequence[QueuedJob]) -> None:
        """Cancels what nobody waits for any more, and nobody else can have."""
        left = [ticket for ticket in jobs if not ticket.is_done and not ticket.is_shared]
        if left:
            self._wait_policy.background.spawn(self._cancel(left))

    async def _cancel_when_accepted(
        self, submission: asyncio.Task[QueuedJob | BufferedResponse]
    ) -> None:
        """Gives a job up that fal was just taking: its id comes with the answer only."""
        self.detach_from_request()
        with suppress(ProxyError):
            if isinstance(ticket := await submission, QueuedJob):
                self.cancel_unfinished([ticket])

    async def _cancel(self, jobs: Sequence[QueuedJob]) -> None:
        """One after the other: they share the request."""
        self.detach_from_request()
        for ticket in jobs:
            self._request[CALL] = Call(hdrs.METH_PUT, ticket.target("/cancel"), self._headers)
            try:
                await read_response(await self._handler(self._request))
            except ProxyError:
                logger.warning("A job that nobody waits for could not be cancelled")


def result_unavailable() -> ProxyError:
    """fal has taken a job, and its result cannot be had: who tries again buys another."""
    message = "fal.ai took the job, but its result cannot be fetched now."
    return ProxyError(500, "result_unavailable", message)


async def read_response(response: web.StreamResponse) -> BufferedResponse:
    """Raises: ProxyError 502, its body is too large or in a coding."""
    body: bytes | None = None
    if isinstance(response, RelayedResponse):
        body = await response.read(DOCUMENT_MAX)
        if body is None:
            response.discard()
    elif isinstance(response, LocalDocument):
        body = await response.document()
    if body is None:
        raise ProxyError(502, "upstream_unreadable", "fal.ai's answer is too large to be read.")
    return BufferedResponse(response.status, response.headers, body)
