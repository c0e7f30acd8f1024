"""Rows of a ledger's tables, to and from what is written there."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from math import isfinite
from operator import attrgetter
from typing import Any, get_type_hints

from falproxy.fal.results import FalImage
from falproxy.stores.ledger import (
    CallRecord,
    GroupBy,
    Interval,
    JobRow,
    Lease,
    Outcome,
    Totals,
    UsageQuery,
)
from falproxy.stores.ledger.statements import (
    ENTRY_COLUMNS,
    JOB_COLUMNS,
    JOB_INPUT_COLUMNS,
    JOB_UPDATE_COLUMNS,
    MILLISECONDS,
    SUMMARY_GROUPS,
)

# What a database gives and takes: text, whole numbers, floats and None.
Row = Sequence[Any]

TEXT_MAX = 500
UNTRUNCATED_COLUMNS = ("id", "owner", "app", "request_id", "key_mark")
MS_MAX = 2**62  # milliseconds: after all that will ever be written
INTERVAL_FORMATS: dict[Interval, str] = {
    "minute": "%Y-%m-%dT%H:%MZ",
    "hour": "%Y-%m-%dT%H:00Z",
    "day": "%Y-%m-%d",
}

record_values = attrgetter(*ENTRY_COLUMNS)
AT_POSITION, UNITS_POSITION = ENTRY_COLUMNS.index("at"), ENTRY_COLUMNS.index("units")
TEXT_POSITIONS = [
    place
    for place, name in enumerate(ENTRY_COLUMNS)
    if get_type_hints(CallRecord)[name] in (str, str | None) and name != "id"
]


def to_ms(seconds: float) -> int:
    return round(seconds * 1000) if isfinite(seconds) else MS_MAX


def clean_text(value: str) -> str:
    """What clients and fal named, fit for every database: PostgreSQL takes no NUL."""
    if value.isascii() and len(value) <= TEXT_MAX and "\0" not in value:
        return value  # nearly always
    return value[:TEXT_MAX].encode(errors="replace").decode().replace("\0", "\ufffd")


def column_value(value: object) -> object:
    """A field as it is written."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Decimal):
        return str(value)
    return value


def record_to_row(record: CallRecord) -> Row:
    """There is one for every call: no field is looked at that cannot be odd."""
    row = list(record_values(record))
    row[AT_POSITION] = to_ms(record.at)
    for place in TEXT_POSITIONS:
        if (value := row[place]) is not None:
            row[place] = clean_text(value)
    if record.units is not None:
        row[UNITS_POSITION] = str(record.units)
    return row


def record_from_row(row: Row) -> CallRecord:
    fields = dict(zip(ENTRY_COLUMNS, row, strict=True))
    units = fields["units"]
    return CallRecord(**fields | {"at": fields["at"] / 1000, "units": units and Decimal(units)})


def outcome_to_row(outcome: Outcome) -> Row:
    values = outcome.status, outcome.error, outcome.units, outcome.settled
    # Cut as the entry's is, so that the two still find each other.
    return tuple(map(column_value, (outcome.request_id, *values)))


def query_to_row(query: UsageQuery) -> Row:
    principal = query.principal
    return (
        to_ms(query.since),
        to_ms(query.until),
        None if principal is None else clean_text(principal),
        query.limit,
    )


def totals_from_row(row: Row, by: GroupBy | None) -> tuple[str, Totals]:
    name, *sums = row
    if by == "minute" or by == "hour" or by == "day":
        name = interval_name(int(name), by)
    return name, Totals(**dict(zip(Totals.__dataclass_fields__, sums, strict=True)))


def interval_name(number: int, interval: Interval) -> str:
    """The name of a stretch of time, the first of which began with 1970."""
    start = datetime.fromtimestamp(number * MILLISECONDS[interval] / 1000, UTC)
    return start.strftime(INTERVAL_FORMATS[interval])


def summaries_from_rows(
    rows: Sequence[Row], interval: Interval
) -> dict[GroupBy, list[tuple[str, Totals]]]:
    found: dict[GroupBy, list[tuple[str, Totals]]] = {by: [] for by in (interval, *SUMMARY_GROUPS)}
    for by, *sums in rows:
        found[by].append(totals_from_row(sums, by))
    return found


def job_values(names: Sequence[str], job: JobRow) -> list[object]:
    return [job_value(name, getattr(job, name)) for name in names]


def job_value(name: str, value: object) -> object:
    """What says whose the job is stays as it is; if it cannot be written, the job is refused."""
    if isinstance(value, tuple):
        return json.dumps([asdict(picture) for picture in value])
    return value if name in UNTRUNCATED_COLUMNS else column_value(value)


def job_to_row(job: JobRow, lease: Lease) -> Row:
    return (*job_values(JOB_INPUT_COLUMNS, job), *lease_to_row(lease))


def job_update_row(job: JobRow) -> Row:
    return (job.id, *job_values(JOB_UPDATE_COLUMNS, job))


def lease_to_row(lease: Lease) -> tuple[str, int]:
    return lease.owner, to_ms(lease.seconds)


def job_from_row(row: Row) -> JobRow:
    fields = dict(zip(JOB_COLUMNS, row, strict=True))
    fields["images"] = tuple(FalImage(**each) for each in json.loads(fields["images"]))
    for name in ("created_at", "updated_at", "finished_at"):
        fields[name] = None if fields[name] is None else fields[name] / 1000
    return JobRow(**fields)
