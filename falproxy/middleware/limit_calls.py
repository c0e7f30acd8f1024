"""Middleware of the limits: admits model calls, and ends their reservations.

Rates are counted for every model call, also for one that the result cache responds to. Concurrency
and budgets are reserved for calls that are sent to fal.
"""

import asyncio
import logging
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import CallerRefusal, ProxyError
from falproxy.fal.estimates import call_inputs
from falproxy.fal.live import session_inputs
from falproxy.fal.policy import app_of, creates_token, model_of, normalized_path
from falproxy.fal.pricing import Price
from falproxy.fal.queue_documents import parse_submit_response
from falproxy.fal.target import Operation
from falproxy.limit_settings import LimitSettings
from falproxy.metrics import Metrics
from falproxy.middleware.accounting import POSSIBLY_PAID_ERRORS
from falproxy.middleware.call_limits import (
    CALL_LIMITS,
    ON_ADMITTED,
    ScopedLimit,
    call_cost,
    limits_of,
    refusal,
    too_many_calls,
)
from falproxy.middleware.image_inputs import INSPECTED_INPUT, NEEDS_INPUT, NOT_INSPECTED
from falproxy.middleware.job_costs import JobDetails, actual_cost, mark_cancelled
from falproxy.middleware.job_ends import current_headers, is_final, upstream_headers
from falproxy.middleware.limiter import CallReservation, Limiter, LimitsUnavailable
from falproxy.middleware.live_reservations import attach_session, first_seconds
from falproxy.proxy.call import CALL, FOLLOWING_INPUTS, OPENED_SESSION, PRINCIPAL, RATES_COUNTED
from falproxy.proxy.forward import RelayedResponse, add_headers
from falproxy.proxy.head_only import NEEDS_EVERY_REQUEST, any_request_id
from falproxy.proxy.limit_fields import rate_limit_fields, report_limits
from falproxy.proxy.local_responses import FAL_REQUEST_ID
from falproxy.proxy.prices import PriceBook, PriceUnavailable
from falproxy.stores.limits import Admission

logger = logging.getLogger(__name__)

EVENT_STREAM = "text/event-stream"
WARNING_SHARE = 0.8  # of a budget
TOKEN = "models with a token"  # instead of an endpoint, in a refusal


@dataclass(frozen=True, slots=True)
class LimitPolicy:
    """The parts that the middleware of the limits uses."""

    limiter: Limiter
    prices: PriceBook
    settings: LimitSettings
    metrics: Metrics
    live_max_seconds: float | None = None  # of a session of live video

    def check(
        self,
        request: web.Request,
        limits: Sequence[ScopedLimit],
        admission: Admission,
        amount: int = 0,
    ) -> None:
        """Record the rest of each limit. Raises: CallerRefusal, one of them is exceeded."""
        pairs = list(zip(limits, admission.states, strict=True))
        is_refused = admission.refused is not None
        # How much all callers together have spent is not shown to each of them.
        report_limits(request, (own.report(state) for own, state in pairs if own.scope != "total"))
        for own, state in pairs:
            if own.limit.kind == "budget":
                share = state.used / own.limit.maximum if own.limit.maximum else 1.0
                self.metrics.record_budget(own.scope, own.limit.subject, share, state.seconds)
                threshold = WARNING_SHARE * own.limit.maximum
                if not is_refused and state.used - amount < threshold <= state.used:
                    warn_of_budget(request, own)
        if admission.refused is not None:
            refused, state = pairs[admission.refused]
            self.metrics.record_limited(refused.limit.kind, refused.scope)
            raise refusal(refused, state, amount)

    async def check_following(
        self, request: web.Request, limits: Sequence[ScopedLimit], calls: int, amount: int = 0
    ) -> None:
        """Refuse a call if those that the request makes after it would not be admitted, so that
        nothing is bought for a request that fails.

        calls, amount: number and cost of all of them. Raises: CallerRefusal.
        """
        try:
            states = await self.limiter.count([own.limit for own in limits])
        except LimitsUnavailable:  # whether a call passes then is decided when it is admitted
            return
        for own, state in zip(limits, states, strict=True):
            is_budget = own.limit.kind == "budget"
            if state.used + (amount if is_budget else calls) > own.limit.maximum:
                self.metrics.record_limited(own.limit.kind, own.scope)
                if not is_budget and calls > own.limit.maximum:
                    raise too_many_calls(own, calls)
                raise refusal(own, state, amount)


