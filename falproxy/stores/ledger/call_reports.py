"""Single calls and performance as JSON documents and CSV: for `/api/usage/calls` and
`/api/usage/performance`."""

import csv
import io
import re
from collections.abc import Iterable, Mapping

from falproxy.fal.pricing import MICROS_PER_USD
from falproxy.stores.ledger.call_list import (
    EVERY_STATUS,
    STATES,
    CallPosition,
    CallQuery,
    ListedCall,
)
from falproxy.stores.ledger.performance import (
    QUANTILES,
    Durations,
    FailureKind,
    Performance,
)
from falproxy.stores.ledger.reports import Json, TimeRange, call_json, format_time

TEXT_MAX = 200  # characters of a filter
CURSOR = re.compile(r"(\d{1,15})-([\w-]{1,100})", re.ASCII)
STATUS = re.compile(r"([1-9]\d\d)|([1-9])xx", re.ASCII)
NUMBER = re.compile(r"\d{1,9}(\.\d{1,6})?", re.ASCII)
TEXT_FILTERS = ("endpoint", "principal", "user", "cache", "operation", "route", "error")
FILTERS = (*TEXT_FILTERS, "status", "min_seconds", "min_cost", "request_id")
# Columns of a call as CSV.
CSV_COLUMNS = (
    "at", "endpoint", "operation", "status", "error", "cache", "principal", "user", "spent",
    "total_seconds", "queue_seconds", "run_seconds", "own_seconds", "stored_seconds", "ended_at",
    "request_id", "proxy_request_id", "route",
)  # fmt: skip
# A spreadsheet would calculate texts that begin so.
FORMULA_START = ("=", "+", "-", "@", "\t", "\r")


def parse_call_query(
    filters: Mapping[str, str], time_range: TimeRange, caller: str | None
) -> CallQuery:
    """Return the query of filters by name, of which empty ones are left out.

    caller: the principal whose calls may be read; None for all.
    Raises: ValueError, the message begins with the name of the invalid parameter.
    """
    given = {name: text for name in FILTERS if (text := filters.get(name, "")) != ""}
    for name, text in given.items():
        if len(text) > TEXT_MAX:
            raise ValueError(f"{name} must have at most {TEXT_MAX} characters")
    state, statuses = parse_status(given.get("status"))
    return CallQuery(
        since=time_range.since,
        until=time_range.until,
        caller=caller,
        state=state,
        statuses=statuses,
        min_seconds=parse_decimal("min_seconds", given.get("min_seconds")),
        min_cost=parse_decimal("min_cost", given.get("min_cost")),
        request_id=given.get("request_id"),
        after=parse_cursor(filters.get("after")),
        **{name: given.get(name) for name in TEXT_FILTERS},
    )


def parse_status(text: str | None) -> tuple[str | None, tuple[int, int]]:
    """Return the state and the range of a filter such as `failed`, `502` or `5xx`. Raises:
    ValueError."""
    if text is None or text in STATES:
        return text, EVERY_STATUS
    match = STATUS.fullmatch(text)
    if match is None:
        states = ", ".join(STATES)
        raise ValueError(f"status must be {states}, 5xx or 502, not {text[:40]!r}")
    if match[1]:
        return None, (int(match[1]), int(match[1]))
    return None, (int(match[2]) * 100, int(match[2]) * 100 + 99)


def parse_decimal(name: str, text: str | None) -> float:
    if text is None:
        return 0.0
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{name} must be a number such as 2.5, not {text[:40]!r}")
    return float(text)


def parse_cursor(text: str | None) -> CallPosition | None:
    if not text:
        return None
    match = CURSOR.fullmatch(text)
    if match is None:
        raise ValueError("after must be the value of next of another page")
    return CallPosition(int(match[1]), match[2])


def format_cursor(position: CallPosition | None) -> str | None:
    return None if position is None else f"{position.at_ms}-{position.id}"


def listed_call_json(call: ListedCall) -> Json:
    return call_json(call.record) | {
        "id": call.record.id,
        "is_running": call.is_running,
        "ended_at": None if call.ended_at is None else format_time(call.ended_at),
        "fetched_at": None if call.fetched_at is None else format_time(call.fetched_at),
        "saved": saved(call),
        "total_seconds": rounded(call.total_seconds),
        "queue_seconds": rounded(call.queue_seconds),
        "run_seconds": rounded(call.run_seconds),
        "own_seconds": rounded(call.own_seconds),
        "stored_seconds": rounded(call.record.stored_seconds),
    }


def saved(call: ListedCall) -> float | None:
    record = call.record
    if record.cache not in ("hit", "collapsed") or record.estimated is None:
        return None
    return record.estimated / MICROS_PER_USD


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def call_page_json(
    time_range: TimeRange, calls: Iterable[ListedCall], after: CallPosition | None
) -> Json:
    """Return a page. next: its value for `after`, None if there are no more calls. searched_until:
    the time from which on all calls were searched."""
    return {
        **time_range.to_json(),
        "calls": [listed_call_json(call) for call in calls],
        "next": format_cursor(after),
        "searched_until": format_time(time_range.since if after is None else after.at_ms / 1000),
    }


def csv_head() -> str:
    return csv_lines([CSV_COLUMNS])


def calls_csv(calls: Iterable[ListedCall]) -> str:
    documents = map(listed_call_json, calls)
    return csv_lines([document[name] for name in CSV_COLUMNS] for document in documents)


def csv_lines(rows: Iterable[Iterable[object]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([csv_cell(value) for value in row] for row in rows)
    return file.getvalue()


def csv_cell(value: object) -> object:
    if isinstance(value, str) and value.startswith(FORMULA_START):
        return f"'{value}"
    return "" if value is None else value


def performance_json(found: Performance, previous: Durations | None = None) -> Json:
    intervals = found.intervals
    time_range = TimeRange(intervals.since, intervals.until)
    return {
        **time_range.to_json(),
        "step": intervals.step,
        "is_sample": found.is_sample,
        "durations": durations_json(found.total),
        "previous": None if previous is None else durations_json(previous),
        "series": [
            {
                "at": format_time(intervals.first + number * intervals.step),
                **durations_json(each),
                "failures": {str(status): count for status, count in sorted(failures.items())},
            }
            for number, (each, failures) in enumerate(
                zip(found.series, found.failures, strict=True)
            )
        ],
        "failures": [failure_json(kind) for kind in found.kinds],
    }


def durations_json(durations: Durations) -> Json:
    return {
        "calls": durations.calls,
        **{name: rounded(durations.quantiles.get(name)) for name in QUANTILES},
        "queue_seconds": rounded(durations.queue),
        "run_seconds": rounded(durations.run),
        "own_seconds": rounded(durations.own),
    }


def failure_json(kind: FailureKind) -> Json:
    return {
        "status": kind.status,
        "error": kind.error or None,
        "endpoint": kind.endpoint or None,
        "calls": kind.present,
        "previous": kind.previous,
        "first_at": format_time(kind.first_at),
        "last_at": format_time(kind.last_at),
    }
