"""What a ledger tells, as documents: for `falproxy usage`, `/api/usage` and the dashboard."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import get_args

from falproxy.fal.pricing import MICROS_PER_USD
from falproxy.parsers import parse_age
from falproxy.stores.ledger import (
    CallRecord,
    CallRecordStore,
    GroupBy,
    Interval,
    Summaries,
    Totals,
    UsageQuery,
)
from falproxy.stores.ledger.rows import interval_name
from falproxy.stores.ledger.statements import MILLISECONDS

Json = dict[str, object]

# How a moment is written; without an offset it is UTC.
TIME_PATTERN = re.compile(
    r"\d{1,6}[smhdSMHD]|"
    r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:\d{2})?)?"
)
DAY = 86400.0
TIME_RANGE_MAX = 400 * DAY
SERIES_MAX = 1000  # in a series
GROUP_ROWS_MAX = 100  # endpoints, principals or routes in an overview; the dearest
LATEST_MAX = 50
INTERVAL_SECONDS: dict[GroupBy, float] = {
    step: length / 1000 for step, length in MILLISECONDS.items()
}
# The longest stretch that is shown by so short steps.
INTERVAL_THRESHOLDS: tuple[tuple[float, Interval], ...] = ((3 * 3600, "minute"), (8 * DAY, "hour"))


@dataclass(frozen=True, slots=True)
class TimeRange:
    """From `since` up to `until`, in seconds since 1970."""

    since: float
    until: float

    @property
    def interval(self) -> Interval:
        """The stretch of time that it is shown by."""
        length = self.until - self.since
        return next((step for longest, step in INTERVAL_THRESHOLDS if length <= longest), "day")

    def to_json(self) -> Json:
        return {"since": format_time(self.since), "until": format_time(self.until)}


def parse_time_range(since: str, until: str | None, now: float) -> TimeRange:
    """Raises: ValueError, with a sentence that begins with the name of what is wrong."""
    start = parse_time("since", since, now)
    end = now if until is None else parse_time("until", until, now)
    if not start < end:
        raise ValueError("since must be before until")
    if end - start > TIME_RANGE_MAX:
        raise ValueError(f"since must be at most {TIME_RANGE_MAX / DAY:g} days before until")
    return TimeRange(start, end)


def parse_time(name: str, text: str, now: float) -> float:
    """Seconds since 1970, from how long ago (`7d`) or a date (`2026-11-01`,
    `2026-11-01T09:30Z`)."""
    match = TIME_PATTERN.fullmatch(text)
    try:
        seconds = None if match is None else to_timestamp(text, now)
    except (ValueError, OverflowError):  # February 30, say
        seconds = None
    if seconds is None:
        raise ValueError(f"{name} must be like 7d, 12h or 2026-11-01, not {text[:40]!r}")
    return max(0.0, seconds)


def to_timestamp(text: str, now: float) -> float:
    if text[-1].isalpha() and text[:-1].isdecimal():
        return now - parse_age(text)
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def parse_group_by(text: str) -> GroupBy:
    """Raises: ValueError."""
    for by in get_args(GroupBy):
        if by == text:
            found: GroupBy = by
            return found
    raise ValueError(f"by must be one of {', '.join(get_args(GroupBy))}, not {text[:40]!r}")


def check_series_length(time_range: TimeRange, by: GroupBy | None) -> None:
    """Raises: ValueError, that would be too many rows."""
    if (
        by in INTERVAL_SECONDS
        and (time_range.until - time_range.since) / INTERVAL_SECONDS[by] > SERIES_MAX
    ):
        raise ValueError(f"since must be later: that is more than {SERIES_MAX} times one {by}")


async def usage_table(
    records: CallRecordStore, time_range: TimeRange, by: GroupBy, principal: str | None
) -> Json:
    """Sums over a span, all together and by name. principal: whose calls; None for everybody's.

    Raises: LedgerError.
    """
    question = UsageQuery(
        since=time_range.since, until=time_range.until, principal=principal, limit=SERIES_MAX
    )
    rows = await records.totals(question, by)
    all_together = sum_totals(totals for _, totals in rows)
    if len(rows) == SERIES_MAX:  # there may be more
        ((_, all_together),) = await records.totals(question)
    return table_json(time_range, by, principal, all_together, rows)


def table_json(
    time_range: TimeRange,
    by: GroupBy,
    principal: str | None,
    grand_total: Totals,
    rows: list[tuple[str, Totals]],
) -> Json:
    return {
        **time_range.to_json(),
        "principal": principal,
        "by": by,
        "totals": totals_json(grand_total),
        "rows": [{"name": name, **totals_json(totals)} for name, totals in rows],
    }


async def usage_summary(summaries: Summaries, time_range: TimeRange, principal: str | None) -> Json:
    """All that the dashboard shows of a span, but for the latest calls. Raises: LedgerError."""
    question = UsageQuery(
        since=time_range.since, until=time_range.until, principal=principal, limit=SERIES_MAX
    )
    parts = await summaries.summarize(question, time_range.interval)
    named = {
        by: [{"name": name, **totals_json(totals)} for name, totals in parts[by][:GROUP_ROWS_MAX]]
        for by in ("endpoint", "principal", "route")
    }
    return {
        **time_range.to_json(),
        "principal": principal,
        "totals": totals_json(sum_totals(totals for _, totals in parts[time_range.interval])),
        "step": time_range.interval,
        "series": time_series(parts[time_range.interval], time_range),
        "endpoints": named["endpoint"],
        "routes": named["route"],
        "principals": named["principal"] if principal is None else None,
    }


def time_series(rows: Iterable[tuple[str, Totals]], time_range: TimeRange) -> list[Json]:
    """Each step of a span, the empty ones too. at: when it begins."""
    length = MILLISECONDS[time_range.interval]
    known = dict(rows)
    first, last = int(time_range.since * 1000) // length, int(time_range.until * 1000 - 1) // length
    return [
        {
            "at": format_time(number * length / 1000),
            **totals_json(known.get(interval_name(number, time_range.interval), Totals())),
        }
        for number in range(first, last + 1)
    ]


async def latest_calls(
    records: CallRecordStore, time_range: TimeRange, principal: str | None
) -> list[Json]:
    """Raises: LedgerError."""
    question = UsageQuery(
        since=time_range.since, until=time_range.until, principal=principal, limit=LATEST_MAX
    )
    return [call_json(entry) for entry in await records.latest(question)]


def call_json(record: CallRecord) -> Json:
    """One call, with nothing of what was asked for."""
    shown = asdict(replace(record, units=None))
    paid = record.estimated if record.settled is None else record.settled
    for name in ("id", "user_id", "units", "estimated", "settled"):
        del shown[name]
    return shown | {
        "at": format_time(record.at),
        "spent": None if paid is None else paid / MICROS_PER_USD,
    }


def totals_json(totals: Totals) -> Json:
    """Money in USD. spent, saved: None where there were such calls, and no price of any is known.
    own_seconds, upstream_seconds: of a call, on average."""
    calls = totals.calls
    is_unknown = totals.unpriced > 0 and totals.spent == 0
    own = totals.seconds - totals.upstream_seconds
    return {
        "calls": calls,
        "errors": totals.errors,
        "hits": totals.hits,
        "misses": totals.misses,
        "hit_rate": totals.hit_rate,
        "spent": None if is_unknown else totals.spent / MICROS_PER_USD,
        "saved": None if totals.hits and not totals.saved else totals.saved / MICROS_PER_USD,
        "unpriced": totals.unpriced,
        "own_seconds": round(own / calls, 6) if calls else None,
        "upstream_seconds": round(totals.upstream_seconds / calls, 6) if calls else None,
    }


def sum_totals(several: Iterable[Totals]) -> Totals:
    found = list(several)
    return Totals(
        **{each.name: sum(getattr(one, each.name) for one in found) for each in fields(Totals)}
    )


def format_time(seconds: float) -> str:
    when = datetime.fromtimestamp(seconds, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
