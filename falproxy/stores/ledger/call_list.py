"""Single calls by filters, newest first, with their times: for the list of calls of the dashboard.

A page is found by reading rows in the order of time. The rows that one request reads are limited,
so that it takes as long with a million records as with a thousand; the next request continues.
"""

import time
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from falproxy.fal.pricing import MICROS_PER_USD
from falproxy.stores.ledger import CallRecord, QueryReader
from falproxy.stores.ledger.rows import MS_MAX, Row, clean_text, record_from_row, to_ms
from falproxy.stores.ledger.statements import RECORD_COLUMNS, merged_column

# Rows of one query: few at first, since most pages are full then.
SCAN_ROWS_MIN, SCAN_ROWS_MAX, SCAN_GROWTH = 250, 10_000, 6
SCAN_SECONDS = 0.1  # after which no further query is begun
MS = 1000

# Durations in milliseconds. A queued job takes until its end, and other calls until their response.
SUBMITTED = "e.operation = 'submit' AND e.status < 400 AND e.error IS NULL"
ENDED_AT = "COALESCE(o.ended_at, o.at)"
TOTAL_MS = f"CASE WHEN {SUBMITTED} THEN {ENDED_AT} - e.at ELSE e.seconds * {MS} END"
STATUS = "COALESCE(o.status, e.status)"
HAS_FAILED = f"({STATUS} >= 400 OR COALESCE(o.error, e.error) IS NOT NULL)"
IS_RUNNING = f"({SUBMITTED} AND o.request_id IS NULL)"
COST = "COALESCE(o.settled, e.settled, e.estimated, 0)"
STATES = ("failed", "ok", "running")
EVERY_STATUS = (0, 999)
OUTCOME_COLUMNS = "o.ended_at, o.at, o.run_ms"
CALL_COLUMNS = f"""
    {", ".join(merged_column(name) for name in RECORD_COLUMNS)}, {OUTCOME_COLUMNS}, e.status
"""


def matches(parameter: int, column: str) -> str:
    """Return the condition that a column has the value of a parameter, if that is not NULL."""
    value = f"CAST(${parameter} AS TEXT)"
    return f"({value} IS NULL OR {column} = {value})"


FILTERS = f"""
    {matches(7, "e.endpoint")} AND {matches(8, "e.user_id")} AND {matches(9, "e.cache")}
    AND {matches(10, "e.operation")} AND {matches(11, "e.route")}
    AND ({matches(12, "COALESCE(o.error, e.error)")} OR o.error_type = CAST($12 AS TEXT)
        OR e.error_type = CAST($12 AS TEXT))
    AND {STATUS} >= $13 AND {STATUS} <= $14
    AND (CAST($15 AS TEXT) IS NULL OR CASE CAST($15 AS TEXT) WHEN 'failed' THEN {HAS_FAILED}
        WHEN 'running' THEN {IS_RUNNING} ELSE NOT {HAS_FAILED} AND NOT {IS_RUNNING} END)
    AND (CAST($16 AS DOUBLE PRECISION) <= 0 OR {TOTAL_MS} >= CAST($16 AS DOUBLE PRECISION))
    AND (CAST($17 AS BIGINT) <= 0 OR {COST} >= CAST($17 AS BIGINT))
    AND (CAST($18 AS TEXT) IS NULL OR e.request_id = CAST($18 AS TEXT)
        OR e.proxy_request_id = CAST($18 AS TEXT) OR e.id = CAST($18 AS TEXT))
    AND {matches(19, "e.principal")}
"""
# The place of a row in the order of the list.
BEFORE = "at <= $3 AND (at < $3 OR id < CAST($4 AS TEXT))"


def scanned_rows(columns: str, own_calls: str) -> str:
    return f"""
        SELECT {columns} FROM falproxy_entries WHERE at >= $1 AND at < $2 AND {BEFORE} {own_calls}
        ORDER BY at DESC, id DESC
    """


OWN_CALLS = "AND principal = $5"
EVERY_CALL = "AND CAST($5 AS TEXT) IS NULL"


def page_query(own_calls: str) -> str:
    return f"""
        SELECT {CALL_COLUMNS} FROM ({scanned_rows("*", own_calls)} LIMIT $20) AS e
        LEFT JOIN falproxy_outcomes AS o ON o.request_id = e.request_id
        WHERE {FILTERS} ORDER BY e.at DESC, e.id DESC LIMIT $6
    """


def last_scanned_query(own_calls: str) -> str:
    return f"{scanned_rows('at, id', own_calls)} LIMIT 1 OFFSET $6"


# By whether the calls of one caller only are read.
PAGE_QUERIES = {True: page_query(OWN_CALLS), False: page_query(EVERY_CALL)}
LAST_SCANNED_QUERIES = {
    True: last_scanned_query(OWN_CALLS),
    False: last_scanned_query(EVERY_CALL),
}


