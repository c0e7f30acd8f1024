"""What the ledger has about one request: its calls with their outcomes, and its jobs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from falproxy.stores.ledger import CallRecord, JobRow
from falproxy.stores.ledger.database import LedgerDatabase
from falproxy.stores.ledger.rows import Row, clean_text, job_from_row, record_from_row
from falproxy.stores.ledger.statements import JOB_SELECT_LIST, RECORD_COLUMNS

CALLS_MAX = 100  # calls of one id, which clients may use for several
OUTCOME = (
    "at", "status", "error", "error_type", "units", "settled", "ended_at", "run_ms",
    "stored_seconds",
)  # fmt: skip
RECORDS = f"""
    SELECT {", ".join(f"e.{name}" for name in RECORD_COLUMNS)},
        {", ".join(f"o.{name}" for name in OUTCOME)}
    FROM falproxy_entries AS e LEFT JOIN falproxy_outcomes AS o ON o.request_id = e.request_id
    WHERE e.request_id = CAST($1 AS TEXT) OR e.proxy_request_id = CAST($1 AS TEXT)
    ORDER BY e.at, e.id LIMIT $2
"""
OUTCOMES = f"""
    SELECT {", ".join(OUTCOME)} FROM falproxy_outcomes WHERE request_id = CAST($1 AS TEXT)
"""
JOBS = f"""
    SELECT {JOB_SELECT_LIST} FROM falproxy_jobs
    WHERE id = CAST($1 AS TEXT) OR request_id = CAST($1 AS TEXT) ORDER BY created_at, id LIMIT $2
"""


@dataclass(frozen=True, slots=True)
class RecordedOutcome:
    """The end of a queued job.

    at: when its result was first fetched.
    error: the proxy's error code, or else the type of fal's error.
    ended_at: when a poll first showed the end; None for jobs of older versions.
    run_seconds: time that the job ran at fal, without the time in the queue.
    stored_seconds: time to store the files of the result.
    """

    at: float
    status: int
    error: str | None
    units: Decimal | None
    settled: int | None
    ended_at: float | None
    run_seconds: float | None
    stored_seconds: float | None


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """record: as it was written at the end of the call, without the outcome."""

    record: CallRecord
    outcome: RecordedOutcome | None


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """calls, jobs: oldest first.
    outcome: of a job whose call is not recorded, such as one that was submitted elsewhere.
    has_more: there are more calls than CALLS_MAX.
    """

    calls: Sequence[RecordedCall]
    jobs: Sequence[JobRow]
    outcome: RecordedOutcome | None
    has_more: bool

    def __bool__(self) -> bool:
        return bool(self.calls or self.jobs or self.outcome)


async def read_request_trace(database: LedgerDatabase, request_id: str) -> RequestTrace:
    """Return what the ledger has about an id: fal's, the proxy's, or that of a job.

    All records are read to find it: use it for single requests. Raises: LedgerError.
    """
    given = clean_text(request_id)
    jobs = await read_jobs(database, [given])
    calls = await read_calls(database, [given, *fal_ids(jobs.values())])
    jobs |= await read_jobs(database, fal_ids(call.record for call in calls))
    outcome = None
    if not calls and (rows := await database.read(OUTCOMES, (given,))):
        outcome = outcome_from_row(rows[0])
    return RequestTrace(
        calls[:CALLS_MAX],
        sorted(jobs.values(), key=lambda job: (job.created_at, job.id)),
        outcome,
        len(calls) > CALLS_MAX,
    )


def fal_ids(rows: Iterable[JobRow | CallRecord]) -> list[str]:
    """Return fal's ids of rows, each one once."""
    named = dict.fromkeys(row.request_id for row in rows)
    return [name for name in named if name is not None][:CALLS_MAX]


async def read_calls(database: LedgerDatabase, ids: Iterable[str]) -> list[RecordedCall]:
    found: dict[str, RecordedCall] = {}
    for name in dict.fromkeys(ids):
        for row in await database.read(RECORDS, (name, CALLS_MAX + 1)):
            call = call_from_row(row)
            found[call.record.id] = call
    return sorted(found.values(), key=lambda call: (call.record.at, call.record.id))


async def read_jobs(database: LedgerDatabase, ids: Iterable[str]) -> dict[str, JobRow]:
    jobs: dict[str, JobRow] = {}
    for name in ids:
        rows = await database.read(JOBS, (name, CALLS_MAX))
        jobs |= {job.id: job for job in map(job_from_row, rows)}
    return jobs


def call_from_row(row: Row) -> RecordedCall:
    outcome = row[len(RECORD_COLUMNS) :]
    return RecordedCall(
        record_from_row(row[: len(RECORD_COLUMNS)]),
        None if outcome[0] is None else outcome_from_row(outcome),
    )


def outcome_from_row(row: Row) -> RecordedOutcome:
    at, status, error, error_type, units, settled, ended_at, run_ms, stored_seconds = row
    return RecordedOutcome(
        at / 1000,
        status,
        error or error_type,
        units and Decimal(units),
        settled,
        None if ended_at is None else ended_at / 1000,
        None if run_ms is None else run_ms / 1000,
        stored_seconds,
    )
