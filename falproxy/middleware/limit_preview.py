"""The response of the limits to a call that is not made."""

from collections.abc import Awaitable, Callable
from math import ceil

from aiohttp import web

from falproxy.errors import CallerRefusal
from falproxy.fal.pricing import MICROS_PER_USD
from falproxy.middleware.call_limits import ScopedLimit, call_cost, limits_of, refusal
from falproxy.middleware.limit_calls import LimitPolicy
from falproxy.stores.limits import LimitState, share

Json = dict[str, object]
# The parameters are the request, the endpoint id, and the cost in micro-USD, None if it is unknown.
PreviewLimits = Callable[[web.Request, str, int | None], Awaitable[Json]]


def preview_limits(policy: LimitPolicy) -> PreviewLimits:
    """Return a function that compares a call with the limits of its caller, and counts nothing. It
    raises ProxyError 503 if the limits cannot be read."""

    async def preview(request: web.Request, endpoint: str, cost: int | None) -> Json:
        limits = limits_of(request, policy.settings)
        states = await policy.limiter.count([own.limit for own in limits])
        pairs = list(zip(limits, states, strict=True))
        refused: CallerRefusal | None = None
        try:
            has_budget = any(own.limit.kind == "budget" for own in limits)
            amount = call_cost(policy.settings, endpoint, cost, has_budget=has_budget)
            for own, state in pairs:
                if state.used + share(own.limit, amount) > own.limit.maximum:
                    raise refusal(own, state, amount)
        except CallerRefusal as error:
            refused = error
        return {
            "refusal": None if refused is None else describe_refusal(refused),
            # How much all callers together have spent is not shown to each of them.
            "limits": [describe(own, state) for own, state in pairs if own.scope != "total"],
        }

    return preview


def describe_refusal(refused: CallerRefusal) -> Json:
    return {"status": refused.status, "type": refused.code, "detail": refused.message}


def describe(own: ScopedLimit, state: LimitState) -> Json:
    """Return a limit as JSON: requests, jobs or USD, and the seconds of its window, None for
    concurrency."""
    limit, report = own.limit, own.report(state)
    is_money = limit.kind == "budget"
    return {
        "name": report.name,
        "maximum": limit.maximum / MICROS_PER_USD if is_money else limit.maximum,
        "remaining": report.remaining / MICROS_PER_USD if is_money else report.remaining,
        "window": None if limit.window is None else ceil(limit.window.length),
    }