class CallPosition(NamedTuple):
    """The place of a call in the list. at_ms: milliseconds since 1970."""

    at_ms: int
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallQuery:
    """Filters, all of which a call has to match; None matches all calls.

    since, until: seconds since 1970; `until` is exclusive.
    caller: the principal whose calls may be read; None for all.
    error: the proxy's error code, or the type of fal's error.
    statuses: lowest and highest status.
    state: one of STATES. A running call is a job whose result was not fetched.
    min_seconds: lowest duration, until the end of a job.
    min_cost: lowest cost in USD.
    request_id: fal's id or the proxy's own.
    """

    since: float = 0.0
    until: float = inf
    caller: str | None = None
    endpoint: str | None = None
    principal: str | None = None
    user: str | None = None
    cache: str | None = None
    operation: str | None = None
    route: str | None = None
    error: str | None = None
    statuses: tuple[int, int] = EVERY_STATUS
    state: str | None = None
    min_seconds: float = 0.0
    min_cost: float = 0.0
    request_id: str | None = None
    after: CallPosition | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedCall:
    """A call with the times of its parts, in seconds; None if unknown.

    record: with its outcome.
    ended_at: when the caller could know of the end of the job.
    fetched_at: when its result was recorded.
    total_seconds: as the caller waits: until the end of a job, or the response of another call.
    run_seconds: at fal, without the queue; of a call that is not queued, fal's whole share.
    queue_seconds: the rest, of a job whose run time is known.
    own_seconds: the proxy's share.
    """

    record: CallRecord
    ended_at: float | None = None
    fetched_at: float | None = None
    total_seconds: float | None = None
    queue_seconds: float | None = None
    run_seconds: float | None = None
    own_seconds: float = 0.0
    is_running: bool = False


async def list_calls(
    reader: QueryReader, query: CallQuery, limit: int
) -> tuple[list[ListedCall], CallPosition | None]:
    """Return at most `limit` calls, and where to continue; None if there are no more.

    There may be more although there are fewer calls than `limit`. Raises: LedgerError.
    """
    deadline = time.monotonic() + SCAN_SECONDS
    is_own = query.caller is not None
    found: list[ListedCall] = []
    position = query.after or CallPosition(MS_MAX, "")
    scan_rows = SCAN_ROWS_MIN
    while True:
        row = query_row(query, position, limit + 1 - len(found))
        rows = await reader.read(PAGE_QUERIES[is_own], (*row, scan_rows))
        found += map(call_from_row, rows)
        if len(found) > limit:
            return found[:limit], position_of_call(found[limit - 1])
        last = await reader.read(LAST_SCANNED_QUERIES[is_own], (*row[:5], scan_rows - 1))
        if not last:
            return found, None
        position = CallPosition(*last[0])
        if time.monotonic() > deadline:
            return found, position
        scan_rows = min(SCAN_GROWTH * scan_rows, SCAN_ROWS_MAX)


def query_row(query: CallQuery, position: CallPosition, limit: int) -> Row:
    texts = (query.endpoint, query.user, query.cache, query.operation, query.route, query.error)
    return (
        to_ms(query.since), to_ms(query.until), *position, query.caller, limit,
        *map(clean, texts), *query.statuses, query.state, query.min_seconds * MS,
        round(query.min_cost * MICROS_PER_USD), clean(query.request_id), clean(query.principal),
    )  # fmt: skip


def clean(text: str | None) -> str | None:
    return None if text is None else clean_text(text)


def call_from_row(row: Row) -> ListedCall:
    *columns, ended_ms, fetched_ms, run_ms, own_status = row
    record = record_from_row(columns)
    is_job = record.operation == "submit" and own_status < 400
    own_seconds = max(0.0, record.seconds - record.upstream_seconds)
    if not is_job:
        return ListedCall(
            record=record,
            total_seconds=record.seconds,
            run_seconds=record.upstream_seconds or None,
            own_seconds=own_seconds,
        )
    end = fetched_ms if ended_ms is None else ended_ms
    total = None if end is None else max(0.0, end / MS - record.at)
    run = None if run_ms is None or total is None else min(run_ms / MS, total)
    return ListedCall(
        record=record,
        ended_at=None if end is None else end / MS,
        fetched_at=None if fetched_ms is None else fetched_ms / MS,
        total_seconds=total,
        queue_seconds=None if run is None or total is None else max(0.0, total - run - own_seconds),
        run_seconds=run,
        own_seconds=own_seconds,
        is_running=fetched_ms is None and record.error is None,
    )


def position_of_call(call: ListedCall) -> CallPosition:
    return CallPosition(to_ms(call.record.at), call.record.id)
