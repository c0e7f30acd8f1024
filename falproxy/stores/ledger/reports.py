"""Usage reports as JSON documents: for `falproxy usage`, `/api/usage` and the dashboard."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Literal, get_args

from falproxy.fal.pricing import MICROS_PER_USD
from falproxy.parse_digits import parse_digits
from falproxy.parsers import parse_age
from falproxy.stores.ledger import (
    CallRecord,
    CallRecordStore,
    GroupBy,
    Interval,
    Ledger,
    QueryReader,
    Totals,
    UsageQuery,
    UserTotals,
)
from falproxy.stores.ledger.process_starts import read_starts
from falproxy.stores.ledger.rows import interval_name
from falproxy.stores.ledger.statements import MILLISECONDS
from falproxy.stores.ledger.totals_queries import SUMMARY_GROUPS

Json = dict[str, object]
TableBy = Literal[GroupBy, "user"]

# An age or an ISO 8601 date; without an offset the time is UTC.
TIME_PATTERN = re.compile(
    r"\d{1,6}[smhdSMHD]|"
    r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:\d{2})?)?"
)
DAY = 86400.0
TIME_RANGE_MAX = 400 * DAY
SERIES_MAX = 1000  # intervals of a series
TABLE_ROWS_MAX = 1000  # of one page
OFFSET_MAX = 10**9
GROUP_ROWS_MAX = 100  # endpoints, users, … of a summary, those with the highest cost
LATEST_MAX = 50
INTERVAL_SECONDS: dict[TableBy, float] = {
    interval: length / 1000 for interval, length in MILLISECONDS.items()
}
# Up to this length in seconds, a time range is divided into these intervals; else into days.
INTERVAL_THRESHOLDS: tuple[tuple[float, Interval], ...] = ((3 * 3600, "minute"), (8 * DAY, "hour"))


@dataclass(frozen=True, slots=True)
class TimeRange:
    """A period from `since` until `until` (exclusive), in seconds since 1970."""

    since: float
    until: float

    @property
    def interval(self) -> Interval:
        """The length of the intervals of its series."""
        length = self.until - self.since
        return next((name for longest, name in INTERVAL_THRESHOLDS if length <= longest), "day")

    def to_json(self) -> Json:
        return {"since": format_time(self.since), "until": format_time(self.until)}


@dataclass(frozen=True)
class Page:
    """The rows of a table that are returned."""

    limit: int = TABLE_ROWS_MAX
    offset: int = 0


FIRST_PAGE, NO_TOTALS = Page(), Totals()


@dataclass(frozen=True, slots=True)
class TableRows:
    """The rows of a page, and the totals of all rows. has_more: rows follow after this page."""

    rows: Sequence[tuple[Json, Totals]] = ()
    grand_total: Totals = NO_TOTALS
    has_more: bool = False


NO_ROWS = TableRows()


def parse_time_range(since: str, until: str | None, now: float) -> TimeRange:
    """Parse the parameters of a period.

    Raises: ValueError, the message begins with the name of the invalid parameter.
    """
    start = parse_time("since", since, now)
    end = now if until is None else parse_time("until", until, now)
    if not start < end:
        raise ValueError("since must be before until")
    if end - start > TIME_RANGE_MAX:
        raise ValueError(f"since must be at most {TIME_RANGE_MAX / DAY:g} days before until")
    return TimeRange(start, end)


def parse_time(name: str, text: str, now: float) -> float:
    """Parse an age (`7d`) or a date (`2026-11-01`, `2026-11-01T09:30Z`) into seconds since 1970.

    Raises: ValueError.
    """
    match = TIME_PATTERN.fullmatch(text)
    try:
        seconds = None if match is None else to_timestamp(text, now)
    except (ValueError, OverflowError):  # such as February 30
        seconds = None
    if seconds is None:
        raise ValueError(f"{name} must be like 7d, 12h or 2026-11-01, not {text[:40]!r}")
    return max(0.0, seconds)


def to_timestamp(text: str, now: float) -> float:
    if text[-1].isalpha() and text[:-1].isdecimal():
        return now - parse_age(text)
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def parse_group_by(text: str) -> TableBy:
    """Raises: ValueError."""
    for by in get_args(TableBy):
        if by == text:
            group_by: TableBy = by
            return group_by
    raise ValueError(f"by must be one of {', '.join(get_args(TableBy))}, not {text[:40]!r}")


def parse_page(limit: str | None, offset: str | None) -> Page:
    """Raises: ValueError, the message begins with the name of the invalid parameter."""
    return Page(
        parse_number("limit", limit, Page.limit, 1, TABLE_ROWS_MAX),
        parse_number("offset", offset, Page.offset, 0, OFFSET_MAX),
    )


def parse_number(name: str, text: str | None, default: int, lowest: int, highest: int) -> int:
    if text is None:
        return default
    number = parse_digits(text)
    if number is None or not lowest <= number <= highest:
        raise ValueError(f"{name} must be a number from {lowest} to {highest}, not {text[:40]!r}")
    return number


def check_series_length(time_range: TimeRange, by: TableBy | None) -> None:
    """Raises: ValueError, the report would have too many rows."""
    if (
        by in INTERVAL_SECONDS
        and (time_range.until - time_range.since) / INTERVAL_SECONDS[by] > SERIES_MAX
    ):
        raise ValueError(f"since must be later: that is more than {SERIES_MAX} times one {by}")


async def usage_table(
    records: CallRecordStore,
    time_range: TimeRange,
    by: TableBy,
    principal: str | None,
    page: Page = FIRST_PAGE,
) -> Json:
    """Return the totals of a period, for each group and for all calls.

    principal: the caller whose calls are included; None for all.
    Raises: LedgerError.
    """
    query = usage_query(time_range, principal, page.limit + 1)
    rows = await group_rows(records, replace(query, offset=page.offset), by)
    has_more = len(rows) > page.limit
    if has_more or page.offset:
        ((_, grand_total),) = await records.totals(query)
    else:
        grand_total = sum_totals(totals for _, totals in rows)
    table = TableRows(rows[: page.limit], grand_total, has_more)
    return table_json(time_range, by, principal, table)


async def group_rows(
    records: CallRecordStore, query: UsageQuery, by: TableBy
) -> list[tuple[Json, Totals]]:
    """Return the names and the totals of groups. Raises: LedgerError."""
    if by == "user":
        return [(user_names(row), row.totals) for row in await records.totals_by_user(query)]
    return [({"name": name}, totals) for name, totals in await records.totals(query, by)]


def user_names(row: UserTotals) -> Json:
    return {"name": row.user, "principal": row.principal}


def usage_query(time_range: TimeRange, principal: str | None, limit: int) -> UsageQuery:
    return UsageQuery(
        since=time_range.since, until=time_range.until, principal=principal, limit=limit
    )


def table_json(
    time_range: TimeRange, by: TableBy, principal: str | None, table: TableRows = NO_ROWS
) -> Json:
    return {
        **time_range.to_json(),
        "principal": principal,
        "by": by,
        "totals": totals_json(table.grand_total),
        "rows": [names | totals_json(totals) for names, totals in table.rows],
        "has_more": table.has_more,
    }


async def usage_summary(ledger: Ledger, time_range: TimeRange, principal: str | None) -> Json:
    """Return the document of the dashboard without the latest calls. Raises: LedgerError."""
    query = usage_query(time_range, principal, SERIES_MAX)
    groups = await ledger.summarize(query, time_range.interval)
    users = await ledger.totals_by_user(replace(query, limit=GROUP_ROWS_MAX))
    rows = {
        by: [{"name": name, **totals_json(totals)} for name, totals in groups[by][:GROUP_ROWS_MAX]]
        for by in SUMMARY_GROUPS
    }
    intervals = groups[time_range.interval]
    return {
        **time_range.to_json(),
        "principal": principal,
        "totals": totals_json(sum_totals(totals for _, totals in intervals)),
        "step": time_range.interval,
        "series": time_series(intervals, time_range),
        "endpoints": rows["endpoint"],
        "routes": rows["route"],
        "principals": rows["principal"] if principal is None else None,
        "users": [user_names(row) | totals_json(row.totals) for row in users],
    }


def time_series(rows: Iterable[tuple[str, Totals]], time_range: TimeRange) -> list[Json]:
    """Return the totals of all intervals of a period, including those without calls."""
    length = MILLISECONDS[time_range.interval]
    totals_by_name = dict(rows)
    first, last = int(time_range.since * 1000) // length, int(time_range.until * 1000 - 1) // length
    return [
        {
            "at": format_time(number * length / 1000),
            **totals_json(totals_by_name.get(interval_name(number, time_range.interval), Totals())),
        }
        for number in range(first, last + 1)
    ]


async def latest_calls(
    records: CallRecordStore, time_range: TimeRange, principal: str | None
) -> list[Json]:
    """Raises: LedgerError."""
    query = usage_query(time_range, principal, LATEST_MAX)
    return [call_json(record) for record in await records.latest(query)]


async def start_rows(reader: QueryReader, time_range: TimeRange) -> list[Json]:
    """Return the starts of processes in a period, oldest first. Raises: LedgerError."""
    marks = await read_starts(reader, time_range.since, time_range.until)
    return [asdict(mark) | {"at": format_time(mark.at)} for mark in marks]


def call_json(record: CallRecord) -> Json:
    """Return a record without its internal fields, with the cost in USD.

    error: the proxy's error code, or else the type of fal's error.
    """
    fields_json = asdict(replace(record, units=None))
    spent = record.estimated if record.settled is None else record.settled
    for name in ("id", "user_id", "units", "estimated", "settled"):
        del fields_json[name]
    return fields_json | {
        "error": record.error or record.error_type,
        "user": record.user_id,
        "at": format_time(record.at),
        "spent": None if spent is None else spent / MICROS_PER_USD,
    }


def totals_json(totals: Totals) -> Json:
    """Return totals with amounts in USD.

    spent, saved: None if there were such calls, but the price of none is known.
    own_seconds, upstream_seconds: averages per call.
    """
    calls = totals.calls
    is_spent_unknown = totals.unpriced > 0 and totals.spent == 0
    own_seconds = totals.seconds - totals.upstream_seconds
    return {
        "calls": calls,
        "errors": totals.errors,
        "hits": totals.hits,
        "misses": totals.misses,
        "hit_rate": totals.hit_rate,
        "spent": None if is_spent_unknown else totals.spent / MICROS_PER_USD,
        "saved": None if totals.hits and not totals.saved else totals.saved / MICROS_PER_USD,
        "unpriced": totals.unpriced,
        "own_seconds": round(own_seconds / calls, 6) if calls else None,
        "upstream_seconds": round(totals.upstream_seconds / calls, 6) if calls else None,
    }


def sum_totals(several: Iterable[Totals]) -> Totals:
    items = list(several)
    return Totals(
        **{field.name: sum(getattr(item, field.name) for item in items) for field in fields(Totals)}
    )


def format_time(seconds: float) -> str:
    when = datetime.fromtimestamp(seconds, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
