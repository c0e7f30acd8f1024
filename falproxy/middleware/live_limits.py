"""Middleware of the limits of live video: a session counts until its heartbeats end.

Each heartbeat renews the session's reservation. Without a maximum length, it also reserves the
budgets of the next seconds; if they do not suffice, the session is ended.
"""

from dataclasses import dataclass, replace

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import CallerRefusal
from falproxy.fal.live import HEARTBEAT_INTERVAL, is_over, session_cost, session_inputs
from falproxy.fal.pricing import Price
from falproxy.limit_settings import LimitSettings
from falproxy.middleware.call_limits import ScopedLimit, call_cost, limits_of
from falproxy.middleware.job_costs import JobDetails, LiveProgress
from falproxy.middleware.limit_calls import LimitPolicy
from falproxy.middleware.limiter import CallReservation, Limiter, LimitsUnavailable
from falproxy.middleware.live_calls import (
    IS_ENDED,
    LIVE_SECONDS,
    LIVE_SESSION,
    read_document,
)
from falproxy.middleware.live_reservations import (
    SESSION_LEASE,
    attach_session,
    first_seconds,
    missing_seconds,
    reservation_name,
)
from falproxy.proxy.head_only import any_request_id
from falproxy.proxy.prices import PriceUnavailable
from falproxy.stores.limits import LimitsError, Reservation
from falproxy.stores.live_sessions import LiveSession


def continue_sessions(policy: LimitPolicy) -> Middleware:
    """Middleware: renew the reservation of a session with its heartbeats, or end the session."""

    @any_request_id
    @web.middleware
    async def continue_sessions_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        session = request.get(LIVE_SESSION)
        if session is None or not policy.limiter.is_used:
            return await handler(request)
        return await LimitedHeartbeat(request, handler, policy, session).respond()

    return continue_sessions_middleware


@dataclass(frozen=True, slots=True)
class LimitedHeartbeat:
    """One heartbeat of a session that may have a reservation."""

    request: web.Request
    handler: Handler
    policy: LimitPolicy
    session: LiveSession

    @property
    def name(self) -> str:
        return reservation_name(self.session.id)

    @property
    def seconds(self) -> float:
        seconds: float = self.request[LIVE_SECONDS]
        return seconds

    async def respond(self) -> web.StreamResponse:
        if IS_ENDED not in self.request and not await self._reserve():
            self.request[IS_ENDED] = True
        response = await self.handler(self.request)
        if response.status == web.HTTPOk.status_code:
            has_ended = is_over(await read_document(response))
            await self._settle() if has_ended else await self._renew()
        return response

    async def _reserve(self) -> bool:
        """Make sure that the session is reserved until its next heartbeat. Return False if a limit
        does not allow that. While the store is away, sessions go on."""
        if self._is_too_expensive():
            return False
        try:
            found = await self.policy.limiter.find(self.name)
            if found is None:
                return await self._reserve_again()
            details = JobDetails.parse(found.details)
            return details.live is None or await self._extend(found, details, details.live)
        except (LimitsError, LimitsUnavailable):
            return True
        except CallerRefusal:
            return False

    def _is_too_expensive(self) -> bool:
        """Return whether the session would cost more than a single call may."""
        max_cost = self.policy.settings.max_cost
        price = self.policy.prices.known(self.session.endpoint)
        cost = session_cost(price, self.seconds + HEARTBEAT_INTERVAL)
        return max_cost is not None and cost is not None and cost > max_cost

    async def _reserve_again(self) -> bool:
        """Make a new reservation, as for a new session: the earlier one has ended, or there was
        none. Raises: CallerRefusal."""
        limits = self._limits(("concurrency", "budget"))
        if not limits:
            return True
        covered = first_seconds(self.policy.live_max_seconds)
        price, amount = await self._estimate(covered, limits)
        reservation = await self._admit(limits, amount)
        if reservation is not None:
            await attach_session(reservation, self.session.id, price, covered, self.seconds)
        return True

    async def _extend(self, found: Reservation, details: JobDetails, live: LiveProgress) -> bool:
        """Reserve the budgets of further seconds, if they are due. Raises: CallerRefusal."""
        added = missing_seconds(live, self.seconds - live.started)
        limits = self._limits(("budget",))
        amount = added_cost(details.price, live.covered, added)
        is_covered = self.policy.live_max_seconds is not None  # from the opening
        if is_covered or not added or not amount or not limits:
            return True
        reservation = await self._admit(limits, amount)
        if reservation is not None:
            await reservation.settle(amount)
            extended = replace(live, covered=live.covered + added, settled=live.settled + amount)
            await self._attach(found.token, replace(details, live=extended))
        return True

    def _limits(self, kinds: tuple[str, ...]) -> list[ScopedLimit]:
        settings: LimitSettings = self.policy.settings
        return [own for own in limits_of(self.request, settings) if own.limit.kind in kinds]

    async def _estimate(
        self, seconds: float, limits: list[ScopedLimit]
    ) -> tuple[Price | None, int]:
        """Return the price of the session, and the amount to reserve. Raises: CallerRefusal."""
        has_budget = any(own.limit.kind == "budget" for own in limits)
        endpoint = self.session.endpoint
        try:
            estimate = await self.policy.prices.estimate(endpoint, session_inputs(seconds))
        except PriceUnavailable:
            return None, self.policy.settings.unknown_price or 0
        amount = call_cost(self.policy.settings, endpoint, estimate.cost, has_budget=has_budget)
        return estimate.price, amount

    async def _admit(self, limits: list[ScopedLimit], amount: int) -> CallReservation | None:
        """Reserve a part of limits. Raises: CallerRefusal, one of them does not allow it."""
        limiter: Limiter = self.policy.limiter
        admission, reservation = await limiter.reserve([own.limit for own in limits], amount)
        if admission is not None:
            self.policy.check(self.request, limits, admission, amount)
        return reservation

    async def _renew(self) -> None:
        """Store the length of the session, which has not ended."""
        try:
            found = await self.policy.limiter.find(self.name)
        except LimitsError:
            return
        if found is not None:
            details = JobDetails.parse(found.details)
            live = details.live or LiveProgress()
            live = replace(live, seconds=self.seconds - live.started)
            await self._attach(found.token, replace(details, live=live))

    async def _settle(self) -> None:
        await self.policy.limiter.settle_job(
            self.name, lambda found: JobDetails.parse(found.details).live_cost()
        )

    async def _attach(self, token: str, details: JobDetails) -> None:
        await self.policy.limiter.attach(token, self.name, details.serialize(), SESSION_LEASE)


def added_cost(price: Price | None, covered: float, added: float) -> int:
    """Return the cost of further seconds in micro-USD; 0 if it is unknown, or does not grow."""
    before, after = session_cost(price, covered), session_cost(price, covered + added)
    return 0 if before is None or after is None else after - before
