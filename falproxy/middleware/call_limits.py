"""The limits that hold for a call, and the refusals of calls that exceed them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from math import ceil
from time import time
from typing import Literal
from urllib.parse import quote

from aiohttp import web

from falproxy.errors import CONCURRENCY_LIMITED, CallerRefusal
from falproxy.fal.pricing import format_usd
from falproxy.limit_settings import NO_CALLER_LIMITS, Budget, LimitSettings, Rate
from falproxy.middleware.guess_limit import network_of
from falproxy.proxy.call import CALLER_LIMITS, OWNER, USER
from falproxy.proxy.client_address import client_address
from falproxy.proxy.limit_fields import LimitReport
from falproxy.stores.limits import Limit, LimitState

Scope = Literal["principal", "user", "total"]
RETRY_AFTER = "Retry-After"
SUBJECT_MAX = 200  # characters of a name; longer ones are counted by their digest
OF_SCOPE = {"principal": "of this caller", "user": "of this user", "total": "of all callers"}


@dataclass(frozen=True, slots=True)
class ScopedLimit:
    """A limit and the scope in which it counts."""

    scope: Scope
    limit: Limit

    @property
    def name(self) -> str:
        return self.limit.kind if self.scope == "principal" else f"{self.scope}-{self.limit.kind}"

    def report(self, state: LimitState) -> LimitReport:
        return LimitReport(self.name, self.limit, state)


@dataclass(frozen=True, slots=True)
class OnAdmitted:
    """Is run when the limits have admitted a call, before it is sent."""

    run: Callable[[], None]


# Set for a call that is limited, also if only by the price of a single call.
CALL_LIMITS = web.RequestKey("falproxy.call_limits", tuple[ScopedLimit, ...])
ON_ADMITTED = web.RequestKey("falproxy.on_admitted", OnAdmitted)


def limits_of(request: web.Request, settings: LimitSettings) -> tuple[ScopedLimit, ...]:
    """Return the limits of a request's caller, of its user, and of all callers. A key's own limits
    replace the settings."""
    own = request.get(CALLER_LIMITS, NO_CALLER_LIMITS)
    caller = caller_name(request)
    limits = [
        *scoped_limits(
            "principal",
            caller,
            settings.rate if own.rate is None else own.rate,
            settings.concurrency if own.concurrency is None else own.concurrency,
            settings.budget if own.budget is None else own.budget,
        )
    ]
    if (user := request.get(USER)) is not None:
        limits += scoped_limits(
            "user",
            f"{caller}:{subject_name(user)}",
            settings.user_rate,
            settings.user_concurrency,
            settings.user_budget,
        )
    limits += scoped_limits("total", "", None, None, settings.total_budget)
    return tuple(limits)


def scoped_limits(
    scope: Scope, name: str, rate: Rate | None, concurrency: int | None, budget: Budget | None
) -> Iterator[ScopedLimit]:
    subject = f"{scope}:{name}"
    if rate is not None:
        yield ScopedLimit(scope, Limit("rate", subject, *rate))
    if concurrency is not None:
        yield ScopedLimit(scope, Limit("concurrency", subject, concurrency))
    if budget is not None:
        yield ScopedLimit(scope, Limit("budget", subject, *budget))


def caller_name(request: web.Request) -> str:
    """Return the name by which a caller is counted: its authenticated name, or its address, which
    is a network for IPv6. Names cannot contain colons."""
    owner = request.get(OWNER)
    if owner is None:
        return f"address:{subject_name(network_of(client_address(request)))}"
    return subject_name(owner)


def subject_name(text: str) -> str:
    """Return a text without characters that separate names in the limits store."""
    encoded = text.encode("utf-8", "surrogatepass")
    if len(text) > SUBJECT_MAX:
        return sha256(encoded).hexdigest()
    return quote(encoded, safe="")


def call_cost(
    settings: LimitSettings, endpoint: str, estimate: int | None, *, has_budget: bool
) -> int:
    """Return the amount to reserve for a call, in micro-USD.

    estimate: its expected cost; None if it is unknown.

    Raises: CallerRefusal 402, it may cost too much, or there is a budget and its price is unknown.
    """
    cost = settings.unknown_price if estimate is None else estimate
    if cost is None:
        if has_budget:
            raise price_unknown(endpoint)
        return 0
    if settings.max_cost is not None and cost > settings.max_cost:
        raise too_expensive(cost, settings.max_cost)
    return cost


def refusal(refused: ScopedLimit, state: LimitState, amount: int) -> CallerRefusal:
    """Return the error for a call that a limit does not admit.

    amount: the most that the call may cost, in micro-USD.
    """
    seconds = max(1, ceil(state.seconds))
    if refused.limit.kind == "budget":
        return budget_refusal(refused, state, amount, seconds)
    maximum, scope = refused.limit.maximum, OF_SCOPE[refused.scope]
    headers = {RETRY_AFTER: str(seconds)}
    if refused.limit.kind == "concurrency":
        message = f"The calls {scope} under way have reached their limit of {maximum}: wait."
        return CallerRefusal(429, CONCURRENCY_LIMITED, message, headers)
    message = (
        f"The calls {scope} have reached their limit of {maximum} per {refused.limit.window}: "
        f"try again in {seconds} s."
    )
    return CallerRefusal(429, "rate_limited", message, headers)


def budget_refusal(
    refused: ScopedLimit, state: LimitState, amount: int, seconds: int
) -> CallerRefusal:
    limit = refused.limit
    renewal = datetime.fromtimestamp(time() + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    message = (
        f"The budget {OF_SCOPE[refused.scope]} ({usd(limit.maximum)} per {limit.window}) does not "
        f"cover this call: {usd(state.used)} is spent or reserved, and the call may cost "
        f"{usd(amount)}. It is renewed at {renewal}."
    )
    return CallerRefusal(402, "budget_exceeded", message, {RETRY_AFTER: str(seconds)})


def too_many_calls(refused: ScopedLimit, calls: int) -> CallerRefusal:
    limit = refused.limit
    message = (
        f"This request needs {calls} calls of the model, and the limit {OF_SCOPE[refused.scope]} "
        f"is {limit.maximum} per {limit.window}: ask for fewer images."
    )
    return CallerRefusal(400, "too_many_calls", message)


def too_expensive(cost: int, max_cost: int) -> CallerRefusal:
    message = f"This call may cost {usd(cost)}; a single call may cost {usd(max_cost)} at most."
    return CallerRefusal(402, "call_too_expensive", message)


def price_unknown(endpoint: str) -> CallerRefusal:
    message = f"There is a budget, and the price of this call of {endpoint} is not known."
    return CallerRefusal(402, "price_unknown", message)


def usd(micros: int) -> str:
    return f"${format_usd(micros)}"
