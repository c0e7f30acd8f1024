"""Client of fal's queue, for dialects whose clients do not use the queue themselves.

It submits calls, polls their status and fetches their results. Each step passes the same middleware
as a client's own request, so that access control, result cache and re-hosting apply. If the fal
account has reached its concurrency limit, a queued call waits where a direct call would be refused.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Protocol, TypeVar

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from multidict import CIMultiDict, CIMultiDictProxy, MultiMapping
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from tenacity.wait import wait_base

from falproxy.background import Background
from falproxy.errors import CONCURRENCY_LIMITED, CallerRefusal, ProxyError
from falproxy.fal.policy import app_of
from falproxy.fal.pricing import format_usd
from falproxy.fal.queue_documents import QueueState, parse_queue_state, parse_submit_response
from falproxy.fal.tags import TAGS_HEADER
from falproxy.fal.target import QUEUE_HOST, Target
from falproxy.proxy.call import (
    CACHE_OUTCOME,
    CALL,
    FOLLOWING_INPUTS,
    JOB_ID,
    RATES_COUNTED,
    UPSTREAM_SECONDS,
    Call,
)
from falproxy.proxy.forward import DOCUMENT_MAX, RelayedResponse
from falproxy.proxy.idempotency_key import CALL_NUMBER, has_idempotency_key
from falproxy.proxy.local_responses import CACHE_STATUS, LocalDocument
from falproxy.proxy.prices import COST_HEADER, SAVED_HEADER
from falproxy.proxy.queue_job import is_gateway_error
from falproxy.spool import Spool, spool_body

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
RETRY_BACKOFF = wait_exponential(min=2, max=30)
# Seconds between two status polls of a job: the first interval, the limit, the factor of growth.
POLL_INTERVAL_MIN, POLL_INTERVAL_MAX, POLL_INTERVAL_GROWTH = 0.1, 1.0, 1.3
# Seconds until the result of an abandoned job is asked for, since fal has to cancel it first, and
# until it is no longer awaited.
OUTCOME_DELAY, OUTCOME_TIMEOUT = 2.0, 600.0
# Headers of the client's request that each of its calls is sent with.
FORWARDED_REQUEST_HEADERS = (
    hdrs.CACHE_CONTROL, hdrs.USER_AGENT, "traceparent", "tracestate", TAGS_HEADER,
)  # fmt: skip
# Headers of the response to a submit that describe the result.
RESULT_HEADERS = (CACHE_STATUS, hdrs.AGE, SAVED_HEADER)
FREE = format_usd(0)
# Responses of fal to a status poll after which polling ends. Others do not describe the job.
END_POLLING_STATUSES = (401, 403, 404)
# Responses with these statuses describe the job only if they have one of these headers.
JOB_HEADERS = {"x-fal-request-id", "x-fal-error-type"}
NOT_FROM_FAL = (401, 403, 429, 502, 503, 504)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BufferedResponse:
    """The final response to one call, read completely: fal's result or fal's error.

    request_id: the id of the job; None if fal did not accept the call.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitPolicy:
    """How a QueueClient waits.

    total: seconds for all calls of a request together.
    background: runs the cancellation of jobs after their clients have disconnected.
    retry_wait: pause between attempts at a failed step.
    """

    total: float
    background: Background
    retry_wait: wait_base = RETRY_BACKOFF


class CallBody(Protocol):
    """A body that can be read in pieces. size: bytes."""

    size: int

    def chunks(self) -> AsyncIterator[bytes]: ...


def submit_call(endpoint: str, body: bytes | CallBody, headers: MultiMapping[str]) -> Call:
    """Create the call that submits a job.

    body: JSON.
    headers: of the client's request; only FORWARDED_REQUEST_HEADERS are used.
    """
    forwarded = CIMultiDict(
        (name, value) for name in FORWARDED_REQUEST_HEADERS for value in headers.getall(name, ())
    )
    forwarded[hdrs.CONTENT_TYPE] = "application/json"
    content = Spool(body) if isinstance(body, bytes) else body
    return Call(
        hdrs.METH_POST,
        Target(QUEUE_HOST, f"/{endpoint}", ""),
        CIMultiDictProxy(forwarded),
        body=content.chunks(),
        length=content.size,
        needs_identity=True,
    )