def warn_of_budget(request: web.Request, own: ScopedLimit) -> None:
    fields = {"scope": own.scope, "principal": request.get(PRINCIPAL)}
    logger.warning("A budget is used up to %d %%", WARNING_SHARE * 100, extra={"fields": fields})


def add_limit_fields() -> Middleware:
    """Middleware: add the fields `RateLimit-Policy` and `RateLimit` to the response, also to an
    error."""

    @any_request_id  # calls with limits do not use the fast path
    @web.middleware
    async def limit_fields_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except ProxyError as error:
            error.headers = {**rate_limit_fields(request), **error.headers}
            raise
        add_headers(response, rate_limit_fields(request).items())
        return response

    return limit_fields_middleware


def limit_rates(policy: LimitPolicy) -> Middleware:
    """Middleware: count a model call by the rates of its caller, or refuse it with 429."""
    max_cost = policy.settings.max_cost

    @any_request_id  # for callers without limits
    @web.middleware
    async def limit_rates_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        limits = limits_of(request, policy.settings)
        if not limits and max_cost is None:
            return await handler(request)
        request[NEEDS_EVERY_REQUEST] = "limit_rates"
        request[CALL_LIMITS] = limits
        has_budget = any(own.limit.kind == "budget" for own in limits)
        request[NEEDS_INPUT] = has_budget or max_cost is not None
        rates = [own for own in limits if own.limit.kind == "rate"]
        if rates and not request.pop(RATES_COUNTED, False):
            if following := request.get(FOLLOWING_INPUTS):
                await policy.check_following(request, rates, 1 + len(following))
            admission = await policy.limiter.admit([own.limit for own in rates], 0)
            if admission is not None:
                policy.check(request, rates, admission)
        return await handler(request)

    return limit_rates_middleware


def limit_tokens(policy: LimitPolicy) -> Middleware:
    """Middleware: limit a request for a token like a model call of unknown price. The proxy does
    not see what the token is used for."""
    settings = policy.settings

    @any_request_id  # for other calls
    @web.middleware
    async def limit_tokens_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if not creates_token(call.method, call.target):
            return await handler(request)
        request[NEEDS_EVERY_REQUEST] = "limit_tokens"
        limits = [own for own in limits_of(request, settings) if own.limit.kind != "concurrency"]
        has_budget = any(own.limit.kind == "budget" for own in limits)
        try:
            amount = call_cost(settings, TOKEN, None, has_budget=has_budget)
        except CallerRefusal:
            policy.metrics.record_limited("cost", "call")
            raise
        if not limits:
            return await handler(request)
        admission, reservation = await policy.limiter.reserve([own.limit for own in limits], amount)
        if admission is not None:
            policy.check(request, limits, admission, amount)
        is_created = False
        try:
            response = await handler(request)
            is_created = response.status < web.HTTPBadRequest.status_code
        finally:
            if reservation is not None:
                end = reservation.settle(None) if is_created else reservation.release()
                await asyncio.shield(policy.limiter.spawn(end))
        return response

    return limit_tokens_middleware


def reserve_costs(policy: LimitPolicy) -> Middleware:
    """Middleware, the last one before a call is sent: reserve its part of concurrency and budgets,
    or refuse it with 402 or 429; and end the reservation when the call has ended."""

    @any_request_id
    @web.middleware
    async def reserve_costs_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        if CALL_LIMITS not in request or request[CALL].target.operation is Operation.ICE:
            return await handler(request)
        return await LimitedCall(request, handler, policy).respond()

    return reserve_costs_middleware


