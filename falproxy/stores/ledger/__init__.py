"""What was called, what it cost, and the jobs of clients: what a ledger does, by Protocol.

Calls are written through `ledger.book`, off their own path. Money is micro-USD.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from math import inf
from typing import Literal, Protocol, Self
from uuid import uuid4

from falproxy.fal.results import FalImage
from falproxy.ids import new_id

GroupBy = Literal["endpoint", "principal", "route", "minute", "hour", "day"]
Interval = Literal["minute", "hour", "day"]
JobStatus = Literal["queued", "running", "completed", "failed"]

# Cache outcomes of calls that bought nothing; they saved their price.
REUSED_OUTCOMES = ("hit", "collapsed")
UNFINISHED_STATUSES = ("queued", "running")
CLAIM_BATCH_SIZE = 100


class LedgerError(Exception):
    """The ledger cannot be used: it is away, slow, full, or read only."""


class InvalidRowError(LedgerError):
    """A row was not taken, for what it holds. The ledger is well otherwise."""


class SchemaError(LedgerError):
    """The ledger was made by a newer falproxy. The message says what to do."""


def new_job_id() -> str:
    return uuid4().hex


@dataclass(slots=True, kw_only=True)  # one that is frozen takes three times as long to make
class CallRecord:
    """One model call: a run, a stream or a submit, on whatever route it came. What is asked
    about a job afterwards is none.

    at: seconds since 1970, kept to the millisecond. request_id: fal's. error: the word programs
    may test. cache: hit, miss, collapsed or bypass. seconds: ours and fal's together.
    units: what fal charged, as it says. estimated: what the call should cost, or would have
    without the cache. settled: what it did cost, where that is known already; 0 for what never
    got to fal. Unknown is None.
    id: tells a row that is written twice, since nobody heard of the first time.
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
    id: str = field(default_factory=new_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a submitted job ended, told when its result was fetched. It belongs to the entry with
    this request id, whichever of the two is written first. Told again, what is None is left as it
    is known. A good result (below 400) stands whatever is told later, and replaces a failure."""

    request_id: str
    status: int
    error: str | None = None
    units: Decimal | None = None
    settled: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuery:
    """Which entries: from `since` up to `until`, in seconds since 1970; of one principal, or of
    all. limit: of rows in the answer."""

    since: float = 0.0
    until: float = inf
    principal: str | None = None
    limit: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over entries. errors: answers of 400 and above, and jobs that failed. hits, misses: of
    calls whose result may be reused; a shared job is a hit. unpriced: calls that went well and
    bought something whose price is unknown; they are in no sum of money. spent, saved: micro-USD;
    hits spend nothing and save what they were estimated at. seconds: of all calls together."""

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
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A job of the generate facade. owner: who may ask for it. app: the path before `/requests/`
    in fal's URLs. request_id: fal's, None until fal accepted it. key_mark: of the fal key.
    created_at, updated_at, finished_at: seconds since 1970, by the ledger. error: its code."""

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
    created_at: float = 0.0
    updated_at: float = 0.0
    finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """follower: a process that sees to jobs, by a name of its own. seconds: that it may say
    nothing before another one takes its jobs over."""

    owner: str
    seconds: float


class CallRecordStore(Protocol):
    """What was called. Every method raises LedgerError, and may be called again after it did."""

    async def write(self, rows: Sequence[CallRecord | Outcome]) -> None:
        """All of them or none; those that are there already are left. Raises: InvalidRowError,
        one of them cannot be written ever."""

    async def totals(
        self, query: UsageQuery, by: GroupBy | None = None
    ) -> list[tuple[str, Totals]]:
        """By name. Without `by` one row, which has no name; with a time the oldest first, named
        `2026-11-21` or `2026-11-21T09:00Z`, those without calls left out; else the dearest."""

    async def latest(self, query: UsageQuery) -> list[CallRecord]:
        """The newest first, with what is known by now of how they ended."""

    async def delete_before(self, before: float) -> int:
        """Removes entries from before that time, and jobs that were finished before it. How many
        entries there were."""


class Jobs(Protocol):
    """Jobs that clients ask for again. Every method raises LedgerError."""

    async def add_job(self, job: JobRow, lease: Lease) -> JobRow:
        """The job as it is kept; the lease's follower sees to it."""

    async def save_job(self, job: JobRow) -> JobRow | None:
        """Changes what may change of an unfinished job: fal's ids, status, images, error, money.
        None: it is finished, or unknown, and stays as it is."""

    async def get_job(self, job_id: str, owner: str) -> JobRow | None: ...

    async def claim_jobs(self, lease: Lease, limit: int = CLAIM_BATCH_SIZE) -> list[JobRow]:
        """Renews the leases of the follower's jobs. Then takes over unfinished ones that nobody
        sees to any more, the oldest first, and says which. Nobody else gets the same."""


class Summaries(Protocol):
    async def summarize(
        self, query: UsageQuery, interval: Interval
    ) -> dict[GroupBy, list[tuple[str, Totals]]]:
        """As `totals` by step, endpoint, principal and route, for the price of one of them; each
        has at most `limit` rows. Raises: LedgerError."""


class Ledger(CallRecordStore, Jobs, Summaries, Protocol):
    """All of it. It is opened when it is first asked, and again after it could not be."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def probe(self) -> None:
        """Raises: LedgerError, it cannot be written; SchemaError, it is not ours to write."""
