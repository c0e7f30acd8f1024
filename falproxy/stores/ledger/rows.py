"""Conversion between data classes and rows of the tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
    JobPosition,
    JobQuery,
    JobRow,
    Lease,
    Outcome,
    Totals,
    UsageQuery,
    UserTotals,
)
from falproxy.stores.ledger.statements import (
    JOB_COLUMNS,
    JOB_INPUT_COLUMNS,
    JOB_UPDATE_COLUMNS,
    MILLISECONDS,
    RECORD_COLUMNS,
)
from falproxy.stores.ledger.totals_queries import SUMMARY_GROUPS

# Values of the columns: str, int, float and None.
Row = Sequence[Any]

TEXT_MAX = 500
UNTRUNCATED_COLUMNS = ("id", "owner", "app", "request_id", "key_mark")
MS_MAX = 2**62  # milliseconds; stands for infinity
INTERVAL_FORMATS: dict[Interval, str] = {
    "minute": "%Y-%m-%dT%H:%MZ",
    "hour": "%Y-%m-%dT%H:00Z",
    "day": "%Y-%m-%d",
}

record_values = attrgetter(*RECORD_COLUMNS)
AT_POSITION, UNITS_POSITION = RECORD_COLUMNS.index("at"), RECORD_COLUMNS.index("units")
TEXT_POSITIONS = [
    position
    for position, name in enumerate(RECORD_COLUMNS)
    if get_type_hints(CallRecord)[name] in (str, str | None) and name != "id"
]


TEXT_FIELDS = {
    kind: [
        name
        for name, annotation in get_type_hints(kind).items()
        if annotation in (str, str | None) and name not in UNTRUNCATED_COLUMNS
    ]
    for kind in (CallRecord, Outcome)
}


def to_ms(seconds: float) -> int:
    return round(seconds * 1000) if isfinite(seconds) else MS_MAX


def clean_text(value: str) -> str:
    """Truncate text, and replace characters that PostgreSQL rejects: NUL and surrogates."""
    if value.isascii() and len(value) <= TEXT_MAX and "\0" not in value:
        return value  # the fast path
    return value[:TEXT_MAX].encode(errors="replace").decode().replace("\0", "\ufffd")


def truncate(row: CallRecord | Outcome) -> CallRecord | Outcome:
    """Return a row with texts of at most TEXT_MAX characters: rows wait in memory, and their texts
    are those of clients."""
    names = TEXT_FIELDS[type(row)]
    long = [name for name in names if len(getattr(row, name) or "") > TEXT_MAX]
    if not long:
        return row
    changes: dict[str, Any] = {name: clean_text(getattr(row, name)) for name in long}
    return replace(row, **changes)


def column_value(value: object) -> object:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Decimal):
        return str(value)
    return value


IMAGE_KIND = ("kind", "image")


def record_to_row(record: CallRecord) -> Row:
    """Convert a record, of which there is one for every call: only fields with values that
    databases may reject are converted."""
    row = list(record_values(record))
    row[AT_POSITION] = to_ms(record.at)
    for position in TEXT_POSITIONS:
        if (value := row[position]) is not None:
            row[position] = clean_text(value)
    if record.units is not None:
        row[UNITS_POSITION] = str(record.units)
    return row


def record_from_row(row: Row) -> CallRecord:
    fields = dict(zip(RECORD_COLUMNS, row, strict=True))
    units = fields["units"]
    return CallRecord(**fields | {"at": fields["at"] / 1000, "units": units and Decimal(units)})


def outcome_to_row(outcome: Outcome) -> Row:
    values = outcome.status, outcome.error, outcome.units, outcome.settled
    times = [
        None if each is None else to_ms(each) for each in (outcome.ended_at, outcome.run_seconds)
    ]
    # The request id is truncated as that of the record, so that the two still match.
    later = outcome.error_type, *times, outcome.stored_seconds
    return tuple(map(column_value, (outcome.request_id, *values, *later)))


def query_to_row(query: UsageQuery) -> Row:
    principal = query.principal
    return (
        to_ms(query.since),
        to_ms(query.until),
        None if principal is None else clean_text(principal),
        query.limit,
        query.offset,
    )


def totals_from_row(row: Row, by: GroupBy | None) -> tuple[str, Totals]:
    name, *sums = row
    if by == "minute" or by == "hour" or by == "day":
        name = interval_name(int(name), by)
    return name, totals_from_sums(sums)


def user_totals_from_row(row: Row) -> UserTotals:
    principal, user, *sums = row
    return UserTotals(principal, user, totals_from_sums(sums))


def totals_from_sums(sums: Row) -> Totals:
    return Totals(**dict(zip(Totals.__dataclass_fields__, sums, strict=True)))


def interval_name(number: int, interval: Interval) -> str:
    """Return the name of an interval by its number, counted from the start of 1970."""
    start = datetime.fromtimestamp(number * MILLISECONDS[interval] / 1000, UTC)
    return start.strftime(INTERVAL_FORMATS[interval])


def summaries_from_rows(
    rows: Sequence[Row], interval: Interval
) -> dict[GroupBy, list[tuple[str, Totals]]]:
    groups: dict[GroupBy, list[tuple[str, Totals]]] = {by: [] for by in (interval, *SUMMARY_GROUPS)}
    for by, *totals_row in rows:
        groups[by].append(totals_from_row(totals_row, by))
    return groups


def job_values(names: Sequence[str], job: JobRow) -> list[object]:
    return [job_value(name, getattr(job, name)) for name in names]


def job_value(name: str, value: object) -> object:
    """Convert a field. Ids and the owner stay unchanged: the database rejects a job with invalid
    ones."""
    if isinstance(value, tuple):
        return json.dumps([image_to_document(image) for image in value])
    if isinstance(value, Mapping):
        return json.dumps(value)
    return value if name in UNTRUNCATED_COLUMNS else column_value(value)


def image_to_document(image: FalImage) -> dict[str, object]:
    """Return the fields of an image. Versions that only know images have no field `kind`."""
    return {name: value for name, value in asdict(image).items() if (name, value) != IMAGE_KIND}


def job_to_row(job: JobRow, lease: Lease) -> Row:
    return (*job_values(JOB_INPUT_COLUMNS, job), *lease_to_row(lease))


def job_update_row(job: JobRow) -> Row:
    return (job.id, *job_values(JOB_UPDATE_COLUMNS, job))


def lease_to_row(lease: Lease) -> tuple[str, int]:
    return lease.owner, to_ms(lease.seconds)


def job_query_to_row(query: JobQuery) -> Row:
    """Return the parameters of a query, whose first page begins at either end of time."""
    first = JobPosition(-1 if query.is_ascending else MS_MAX, "")
    return (query.owner, query.api, *(query.after or first), query.limit)


def job_from_row(row: Row) -> JobRow:
    fields = dict(zip(JOB_COLUMNS, row, strict=True))
    fields["images"] = tuple(FalImage(**image) for image in json.loads(fields["images"]))
    fields["details"] = json.loads(fields["details"])
    for name in ("created_at", "updated_at", "finished_at"):
        fields[name] = None if fields[name] is None else fields[name] / 1000
    return JobRow(**fields)