def settle_jobs(limiter: Limiter) -> Middleware:
    """Middleware: end the reservation of a job whose result is read, and have a cancelled job
    checked."""

    # A job may have a reservation though this caller has no limits: a key may have lost its own,
    # and the request may not name the user of the job.
    @any_request_id  # as long as nothing is limited
    @web.middleware
    async def settle_jobs_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        operation, request_id = call.target.operation, call.target.request_id or ""
        if limiter.is_used:
            request[NEEDS_EVERY_REQUEST] = "settle_jobs"
        response = await handler(request)
        if operation is Operation.RESULT and call.method == hdrs.METH_GET and is_final(response):
            await settle_job(limiter, request_id, response.status, current_headers(response))
        elif operation is Operation.CANCEL and response.status < web.HTTPBadRequest.status_code:
            await limiter.check_job_soon(request_id, mark_cancelled)
        return response

    return settle_jobs_middleware


async def settle_job(
    limiter: Limiter, request_id: str, status: int, headers: Mapping[str, str]
) -> None:
    """End the reservation of a job by fal's response to the request for its result."""
    await asyncio.shield(
        limiter.spawn(
            limiter.settle_job(
                request_id,
                lambda found: actual_cost(JobDetails.parse(found.details).price, status, headers),
            )
        )
    )


