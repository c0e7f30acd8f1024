"""The rest of a caller's limits, as response headers.

`RateLimit-Policy` and `RateLimit` are those of draft-ietf-httpapi-ratelimit-headers: lists of named
policies, in structured fields (RFC 9651).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

from aiohttp import web

from falproxy.stores.limits import Limit, LimitKind, LimitState

POLICY_FIELD, STATE_FIELD = "RateLimit-Policy", "RateLimit"
# The unit of each limit, for the parameter `qu`; requests are the default.
QUOTA_UNITS: Mapping[LimitKind, str] = {
    "concurrency": ';qu="concurrent-requests"',
    "budget": ';qu="micro-usd"',
}


@dataclass(frozen=True, slots=True)
class LimitReport:
    """A limit and its count. name: of the policy, such as `rate` or `user-budget`."""

    name: str
    limit: Limit
    state: LimitState

    @property
    def remaining(self) -> int:
        return max(0, self.limit.maximum - self.state.used)

    @property
    def policy(self) -> str:
        window = self.limit.window
        length = "" if window is None else f";w={ceil(window.length)}"
        return f'"{self.name}";q={self.limit.maximum}{length}{QUOTA_UNITS.get(self.limit.kind, "")}'

    @property
    def available(self) -> str:
        seconds = "" if self.limit.window is None else f";t={ceil(self.state.seconds)}"
        return f'"{self.name}";r={self.remaining}{seconds}'


# The limits of a request's last call, by name.
LIMIT_REPORTS = web.RequestKey("falproxy.limit_reports", dict[str, LimitReport])


def report_limits(request: web.Request, reports: Iterable[LimitReport]) -> None:
    """Record the rest of the limits, for the headers of the response."""
    known = request.get(LIMIT_REPORTS)
    if known is None:
        known = request[LIMIT_REPORTS] = {}
    known.update((report.name, report) for report in reports)


def rate_limit_fields(request: web.Request) -> dict[str, str]:
    reports = request.get(LIMIT_REPORTS, {}).values()
    if not reports:
        return {}
    return {
        POLICY_FIELD: ", ".join(report.policy for report in reports),
        STATE_FIELD: ", ".join(report.available for report in reports),
    }


def openai_rate_fields(request: web.Request) -> dict[str, str]:
    """Return the headers of OpenAI's API: the rate with the fewest requests left."""
    reports = request.get(LIMIT_REPORTS, {}).values()
    rates = [report for report in reports if report.limit.kind == "rate"]
    if not rates:
        return {}
    report = min(rates, key=lambda rate: rate.remaining)
    return {
        "x-ratelimit-limit-requests": str(report.limit.maximum),
        "x-ratelimit-remaining-requests": str(report.remaining),
        "x-ratelimit-reset-requests": f"{ceil(report.state.seconds)}s",
    }