@dataclass(slots=True)
class QueuedJob:
    """A job that fal has accepted.

    is_shared: other requests may use the result, so the job must not be cancelled.
    result_headers: headers of the submit's response that belong to the result. The cost is that of
        the result, if it is known.
    is_done: the result has been fetched.
    """

    app: str
    request_id: str
    is_shared: bool
    result_headers: Mapping[str, str] = field(default_factory=dict)
    is_done: bool = False

    def target(self, suffix: str, query: str = "") -> Target:
        return Target(QUEUE_HOST, f"/{self.app}/requests/{self.request_id}{suffix}", query)


class RetryableError(Exception):
    """A failure of a step that may be repeated.

    cause: fal's response, or the ProxyError if there was none.
    """

    def __init__(self, cause: ProxyError | BufferedResponse) -> None:
        super().__init__("a step failed and may be repeated")
        self.cause = cause


class QueueClient:
    """Runs the calls of one client request through fal's queue.

    request: the client's request.
    handler: the rest of the middleware pipeline, which sends a call to fal.
    """

    def __init__(self, request: web.Request, handler: Handler, wait_policy: WaitPolicy) -> None:
        self._request = request
        self._app = request.app
        self._handler = handler
        self._wait_policy = wait_policy
        self._headers = CIMultiDictProxy(CIMultiDict[str]())
        self._is_accepted = False  # fal has accepted a job
        self._main_call: Call | None = None  # the first submit, for log and metrics
        self._submit_numbers = count()

    async def submit_and_wait(
        self, calls: Sequence[Call], inputs: Sequence[Mapping[str, object]] = ()
    ) -> list[BufferedResponse]:
        """Return the final responses in the order of the calls. If a call fails, return only its
        response. All calls are submitted before the first result is awaited, as far as the limit on
        calls under way admits them.

        inputs: of each call, if there are several.

        Raises: ProxyError 504 `upstream_timeout`, and the errors of the middleware.
        """
        started = time.perf_counter()
        jobs: list[QueuedJob] = []
        try:
            async with asyncio.timeout(self._wait_policy.total):
                return await self._submit_and_wait_all(calls, inputs, jobs)
        except TimeoutError:
            message = f"fal.ai timed out after {self._wait_policy.total:g} s."
            raise ProxyError(504, "upstream_timeout", message) from None
        finally:
            self._request[UPSTREAM_SECONDS] = time.perf_counter() - started
            self.cancel_unfinished(jobs)

    async def submit(self, call: Call) -> QueuedJob | BufferedResponse:
        """Submit a call. Return the job, or fal's response if fal does not accept the call.

        A submit is repeated only if it is certain that fal did not accept it.
        Raises: ProxyError.
        """
        content = await spool_body(call.body or Spool().chunks())
        return await self._submit(call, content, next(self._submit_numbers))

    async def _submit(
        self, call: Call, content: Spool, number: int
    ) -> QueuedJob | BufferedResponse:
        """As `submit`. number: of the call among those of the request."""

        async def attempt() -> QueuedJob | BufferedResponse:
            self._request[CALL_NUMBER] = number
            response = await self._send(replace(call, body=content.chunks()), is_idempotent=False)
            submitted = parse_submit_response(response.body) if response.status == 200 else None
            if submitted is None:
                return response
            self._is_accepted = True
            self._request[JOB_ID] = submitted[0]
            headers = {
                name: response.headers[name]
                for name in (*RESULT_HEADERS, COST_HEADER)
                if name in response.headers
            }
            return QueuedJob(
                app=submitted[1] or app_of(call.target.path.strip("/")),
                request_id=submitted[0],
                is_shared=self._is_shared,
                result_headers=headers,
            )

        return await self._with_retries(attempt)

    async def poll_done(self, job: QueuedJob) -> bool:
        """Return True if a job has ended, or does not exist at fal. Raises: ProxyError."""
        return (await self.poll(job)).is_completed

    async def poll(self, job: QueuedJob, *, with_logs: bool = False) -> QueueState:
        """Return the state of a job; one that does not exist at fal counts as completed.

        Raises: ProxyError.
        """
        target = job.target("/status", "?logs=1" if with_logs else "")
        status = await self._with_retries(partial(self._get, target))
        if status.status in END_POLLING_STATUSES:
            return QueueState(is_started=True, is_completed=True)
        return parse_queue_state(status.body)

    async def wait_result(self, job: QueuedJob) -> BufferedResponse:
        """Poll a job until it ends, and fetch its result. Raises: ProxyError."""
        pause = POLL_INTERVAL_MIN
        while not await self.poll_done(job):
            await asyncio.sleep(pause)
            pause = min(POLL_INTERVAL_MAX, pause * POLL_INTERVAL_GROWTH)
        return await self.fetch_result(job)

    async def fetch_result(self, job: QueuedJob) -> BufferedResponse:
        """Fetch the result of a job that has ended. Raises: ProxyError."""
        response = await self._with_retries(partial(self._get, job.target("")))
        names = {*map(str.lower, response.headers)}
        if response.status in NOT_FROM_FAL and not JOB_HEADERS & names:
            raise result_unavailable()
        job.is_done = True
        # The cost of a job that this request has not bought stays 0, whatever fal charged for it.
        is_free = job.result_headers.get(COST_HEADER) == FREE
        kept = (*RESULT_HEADERS, COST_HEADER) if is_free else RESULT_HEADERS
        headers = {name: value for name, value in response.headers.items() if name not in kept}
        return replace(
            response,
            request_id=job.request_id,
            headers=CIMultiDict({**job.result_headers, **headers}),
        )

    async def cancel(self, job: QueuedJob) -> BufferedResponse:
        """Ask fal to cancel a job, and return its response. Raises: ProxyError."""
        call = Call(hdrs.METH_PUT, job.target("/cancel"), self._headers, needs_identity=True)
        return await self._with_retries(partial(self._send, call, is_idempotent=True))

    def detach_from_request(self) -> None:
        """Prepare for calls after the client's request has ended. By then aiohttp has set the
        request's application to the outermost of nested applications; restore this one."""
        self._request.match_info.current_app = self._app

    async def _submit_and_wait_all(
        self,
        calls: Sequence[Call],
        inputs: Sequence[Mapping[str, object]],
        jobs: list[QueuedJob],
    ) -> list[BufferedResponse]:
        responses: list[BufferedResponse] = []
        for number, call in enumerate(calls):
            self._request[FOLLOWING_INPUTS] = inputs[number + 1 :]
            content = await spool_body(call.body or Spool().chunks())
            while (job := await self._submit_if_admitted(call, content, jobs)) is None:
                # The places of this request's own jobs are free once their results are read.
                if len(responses) == len(jobs):
                    await asyncio.sleep(POLL_INTERVAL_MAX)
                    continue
                responses.append(await self.wait_result(jobs[len(responses)]))
                if responses[-1].status != web.HTTPOk.status_code:
                    return [responses[-1]]
            if isinstance(job, BufferedResponse):
                return [job]
            jobs.append(job)
        for job in jobs[len(responses) :]:
            response = await self.wait_result(job)
            if response.status != web.HTTPOk.status_code:
                return [response]
            responses.append(response)
        return responses

    async def _submit_if_admitted(
        self, call: Call, content: Spool, jobs: Sequence[QueuedJob]
    ) -> QueuedJob | BufferedResponse | None:
        """Submit a call. None if there are jobs of this request, which are paid for, and the call
        has to wait until fewer calls are under way."""
        submission = asyncio.get_running_loop().create_task(self._submit(call, content, len(jobs)))
        try:
            return await asyncio.shield(submission)
        except asyncio.CancelledError:
            self._wait_policy.background.spawn(self._cancel_when_accepted(submission))
            raise
        except CallerRefusal as refusal:
            if refusal.code != CONCURRENCY_LIMITED or not jobs:
                raise
            self._request[RATES_COUNTED] = True
            return None

    @property
    def _is_shared(self) -> bool:
        """True if the job of the last submit may serve other requests: through the result cache, or
        the client's own retry with an Idempotency-Key."""
        if has_idempotency_key(self._request):
            return True
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
            return error.cause  # type: ignore[return-value]  # the response of the last attempt

    async def _get(self, target: Target) -> BufferedResponse:
        call = Call(hdrs.METH_GET, target, self._headers, needs_identity=True)
        return await self._send(call, is_idempotent=True)

    async def _send(self, call: Call, *, is_idempotent: bool) -> BufferedResponse:
        """Send one call through the middleware.

        is_idempotent: the call may be repeated even if fal may have received it.
        Raises: RetryableError, ProxyError.
        """
        self._main_call = self._main_call or call
        self._request[CALL] = call
        try:
            response = await read_response(await self._handler(self._request))
        except ProxyError as error:
            if error.code == "upstream_unreachable" or (is_idempotent and error.status >= 500):
                raise RetryableError(error) from error
            raise
        finally:
            self._request[CALL] = self._main_call
        if is_idempotent:
            is_retryable = is_gateway_error(response.status, response.headers)
        else:
            is_retryable = response.status == web.HTTPTooManyRequests.status_code
        if is_retryable:
            raise RetryableError(response)
        return response

    def cancel_unfinished(self, jobs: Sequence[QueuedJob]) -> None:
        """Cancel, in the background, the jobs that are neither done nor shared."""
        unfinished = [job for job in jobs if not job.is_done and not job.is_shared]
        if unfinished:
            self._wait_policy.background.spawn(self._cancel(unfinished))

    async def _cancel_when_accepted(
        self, submission: asyncio.Task[QueuedJob | BufferedResponse]
    ) -> None:
        """Cancel a job whose submit is still in progress. The response to the submit is awaited
        first, because it has the id of the job."""
        self.detach_from_request()
        with suppress(ProxyError):
            if isinstance(job := await submission, QueuedJob):
                self.cancel_unfinished([job])

    async def _cancel(self, jobs: Sequence[QueuedJob]) -> None:
        """Cancel jobs one after the other, because all calls share the request object."""
        self.detach_from_request()
        for job in jobs:
            self._request[CALL] = Call(hdrs.METH_PUT, job.target("/cancel"), self._headers)
            try:
                await read_response(await self._handler(self._request))
            except ProxyError:
                logger.warning("An abandoned job could not be cancelled")
        self.read_outcomes(jobs)

    def read_outcomes(self, jobs: Sequence[QueuedJob]) -> None:
        """Read, in the background, the results of jobs that no client waits for: the ledger has
        their costs from there."""
        self._wait_policy.background.spawn(self._read_outcomes(jobs), cancel_on_close=True)

    async def _read_outcomes(self, jobs: Sequence[QueuedJob]) -> None:
        self.detach_from_request()
        await asyncio.sleep(OUTCOME_DELAY)
        for job in jobs:
            try:
                async with asyncio.timeout(OUTCOME_TIMEOUT):
                    await self.wait_result(job)
            except (ProxyError, TimeoutError):
                logger.info("The outcome of an abandoned job could not be read")


def result_unavailable() -> ProxyError:
    """Return the error for a job that fal accepted, and whose result cannot be fetched. A retry of
    the request would start, and be charged for, a second job."""
    message = "fal.ai accepted the job, but its result cannot be fetched now."
    return ProxyError(500, "result_unavailable", message)


async def read_response(response: web.StreamResponse) -> BufferedResponse:
    """Read a response of the pipeline completely.

    Raises: ProxyError 502, the body is too large or has a content coding.
    """
    body: bytes | None = None
    if isinstance(response, RelayedResponse):
        body = await response.read(DOCUMENT_MAX)
        if body is None:
            response.discard()
    elif isinstance(response, LocalDocument):
        body = await response.document()
    if body is None:
        raise ProxyError(502, "upstream_unreadable", "fal.ai's response is too large to be read.")
    return BufferedResponse(response.status, response.headers, body)
