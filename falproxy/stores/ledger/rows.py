"""Rows of a ledger's tables, to and from what is written there."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from math import isfinite
from operator import attrgetter
from typing import Any, get_type_hints

from falproxy.fal.results import Picture
from falproxy.stores.ledger import By, Entry, JobRow, Lease, Outcome, Question, Step, Totals
from falproxy.stores.ledger.statements import (
    ENTRY_COLUMNS,
    JOB_CHANGED,
    JOB_COLUMNS,
    JOB_GIVEN,
    MILLISECONDS,
    PARTED,
)

# What a database gives and takes: text, whole numbers, floats and None.
Row = Sequence[Any]

TEXT_MAX = 500
EXACT = ("id", "owner", "app", "request_id", "key_mark")
LAST = 2**62  # milliseconds: after all that will ever be written
NAMES: dict[Step, str] = {
    "minute": "%Y-%m-%dT%H:%MZ",
    "hour": "%Y-%m-%dT%H:00Z",
    "day": "%Y-%m-%d",
}

entry_values = attrgetter(*ENTRY_COLUMNS)
AT, UNITS = ENTRY_COLUMNS.index("at"), ENTRY_COLUMNS.index("units")
TEXTS = [
    place
    for place, name in enumerate(ENTRY_COLUMNS)
    if get_type_hints(Entry)[name] in (str, str | None) and name != "id"
]


def to_ms(seconds: float) -> int:
    return round(seconds * 1000) if isfinite(seconds) else LAST


def text(value: str) -> str:
    """What clients and fal named, fit for every database: PostgreSQL takes no NUL."""
    if value.isascii() and len(value) <= TEXT_MAX and "\0" not in value:
        return value  # nearly always
    return value[:TEXT_MAX].encode(errors="replace").decode().replace("\0", "\ufffd")


def plain(value: object) -> object:
    """A field as it is written."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Decimal):
        return str(value)
    return value


def entry_to_row(entry: Entry) -> Row:
    """There is one for every call: no field is looked at that cannot be odd."""
    row = list(entry_values(entry))
    row[AT] = to_ms(entry.at)
    for place in TEXTS:
        if (value := row[place]) is not None:
            row[place] = text(value)
    if entry.units is not None:
        row[UNITS] = str(entry.units)
    return row


def entry_from_row(row: Row) -> Entry:
    fields = dict(zip(ENTRY_COLUMNS, row, strict=True))
    units = fields["units"]
    return Entry(**fields | {"at": fields["at"] / 1000, "units": units and Decimal(units)})


def outcome_to_row(outcome: Outcome) -> Row:
    values = outcome.status, outcome.error, outcome.units, outcome.settled
    # Cut as the entry's is, so that the two still find each other.
    return tuple(map(plain, (outcome.request_id, *values)))


def question_to_row(question: Question) -> Row:
    principal = question.principal
    return (
        to_ms(question.since),
        to_ms(question.until),
        None if principal is None else text(principal),
        question.limit,
    )


def totals_from_row(row: Row, by: By | None) -> tuple[str, Totals]:
    name, *sums = row
    if by == "minute" or by == "hour" or by == "day":
        name = step_name(int(name), by)
    return name, Totals(**dict(zip(Totals.__dataclass_fields__, sums, strict=True)))


def step_name(number: int, step: Step) -> str:
    """The name of a stretch of time, the first of which began with 1970."""
    start = datetime.fromtimestamp(number * MILLISECONDS[step] / 1000, UTC)
    return start.strftime(NAMES[step])


def overview_from_rows(rows: Sequence[Row], step: Step) -> dict[By, list[tuple[str, Totals]]]:
    found: dict[By, list[tuple[str, Totals]]] = {by: [] for by in (step, *PARTED)}
    for by, *sums in rows:
        found[by].append(totals_from_row(sums, by))
    return found


def job_values(names: Sequence[str], job: JobRow) -> list[object]:
    return [job_value(name, getattr(job, name)) for name in names]


def job_value(name: str, value: object) -> object:
    """What says whose the job is stays as it is; if it cannot be written, the job is refused."""
    if isinstance(value, tuple):
        return json.dumps([asdict(picture) for picture in value])
    return value if name in EXACT else plain(value)


def job_to_row(job: JobRow, lease: Lease) -> Row:
    return (*job_values(JOB_GIVEN, job), *lease_to_row(lease))


def job_changes(job: JobRow) -> Row:
    return (job.id, *job_values(JOB_CHANGED, job))


def lease_to_row(lease: Lease) -> tuple[str, int]:
    return lease.follower, to_ms(lease.seconds)


def job_from_row(row: Row) -> JobRow:
    fields = dict(zip(JOB_COLUMNS, row, strict=True))
    fields["images"] = tuple(Picture(**each) for each in json.loads(fields["images"]))
    for name in ("created_at", "updated_at", "finished_at"):
        fields[name] = None if fields[name] is None else fields[name] / 1000
    return JobRow(**fields)
