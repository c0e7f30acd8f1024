"""Durations and failures of a period, over time: the numbers of an incident.

Durations are percentiles of a sample, which has every call while there are few: each interval is
divided into parts, and the first calls of each part are read. So this takes as long with a million
records as with a thousand. Failures are counted, with indexes that have failures only.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from falproxy.stores.ledger import QueryReader
from falproxy.stores.ledger.call_list import ENDED_AT, MS, STATUS, SUBMITTED, TOTAL_MS
from falproxy.stores.ledger.rows import Row, to_ms

# Lengths of intervals in seconds; a period has the shortest that divides it into INTERVALS_MAX.
STEPS = (60, 300, 600, 1800, 3600, 10_800, 21_600, 43_200, 86_400, 604_800)
INTERVALS_MAX = 62
PARTS = 3  # of an interval
PART_ROWS = 25
SPANS = INTERVALS_MAX * PARTS
KINDS_MAX = 100  # kinds of failures of a report
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

RUN_MS = f"CASE WHEN {SUBMITTED} THEN o.run_ms ELSE e.upstream_seconds * {MS} END"
FIRST_SPAN = 2  # number of the first parameter of the spans


def sample_query(own_calls: str) -> str:
    """Return the query of the first calls of each span. $1 is the caller, $2 and $3 the first span,
    $4 and $5 the next one."""
    parts = " UNION ALL ".join(
        f"""SELECT * FROM (
            SELECT {number} AS span, at, operation, status, error, seconds, upstream_seconds,
                request_id
            FROM falproxy_entries
            WHERE at >= ${FIRST_SPAN + 2 * number} AND at < ${FIRST_SPAN + 2 * number + 1}
                {own_calls}
            ORDER BY at LIMIT {PART_ROWS}
        ) AS span_{number}"""
        for number in range(SPANS)
    )
    return f"""
        SELECT e.span, e.at, {TOTAL_MS}, {RUN_MS}, (e.seconds - e.upstream_seconds) * {MS},
            {STATUS}, e.operation = 'submit'
        FROM ({parts}) AS e LEFT JOIN falproxy_outcomes AS o ON o.request_id = e.request_id
    """


def failures_query(own_calls: str) -> str:
    """Return the query of the failures from $1 to $2. $3: start of the present period, before which
    failures are those of the previous one; $4: length of an interval; $5: the caller; $6: start of
    the first interval.

    The few outcomes that were written before their record are read first, whatever the planner
    expects: with an expression of the outcome's id, only the index of the records can be used.
    """
    own = own_calls.format
    return f"""
        WITH failures AS (
            SELECT at, status, COALESCE(error, error_type) AS error, endpoint
            FROM falproxy_entries AS e
            WHERE at >= $1 AND at < $2 AND (status >= 400 OR error IS NOT NULL)
                AND (error IS NOT NULL OR error_type IS NOT NULL) {own("e.principal")}
            UNION ALL
            SELECT e.at, e.status, o.error_type, e.endpoint
            FROM falproxy_entries AS e
            LEFT JOIN falproxy_outcomes AS o ON o.request_id = e.request_id
            WHERE e.at >= $1 AND e.at < $2 AND (e.status >= 400 OR e.error IS NOT NULL)
                AND e.error IS NULL AND e.error_type IS NULL {own("e.principal")}
            UNION ALL
            SELECT call_at, status, COALESCE(error, error_type), endpoint
            FROM falproxy_outcomes AS o
            WHERE status >= 400 AND call_at >= $1 AND call_at < $2 {own("o.principal")}
            UNION ALL
            SELECT e.at, o.status, COALESCE(o.error, o.error_type), e.endpoint
            FROM falproxy_outcomes AS o CROSS JOIN falproxy_entries AS e
            WHERE o.status >= 400 AND o.call_at IS NULL AND e.request_id = o.request_id || ''
                AND e.at >= $1 AND e.at < $2 AND e.status < 400 AND e.error IS NULL
                {own("e.principal")}
        ),
        counted AS MATERIALIZED (
            SELECT at >= $3 AS is_present, (at - $6) / $4 AS slot, status,
                COALESCE(error, '') AS error, COALESCE(endpoint, '') AS endpoint,
                COUNT(*) AS calls, MIN(at) AS first_at, MAX(at) AS last_at
            FROM failures GROUP BY 1, 2, 3, 4, 5
        ),
        kinds AS (
            SELECT status, error, endpoint,
                COALESCE(SUM(calls) FILTER (WHERE is_present), 0) AS present,
                COALESCE(SUM(calls) FILTER (WHERE NOT is_present), 0) AS previous,
                MIN(first_at) FILTER (WHERE is_present) AS first_at, MAX(last_at) AS last_at
            FROM counted GROUP BY 1, 2, 3
        )
        SELECT -1 AS slot, status, error, endpoint, present, previous, first_at, last_at FROM (
            SELECT * FROM kinds WHERE present > 0
            ORDER BY present - previous DESC, present DESC, status, error, endpoint
            LIMIT {KINDS_MAX}
        ) AS listed
        UNION ALL
        SELECT slot, status, '', '', SUM(calls), 0, NULL, NULL
        FROM counted WHERE is_present GROUP BY 1, 2
    """


# By whether the calls of one caller only are read.
SAMPLE_QUERIES = {
    True: sample_query("AND principal = $1"),
    False: sample_query("AND CAST($1 AS TEXT) IS NULL"),
}
# With COALESCE, the indexes that begin with the principal are not used instead.
FAILURES_QUERIES = {
    True: failures_query("AND COALESCE({}, '') = $5"),
    False: failures_query("AND CAST($5 AS TEXT) IS NULL"),
}

RECENT_SECONDS = 3600.0
RECENT_ROWS = 20_000
# Jobs that had not ended at $2, or whose result was not fetched, among the newest calls since $1.
UNFINISHED_JOBS = f"""
    SELECT COUNT(*) FROM (
        SELECT * FROM falproxy_entries WHERE at >= $1 AND at < $2
        ORDER BY at DESC LIMIT {RECENT_ROWS}
    ) AS e
    WHERE {SUBMITTED} AND e.request_id IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM falproxy_outcomes AS o
        WHERE o.request_id = e.request_id AND {ENDED_AT} <= $2
    )