class LimitedCall:
    """One model call that is going to be sent, with its reservation."""

    def __init__(self, request: web.Request, handler: Handler, policy: LimitPolicy) -> None:
        self._request = request
        self._handler = handler
        self._policy = policy
        self._limiter = policy.limiter
        self._limits = [own for own in request[CALL_LIMITS] if own.limit.kind != "rate"]
        self._price: Price | None = None

    def __repr__(self) -> str:
        return f"<LimitedCall {self._request[CALL].target.path}, {len(self._limits)} limits>"

    async def respond(self) -> web.StreamResponse:
        """Raises: CallerRefusal, and the errors of the call."""
        reservation = await self._reserve()
        if (on_admitted := self._request.pop(ON_ADMITTED, None)) is not None:
            on_admitted.run()
        if reservation is None:
            return await self._handler(self._request)
        return await self._send(reservation)

    async def _reserve(self) -> CallReservation | None:
        """Return the reservation; None if nothing has to be ended."""
        amount = await self._estimate() if self._request.get(NEEDS_INPUT) else 0
        if not self._limits:
            return None
        if following := self._request.get(FOLLOWING_INPUTS):
            await self._check_following(following, amount)
        limits = [own.limit for own in self._limits]
        admission, reservation = await self._limiter.reserve(limits, amount)
        if admission is not None:
            self._policy.check(self._request, self._limits, admission, amount)
        return reservation

    async def _check_following(
        self, following: Sequence[Mapping[str, object]], amount: int
    ) -> None:
        budgets = [own for own in self._limits if own.limit.kind == "budget"]
        if budgets:
            total = amount + sum([await self._estimate(inputs) for inputs in following])
            await self._policy.check_following(self._request, budgets, 1 + len(following), total)

    async def _estimate(self, inputs: Mapping[str, object] | None = None) -> int:
        """Return the amount to reserve for the call, or for another one with these inputs, in
        micro-USD.

        Raises: CallerRefusal 402, it may cost too much, or there is a budget and its price is not
            known.
        """
        settings = self._policy.settings
        endpoint = model_of(self._request[CALL].target)
        has_budget = any(own.limit.kind == "budget" for own in self._limits)
        cost = None
        try:
            estimate = await self._policy.prices.estimate(
                endpoint, self._inputs() if inputs is None else inputs
            )
        except PriceUnavailable as error:
            if settings.unknown_price is None:
                if has_budget and settings.on_error != "allow":
                    message = "fal's price of this call cannot be read now. Try again."
                    raise LimitsUnavailable(message) from error
                return 0
        else:
            self._price, cost = estimate.price, estimate.cost
        try:
            return call_cost(settings, endpoint, cost, has_budget=has_budget)
        except CallerRefusal:
            self._policy.metrics.record_limited("cost", "call")
            raise

    def _inputs(self) -> Mapping[str, object]:
        """Return the inputs of the call. Raises: ProxyError 400, they cannot be read."""
        call = self._request[CALL]
        if call.target.operation is Operation.SESSION:
            return session_inputs(first_seconds(self._policy.live_max_seconds))
        inspected = self._request.get(INSPECTED_INPUT, NOT_INSPECTED)
        if call.body is not None and not inspected.is_parsed:
            message = (
                "The cost of this call cannot be estimated: send the input as a JSON object, "
                "without a content encoding."
            )
            raise ProxyError(400, "input_unreadable", message)
        return call_inputs(call.target.query, inspected.tree)

    async def _send(self, reservation: CallReservation) -> web.StreamResponse:
        call = self._request[CALL]
        is_submit = call.target.operation is Operation.SUBMIT
        if is_submit:
            self._request[CALL] = replace(call, needs_identity=True)
        response: web.StreamResponse | None = None
        try:
            response = await self._handler(self._request)
            await self._end(reservation, response, is_submit=is_submit)
        except ProxyError as error:
            is_paid = error.code in POSSIBLY_PAID_ERRORS
            await self._complete(reservation.settle(None) if is_paid else reservation.release())
            raise
        except BaseException:  # the client has left, and fal may have received the call
            _ = self._limiter.spawn(reservation.settle(None))
            if isinstance(response, RelayedResponse):
                response.discard()
            raise
        return response

    async def _end(
        self, reservation: CallReservation, response: web.StreamResponse, *, is_submit: bool
    ) -> None:
        if response.status >= web.HTTPBadRequest.status_code or not is_submit:
            cost = actual_cost(self._price, response.status, upstream_headers(response))
            if (session_id := self._request.get(OPENED_SESSION)) is not None:
                covered = first_seconds(self._policy.live_max_seconds)
                opened = attach_session(reservation, session_id, self._price, covered)
                await self._complete(opened)
                return
            if isinstance(response, RelayedResponse) and is_stream(response):
                end_with(response, self._limiter, reservation, cost)
            else:
                await self._complete(reservation.settle(cost))
            return
        request_id, app = await read_job(response)
        if request_id is None:
            await self._complete(reservation.settle(None))
            return
        call = self._request[CALL]
        details = JobDetails(
            app or app_of(normalized_path(call.target).strip("/")),
            call.key.fingerprint if call.key else "",
            self._price,
        )
        await self._complete(reservation.attach(request_id, details.serialize()))

    async def _complete(self, end: Coroutine[object, object, None]) -> None:
        """Wait until an end is written, which happens also if the client leaves."""
        await asyncio.shield(self._limiter.spawn(end))


def is_stream(response: RelayedResponse) -> bool:
    return (
        response.status < web.HTTPBadRequest.status_code and response.content_type == EVENT_STREAM
    )


def end_with(
    response: RelayedResponse, limiter: Limiter, reservation: CallReservation, cost: int | None
) -> None:
    """End the reservation of a stream when its body ends, in whatever way."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        if reservation.is_open and not loop.is_closed():
            _ = limiter.spawn(reservation.settle(cost))

    response.on_body_end(end)
    weakref.finalize(response, end).atexit = False


async def read_job(response: web.StreamResponse) -> tuple[str | None, str | None]:
    """Return the request id and the app of a submit that fal accepted, as far as they are known."""
    if not isinstance(response, RelayedResponse):
        return None, None
    submitted = parse_submit_response(await response.document() or b"null")
    return submitted or (response.upstream_headers.get(FAL_REQUEST_ID), None)
