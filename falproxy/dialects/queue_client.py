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
from falproxy.proxy.call import CACHE, CALL, UPSTREAM_SECONDS, Call
from falproxy.proxy.forward import DOCUMENT_MAX, UpstreamResponse
from falproxy.proxy.local_responses import CACHE_STATUS, OwnDocument
from falproxy.proxy.queue_job import INGRESS_ERRORS, is_completed
from falproxy.spool import Spool, hold
from falproxy.stores.cache.eligibility import submitted_request

logger = logging.getLogger(__name__)

ATTEMPTS = 3
BETWEEN_ATTEMPTS = wait_exponential(min=2, max=30)
# Seconds between two looks at a job, which grow from the first to the last.
PAUSE_MIN, PAUSE_MAX, PAUSE_GROWTH = 0.1, 1.0, 1.3
# Of a client's headers, those that mean the same for the calls that are made for it.
PASSED_ON = (hdrs.CACHE_CONTROL, hdrs.USER_AGENT, "traceparent", "tracestate")
# What the answer to a submit says of its result.
OF_THE_RESULT = (CACHE_STATUS, hdrs.AGE)
# fal's answers to who asks for a status and will not be told. Any other tells nothing of the job.
UNTOLD = (401, 403, 404)
# Headers of what fal says about a job, and answers that say nothing of it without them.
OF_A_JOB = {"x-fal-request-id", "x-fal-error-type"}
NOT_ITS_WORD = (401, 403, 429, 502, 503, 504)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one call: fal's result, or why there is none.

    request_id: of the job; None where fal took none.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long is waited, in seconds. total: for all calls of a request. wait: between attempts
    at a step that failed. goodbyes: where jobs are cancelled whose clients have left."""

    total: float
    goodbyes: Background
    wait: wait_base = BETWEEN_ATTEMPTS


def call_of(endpoint: str, body: bytes, headers: Mapping[str, str]) -> Call:
    """A submit of an endpoint. headers: the client's."""
    passed = {name: headers[name] for name in PASSED_ON if name in headers}
    return Call(
        hdrs.METH_POST,
        Target(QUEUE_HOST, f"/{endpoint}", ""),
        CIMultiDictProxy(CIMultiDict(passed | {"Content-Type": "application/json"})),
        body=Spool(body).chunks(),
        length=len(body),
        is_document=True,
    )


@dataclass(slots=True)
class Ticket:
    """A job that fal has taken. is_kept: whether its result is kept, whoever waits for it. said:
    headers of the answer that are the result's too."""

    app: str
    request_id: str
    is_kept: bool
    said: Mapping[str, str] = field(default_factory=dict)
    is_over: bool = False

    def target(self, verb: str) -> Target:
        return Target(QUEUE_HOST, f"/{self.app}/requests/{self.request_id}{verb}", "")


class MayPass(Exception):
    """A step that may be made again. status: None where there was no answer."""

    def __init__(self, cause: ProxyError | Answer) -> None:
        super().__init__("a step failed that may be made again")
        self.cause = cause


