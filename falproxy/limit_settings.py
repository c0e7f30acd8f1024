"""Settings of the limits of model calls, and the parsers of their values."""

from dataclasses import dataclass
from typing import Literal

from falproxy.fal.pricing import format_usd, parse_decimal, to_micros
from falproxy.parsers import AGE, AGE_UNITS, one_of, parse_count
from falproxy.setting_fields import setting
from falproxy.windows import WINDOWS, Window

REQUESTS_DIGITS_MAX = 9

Rate = tuple[int, Window]
Budget = tuple[int, Window]


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """Limits of one caller, which replace the settings. None: as set for all callers.

    budget: micro-USD in a window.
    """

    rate: Rate | None = None
    concurrency: int | None = None
    budget: Budget | None = None


NO_CALLER_LIMITS = CallerLimits()


def parse_rate(value: str) -> tuple[int, Window]:
    """Parse a number of requests in a window: `60/minute`, `5/10s`."""
    number, slash, period = value.replace(" ", "").partition("/")
    window = parse_window(period)
    is_number = number.isascii() and number.isdecimal() and len(number) <= REQUESTS_DIGITS_MAX
    if not slash or window is None or window.seconds is None or not is_number:
        raise ValueError("must be like 60/minute or 1000/day")
    if int(number) == 0:
        raise ValueError("must be at least one request in a window")
    return int(number), window


def parse_budget(value: str) -> tuple[int, Window]:
    """Parse USD in a window (`5/day`, `99.50/month`) to micro-USD and the window."""
    amount, slash, period = value.replace(" ", "").partition("/")
    window = parse_window(period)
    if not slash or window is None:
        raise ValueError("must be like 5/day or 99.50/month, in USD")
    return parse_usd(amount), window


def parse_window(text: str) -> Window | None:
    """Parse `minute`, `day`, `month`, or a length such as `10s` and `12h`; None for other texts."""
    if (named := WINDOWS.get(text.lower().removeprefix("1 "))) is not None:
        return named
    match = AGE.fullmatch(text)
    seconds = int(match[1]) * AGE_UNITS[match[2].lower()] if match else 0
    return Window(seconds) if seconds else None


def parse_usd(value: str) -> int:
    """Parse an amount such as `0.10` or `$5` to micro-USD."""
    amount = parse_decimal(value.strip().removeprefix("$"))
    micros = None if amount is None else to_micros(amount)
    if micros is None:
        raise ValueError("must be an amount in USD like 5 or 0.10")
    return micros


def format_rate(rate: Rate) -> str:
    return f"{rate[0]}/{format_window(rate[1])}"


def format_budget(budget: Budget) -> str:
    return f"{format_usd(budget[0])}/{format_window(budget[1])}"


def format_window(window: Window) -> str:
    """Return a window as `parse_window` reads it."""
    if window in WINDOWS.values() or window.seconds is None:
        return str(window)
    units = [unit for unit, seconds in AGE_UNITS.items() if window.seconds % seconds == 0]
    unit = max(units, key=AGE_UNITS.__getitem__)
    return f"{window.seconds // AGE_UNITS[unit]}{unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """Limits of model calls. Amounts are micro-USD."""

    rate: Rate | None = setting(
        "FALPROXY_RATE_LIMIT",
        parse_rate,
        None,
        "model calls of each caller in a window, such as `60/minute`; an open proxy counts by "
        "address",
    )
    concurrency: int | None = setting(
        "FALPROXY_CONCURRENCY",
        parse_count,
        None,
        "model calls of each caller under way at once, at most 256",
    )
    budget: Budget | None = setting(
        "FALPROXY_BUDGET",
        parse_budget,
        None,
        "USD that each caller may spend in a window, such as `5/day` or `100/month` (UTC)",
    )
    user_rate: Rate | None = setting(
        "FALPROXY_USER_RATE_LIMIT", parse_rate, None, "model calls of each user of a caller"
    )
    user_concurrency: int | None = setting(
        "FALPROXY_USER_CONCURRENCY",
        parse_count,
        None,
        "model calls of each user of a caller under way at once, at most 256",
    )
    user_budget: Budget | None = setting(
        "FALPROXY_USER_BUDGET", parse_budget, None, "USD that each user of a caller may spend"
    )
    total_budget: Budget | None = setting(
        "FALPROXY_TOTAL_BUDGET", parse_budget, None, "USD that all callers together may spend"
    )
    unknown_price: int | None = setting(
        "FALPROXY_UNKNOWN_PRICE",
        parse_usd,
        None,
        "USD that a call of unknown price reserves in budgets; if not set, it is refused there",
    )
    max_cost: int | None = setting(
        "FALPROXY_MAX_COST",
        parse_usd,
        None,
        "USD that a single call may cost by its estimate; does not apply to calls of unknown price",
    )
    on_error: Literal["default", "allow", "refuse"] = setting(
        "FALPROXY_LIMITS_ON_ERROR",
        one_of("default", "allow", "refuse"),
        "default",
        "if limits cannot be read: `default` refuses calls that have a budget and lets others "
        "pass; `allow` lets all pass, `refuse` none",
    )

    @property
    def has_budget(self) -> bool:
        return bool(self.budget or self.user_budget or self.total_budget)

    @property
    def is_used(self) -> bool:
        """True if calls are counted or their price is limited."""
        rates = (self.rate, self.concurrency, self.user_rate, self.user_concurrency)
        return self.has_budget or any(rates) or self.max_cost is not None


NO_LIMITS = LimitSettings()
