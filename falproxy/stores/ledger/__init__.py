"""The ledger: usage records of calls, their cost, and the jobs of the generate and videos APIs.

This module has the data classes and the interface of backends. Calls are recorded through
`writer.LedgerWriter`, which does not delay them. Amounts are micro-USD.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from math import inf
from typing import Any, Literal, NamedTuple, Protocol, Self
from uuid import uuid4

from falproxy.fal.results import FalImage
from falproxy.ids import new_id

GroupBy = Literal["endpoint", "principal", "route", "minute", "hour", "day"]
Interval = Literal["minute", "hour", "day"]
JobStatus = Literal["queued", "running", "completed", "failed"]
JobApi = Literal["generate", "videos"]

# Cache outcomes of calls that paid nothing; such calls saved their price.
FREE_OUTCOMES = ("hit", "collapsed", "replayed")
UNFINISHED_STATUSES = ("queued", "running")
CLAIM_BATCH_SIZE = 100


class LedgerError(Exception):
    """The ledger cannot be used: it is unreachable, slow, full or read-only."""


class InvalidRowError(LedgerError):
    """The database rejects the content of a row. Other rows can be written."""


class SchemaError(LedgerError):
    """The schema is of a newer version of falproxy, with which this one cannot work. The message
    has instructions."""


def new_job_id() -> str:
    return uuid4().hex


@dataclass(slots=True, kw_only=True)  # a frozen class takes three times as long to create
class CallRecord:
    """One model call (run, stream or submit) on any route. Requests for status or result of a job
    have no record.

    id: identifies a row that is written again because its first write was not confirmed.
    at: start, in seconds since 1970 with millisecond precision.
    request_id: fal's id.
    proxy_request_id: the proxy's own id, as in the access log and in `X-Request-ID`.
    error: error code.
    error_type: type of fal's error, such as `content_policy_violation`.
    cache: hit, miss, collapsed, bypass, or replayed for the response of an earlier call.
    seconds: total duration, in the proxy and at fal.
    units: fal's billable units.
    estimated: expected price, or the price that a cache hit saved.
    settled: actual price, if known; 0 for a call that was not sent to fal.
    stored_seconds: time to store the files of the result; None if it has none.
    """

    at: float
    route: str
    status: int
    principal: str | None = None
    user_id: str | None = None
    operation: str | None = None
    endpoint: str | None = None
    request_id: str | None = None
    error: str | None = None
    cache: str | None = None
    seconds: float = 0.0
    upstream_seconds: float = 0.0
    units: Decimal | None = None
    estimated: int | None = None
    settled: int | None = None
    proxy_request_id: str | None = None
    error_type: str | None = None
    stored_seconds: float | None = None
    id: str = field(default_factory=new_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a queued job, recorded when its result is fetched.

    It completes the record with the same request id, in whichever order the two are written. If
    written again, fields that are None keep their value. A success (status below 400) is final, and
    replaces a failure.

    error_type: type of fal's error.
    ended_at: when the caller could first know of the end, in seconds since 1970; the first value is
        kept. None leaves the time of the write.
    run_seconds: time that the job ran at fal, without the time in the queue.
    stored_seconds: time to store the files of the result, when it was fetched first.
    """

    request_id: str
    status: int
    error: str | None = None
    units: Decimal | None = None
    settled: int | None = None
    error_type: str | None = None
    ended_at: float | None = None
    run_seconds: float | None = None
    stored_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ProcessStart:
    """The start of a process of the proxy.

    host: name of the machine or container.
    at: seconds since 1970.
    id: identifies a row that is written again.
    """

    version: str
    host: str
    at: float
    id: str = field(default_factory=new_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuery:
    """Filter of records.

    since, until: seconds since 1970; `until` is exclusive.
    principal: None for all principals; empty for the calls without one.
    limit: maximum number of rows returned.
    offset: number of rows before the first one returned.
    """

    since: float = 0.0
    until: float = inf
    principal: str | None = None
    limit: int = 1000
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over records.

    errors: responses with a status of 400 or above, and failed jobs.
    hits, misses: of cacheable calls; a call that shared the job of another one is a hit.
    unpriced: successful, paid calls of unknown price, which `spent` does not include.
    spent, saved: micro-USD. A hit spends nothing and saves its estimated price.
    """

    calls: int = 0
    errors: int = 0
    hits: int = 0
    misses: int = 0
    unpriced: int = 0
    spent: int = 0
    saved: int = 0
    seconds: float = 0.0
    upstream_seconds: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        cacheable = self.hits + self.misses
        return self.hits / cacheable if cacheable else None


@dataclass(frozen=True, slots=True)
class UserTotals:
    """The totals of one user of one principal; empty for calls without one. Users of the same name
    of two principals are two persons."""

    principal: str
    user: str
    totals: Totals


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A job.

    api: through which it was created.
    owner: the caller that may read it.
    app: the path before `/requests/` in fal's URLs.
    request_id: fal's id; None until fal has accepted the job.
    key_mark: fingerprint of the fal key.
    images: all files of the result.
    error: error code.
    details: further facts about the request and the result, as JSON.
    position: in fal's queue, if the job waits there; not stored.
    created_at, updated_at, finished_at: seconds since 1970, set by the ledger.
    """

    id: str = field(default_factory=new_job_id)
    owner: str
    user_id: str | None = None
    model: str
    endpoint: str
    app: str = ""
    request_id: str | None = None
    key_mark: str = ""
    status: JobStatus = "queued"
    images: tuple[FalImage, ...] = ()
    error: str | None = None
    error_message: str | None = None
    estimated: int | None = None
    settled: int | None = None
    api: JobApi = "generate"
    details: Mapping[str, object] = field(default_factory=dict)
    created_at: float = 0.0
    updated_at: float = 0.0
    finished_at: float | None = None
    position: int | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of a process to follow a job.

    owner: unique name of the process.
    seconds: time after which the lease expires, unless the process renews it.
    api: whose jobs the process follows.
    """

    owner: str
    seconds: float
    api: JobApi = "generate"


class JobPosition(NamedTuple):
    """The place of a job in the list of jobs. created_ms: milliseconds since 1970."""

    created_ms: int
    id: str


def position_of(job: JobRow) -> JobPosition:
    return JobPosition(round(job.created_at * 1000), job.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobQuery:
    """A page of the jobs that an owner has in an API, newest first.

    after: place of the last job of the page before; None for the first page.
    """

    owner: str
    api: JobApi
    after: JobPosition | None = None
    limit: int = 20
    is_ascending: bool = False


class CallRecordStore(Protocol):
    """Records of calls. Every method raises LedgerError, and may be called again after that."""

    async def write(self, rows: Sequence[CallRecord | Outcome]) -> None:
        """Write all rows or none. Rows that exist already stay unchanged.

        Raises: InvalidRowError, a row will never be accepted.
        """

    async def totals(
        self, query: UsageQuery, by: GroupBy | None = None
    ) -> list[tuple[str, Totals]]:
        """Return the totals of each group by name.

        by: None returns one row without a name. Intervals are named `2026-11-21` or
            `2026-11-21T09:00Z`, oldest first, without those that have no calls. Other groups are
            ordered by cost, highest first.
        """

    async def totals_by_user(self, query: UsageQuery) -> list[UserTotals]:
        """Return the totals of each user, ordered by cost, highest first."""

    async def latest(self, query: UsageQuery) -> list[CallRecord]:
        """Return records with their outcomes, newest first."""

    async def add_start(self, start: ProcessStart) -> None:
        """Record the start of a process, which `process_starts` reads. One that exists already
        stays unchanged."""

    async def delete_before(self, before: float) -> int:
        """Delete records and starts older than this time, and jobs finished before it. Return the
        number of deleted records."""

    async def count_before(self, before: float) -> int:
        """Return the number of records older than this time."""


class Jobs(Protocol):
    """Jobs. Every method raises LedgerError."""

    async def probe(self) -> None:
        """Check that the ledger can be written."""

    async def add_job(self, job: JobRow, lease: Lease) -> JobRow:
        """Return the job as it is stored, leased to the owner of the lease."""

    async def save_job(self, job: JobRow) -> JobRow | None:
        """Update the mutable fields of an unfinished job: fal's ids, status, images, error, cost,
        details.

        Return None, and change nothing, if the job is finished or unknown.
        """

    async def get_job(self, job_id: str, owner: str) -> JobRow | None: ...

    async def list_jobs(self, query: JobQuery) -> list[JobRow]: ...

    async def delete_job(self, job_id: str, owner: str) -> bool:
        """Return False if there is no such job."""

    async def delete_jobs_before(self, before: float) -> int:
        """Delete jobs that finished before this time. Return their number."""

    async def count_jobs_before(self, before: float) -> int:
        """Return the number of jobs that finished before this time."""

    async def claim_jobs(self, lease: Lease, limit: int = CLAIM_BATCH_SIZE) -> list[JobRow]:
        """Renew all leases of the owner, then take over unfinished jobs of its API whose lease
        has expired.

        Return the jobs taken over, oldest first. No other process gets the same ones.
        """


class Summaries(Protocol):
    async def sum_periods(self, until: float, limit: int) -> int:
        """Compute the sums of at most `limit` hours, days and months that ended before this time,
        for which there are new records or outcomes. Totals are computed from sums where these are
        current. Return the number of periods; 0 also if another process changes the ledger.
        Raises: LedgerError."""

    async def summarize(
        self, query: UsageQuery, interval: Interval
    ) -> dict[GroupBy, list[tuple[str, Totals]]]:
        """Return the `totals` by interval, endpoint, principal and route, at the cost of one of
        these queries; each list has at most `limit` rows. Raises: LedgerError."""


class QueryReader(Protocol):
    """Runs the queries of `call_list` and `performance`."""

    async def read(self, statement: str, row: Sequence[Any] = ()) -> list[Sequence[Any]]:
        """Return the rows of one query. Raises: LedgerError."""


class Ledger(CallRecordStore, Jobs, Summaries, QueryReader, Protocol):
    """The complete interface. The database is opened by the first operation, and again by later
    ones if that failed."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def probe(self) -> None:
        """Check that the ledger can be written.

        Raises: LedgerError; SchemaError, this version cannot work with the schema.
        """