class Waiting:
    """One request's way through the queue."""

    def __init__(self, request: web.Request, handler: Handler, patience: Patience) -> None:
        self._request = request
        self._app = request.app
        self._handler = handler
        self._patience = patience
        self._headers = CIMultiDictProxy(CIMultiDict[str]())
        self._is_accepted = False  # whether fal has taken a job
        self._first: Call | None = None  # what the request is about, whatever is asked after it

    async def results(self, calls: Sequence[Call]) -> list[Answer]:
        """What became of each call, in their order; only of the first that failed if one did. All
        are in the queue before the first is waited for.

        Raises: ProxyError 504 `upstream_timeout`, and what the way raises.
        """
        started = time.perf_counter()
        tickets: list[Ticket] = []
        try:
            async with asyncio.timeout(self._patience.total):
                return await self._all(calls, tickets)
        except TimeoutError:
            message = f"fal.ai timed out after {self._patience.total:g} s."
            raise ProxyError(504, "upstream_timeout", message) from None
        finally:
            self._request[UPSTREAM_SECONDS] = time.perf_counter() - started
            self.give_up(tickets)

    async def submit(self, call: Call) -> Ticket | Answer:
        """The job that fal takes, or its refusal. Made again only where fal took none for sure.

        Raises: ProxyError.
        """
        content = await hold(call.body or Spool().chunks())

        async def attempt() -> Ticket | Answer:
            answer = await self._make(replace(call, body=content.chunks()), is_safe=False)
            request = submitted_request(answer.body) if answer.status == 200 else None
            if request is None:
                return answer
            app = request[1] or app_of(call.target.path.strip("/"))
            self._is_accepted = True
            said = {name: answer.headers[name] for name in OF_THE_RESULT if name in answer.headers}
            return Ticket(app, request[0], is_kept=self._is_kept, said=said)

        return await self._patiently(attempt)

    async def is_over(self, ticket: Ticket) -> bool:
        """Whether a job has ended, or fal does not know it. Raises: ProxyError."""
        status = await self._patiently(partial(self._ask, ticket.target("/status")))
        return is_completed(status.body) or status.status in UNTOLD

    async def result(self, ticket: Ticket) -> Answer:
        """Waits for a job's end, and fetches what came of it. Raises: ProxyError."""
        pause = PAUSE_MIN
        while not await self.is_over(ticket):
            await asyncio.sleep(pause)
            pause = min(PAUSE_MAX, pause * PAUSE_GROWTH)
        answer = await self._patiently(partial(self._ask, ticket.target("")))
        if answer.status in NOT_ITS_WORD and not OF_A_JOB & {*map(str.lower, answer.headers)}:
            raise unavailable()
        ticket.is_over = True
        told = {name: text for name, text in answer.headers.items() if name not in OF_THE_RESULT}
        headers = CIMultiDict({**told, **ticket.said})
        return replace(answer, request_id=ticket.request_id, headers=headers)

    def stay(self) -> None:
        """Goes on after the request was answered. aiohttp has it belong to the outermost of nested
        applications by then, which is not ours."""
        self._request.match_info.current_app = self._app

    async def _all(self, calls: Sequence[Call], tickets: list[Ticket]) -> list[Answer]:
        for call in calls:
            taking = asyncio.get_running_loop().create_task(self.submit(call))
            try:
                ticket = await asyncio.shield(taking)
            except asyncio.CancelledError:
                self._patience.goodbyes.see_to(self._give_back(taking))
                raise
            if isinstance(ticket, Answer):
                return [ticket]
            tickets.append(ticket)
        answers = []
        for ticket in tickets:
            answer = await self.result(ticket)
            if answer.status != web.HTTPOk.status_code:
                return [answer]
            answers.append(answer)
        return answers

    @property
    def _is_kept(self) -> bool:
        """Whether the last call's result is kept for others, and finished whoever leaves."""
        return self._request.get(CACHE) in ("hit", "miss", "collapsed")

    async def _patiently(self, step: Callable[[], Awaitable[T]]) -> T:
        attempts = AsyncRetrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=self._patience.wait,
            retry=retry_if_exception_type(MayPass),
            reraise=True,
        )
        try:
            return await attempts(step)
        except MayPass as error:
            if isinstance(error.cause, ProxyError):
                raise (unavailable() if self._is_accepted else error.cause) from None
            return error.cause  # type: ignore[return-value]  # the last answer is the answer

    async def _ask(self, target: Target) -> Answer:
        call = Call(hdrs.METH_GET, target, self._headers, is_document=True)
        return await self._make(call, is_safe=True)

    async def _make(self, call: Call, *, is_safe: bool) -> Answer:
        """One step. is_safe: whether it may be made again though fal may have heard of it.

        Raises: MayPass, ProxyError.
        """
        self._first = self._first or call
        self._request[CALL] = call
        try:
            answer = await read(await self._handler(self._request))
        except ProxyError as error:
            if error.code == "upstream_unreachable" or (is_safe and error.status >= 500):
                raise MayPass(error) from error
            raise
        finally:
            self._request[CALL] = self._first
        if answer.status == web.HTTPTooManyRequests.status_code or (
            is_safe and answer.status in INGRESS_ERRORS and "x-fal-request-id" not in answer.headers
        ):
            raise MayPass(answer)
        return answer

    def give_up(self, tickets: Sequence[Ticket]) -> None:
        """Cancels what nobody waits for any more, and nobody else can have."""
        left = [ticket for ticket in tickets if not ticket.is_over and not ticket.is_kept]
        if left:
            self._patience.goodbyes.see_to(self._cancel(left))

    async def _give_back(self, taking: asyncio.Task[Ticket | Answer]) -> None:
        """Gives a job up that fal was just taking: its id comes with the answer only."""
        self.stay()
        with suppress(ProxyError):
            if isinstance(ticket := await taking, Ticket):
                self.give_up([ticket])

    async def _cancel(self, tickets: Sequence[Ticket]) -> None:
        """One after the other: they share the request."""
        self.stay()
        for ticket in tickets:
            self._request[CALL] = Call(hdrs.METH_PUT, ticket.target("/cancel"), self._headers)
            try:
                await read(await self._handler(self._request))
            except ProxyError:
                logger.warning("A job that nobody waits for could not be cancelled")


def unavailable() -> ProxyError:
    """fal has taken a job, and its result cannot be had: who tries again buys another."""
    message = "fal.ai took the job, but its result cannot be fetched now."
    return ProxyError(500, "result_unavailable", message)


async def read(response: web.StreamResponse) -> Answer:
    """Raises: ProxyError 502, its body is too large or in a coding."""
    body: bytes | None = None
    if isinstance(response, UpstreamResponse):
        body = await response.read(DOCUMENT_MAX)
        if body is None:
            response.drop()
    elif isinstance(response, OwnDocument):
        body = await response.document()
    if body is None:
        raise ProxyError(502, "upstream_unreadable", "fal.ai's answer is too large to be read.")
    return Answer(response.status, response.headers, body)