"""


@dataclass(frozen=True, slots=True)
class Intervals:
    """The intervals of a period.

    first: start of the first one in seconds since 1970, a multiple of `step`.
    step: length in seconds.
    """

    since: float
    until: float

    @property
    def step(self) -> int:
        length = self.until - self.since
        return next((each for each in STEPS if length / each <= INTERVALS_MAX - 2), STEPS[-1])

    @property
    def first(self) -> int:
        return int(self.since // self.step) * self.step

    @property
    def count(self) -> int:
        return int(-((self.first - self.until) // self.step))


@dataclass(slots=True)
class Part:
    """The sampled calls of a part of an interval.

    weight: number of calls that each of them stands for.
    """

    rows: list[Row] = field(default_factory=list)
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Durations:
    """Durations in seconds; None without calls.

    calls: those whose duration is known.
    quantiles: as the caller waits, by name.
    queue, run, own: average parts of a call: in fal's queue, running at fal, and in the proxy. If
        the time at fal is not divided, all of it is in `run`.
    """

    calls: int = 0
    quantiles: Mapping[str, float | None] = field(default_factory=dict)
    queue: float | None = None
    run: float | None = None
    own: float | None = None


@dataclass(frozen=True, slots=True)
class FailureKind:
    """Failed calls of one kind. error: the code or the type of the error, empty if unknown.

    present, previous: number in the period, and in the one of the same length before it.
    first_at, last_at: in seconds since 1970.
    """

    status: int
    error: str
    endpoint: str
    present: int
    previous: int
    first_at: float
    last_at: float


@dataclass(frozen=True, slots=True)
class Performance:
    """series: one of each interval. failures: numbers by status, of each interval.

    is_sample: there were more calls than were read.
    """

    intervals: Intervals
    total: Durations
    series: Sequence[Durations]
    is_sample: bool
    failures: Sequence[Mapping[int, int]]
    kinds: Sequence[FailureKind]


async def read_performance(
    reader: QueryReader, since: float, until: float, caller: str | None
) -> Performance:
    """Return the durations and failures of a period, of all calls or those of one caller. Raises:
    LedgerError."""
    intervals = Intervals(since, until)
    parts = await sample_parts(reader, intervals, caller)
    series = [
        durations(parts[number * PARTS : (number + 1) * PARTS]) for number in range(intervals.count)
    ]
    failures, kinds = await read_failures(reader, intervals, caller)
    is_sample = any(len(part.rows) == PART_ROWS for part in parts)
    return Performance(intervals, durations(parts), series, is_sample, failures, kinds)


async def sample_parts(reader: QueryReader, intervals: Intervals, caller: str | None) -> list[Part]:
    length = to_ms(intervals.step) // PARTS
    first = to_ms(intervals.first)
    spans: list[int] = []
    for number in range(SPANS):
        start, end = first + number * length, first + (number + 1) * length
        limits = max(start, to_ms(intervals.since)), min(end, to_ms(intervals.until))
        spans += limits if number < intervals.count * PARTS else (0, 0)
    parts = [Part() for _ in range(SPANS)]
    for row in await reader.read(SAMPLE_QUERIES[caller is not None], (caller, *spans)):
        parts[row[0]].rows.append(row[1:])
    for number, part in enumerate(parts):
        if len(part.rows) == PART_ROWS:
            start, end = spans[2 * number : 2 * number + 2]
            last = max(row[0] for row in part.rows)
            part.weight = max(1.0, (end - start) / max(1, last - start))
    return parts[: intervals.count * PARTS]


def durations(parts: Sequence[Part]) -> Durations:
    """Return the durations of calls, each with the weight of its part. Jobs that have not ended
    have none, and calls that the proxy refused do not count: nothing waited for them."""
    totals: list[tuple[float, float]] = []
    sums, weights = [0.0, 0.0, 0.0], 0.0
    for part in parts:
        for _, total, run, own, status, is_submit in part.rows:
            is_refused = status >= 400 and run == 0
            if total is None or is_refused:
                continue
            totals.append((max(0.0, total), part.weight))
            at_fal = max(0.0, total - own)
            run = at_fal if run is None or not is_submit else min(run, at_fal)
            for index, value in enumerate((at_fal - run, run, own)):
                sums[index] += part.weight * max(0.0, value)
            weights += part.weight
    if not totals:
        return Durations()
    queue, run, own = (each / weights / MS for each in sums)
    return Durations(round(weights), weighted_quantiles(totals), queue, run, own)


def weighted_quantiles(values: Iterable[tuple[float, float]]) -> dict[str, float | None]:
    """Return the quantiles in seconds of values in milliseconds with weights."""
    ordered = sorted(values)
    whole = sum(weight for _, weight in ordered)
    found: dict[str, float | None] = {}
    below, names = 0.0, list(QUANTILES)
    for value, weight in ordered:
        below += weight
        while names and below >= QUANTILES[names[0]] * whole * (1 - 1e-9):
            found[names.pop(0)] = value / MS
    return found


async def read_failures(
    reader: QueryReader, intervals: Intervals, caller: str | None
) -> tuple[list[Mapping[int, int]], list[FailureKind]]:
    since, until = to_ms(intervals.since), to_ms(intervals.until)
    first, step = to_ms(intervals.first), to_ms(intervals.step)
    row = (max(0, 2 * since - until), until, since, step, caller, first)
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    kinds = []
    for slot, status, error, endpoint, present, previous, *times in await reader.read(
        FAILURES_QUERIES[caller is not None], row
    ):
        if slot < 0:
            first_at, last_at = (each / MS for each in times)
            kinds.append(
                FailureKind(status, error, endpoint, int(present), int(previous), first_at, last_at)
            )
        else:
            counts[slot][status] += int(present)
    return [counts[number] for number in range(intervals.count)], kinds


async def count_unfinished_jobs(reader: QueryReader, at: float) -> int:
    """Return the number of jobs that ran at a time: submitted in the hour before, and not known to
    have ended. Raises: LedgerError."""
    limits = (to_ms(at - RECENT_SECONDS), to_ms(at))
    ((count,),) = await reader.read(UNFINISHED_JOBS, limits)
    return int(count)
