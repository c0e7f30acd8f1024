"""Counters and histograms of this process, for `/metrics` and the dashboard."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypedDict

from aiohttp import web
from cachetools import LRUCache

from falproxy.job_times import JobTimes
from falproxy.version import __version__

# Upper bounds of the buckets in seconds; the last bucket has none.
OWN_BOUNDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0,
)  # fmt: skip
UPSTREAM_BOUNDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
# The operation of requests without a call to fal, such as a list of models, or a refused one.
NO_OPERATION = "none"
ERROR_CODES_MAX = 100  # distinct codes, some of which are fal's; the rest count as "other"
ERROR_CODE_LENGTH_MAX = 100  # characters
OTHER_ERROR = "other"
BUDGETS_MAX = 10_000  # callers and users whose budgets are compared


class HistogramData(TypedDict):
    """A histogram.

    counts: of each bucket, not cumulative.
    sum: seconds.
    """

    counts: list[int]
    sum: float


class Snapshot(TypedDict):
    """The metrics of one process, or the sum of several, as JSON.

    requests: by operation, status and cache outcome, separated by spaces.
    own_seconds: the proxy's share of a request, by operation.
    upstream_seconds: fal's share, by operation.
    connections: open connections of clients.
    closed_connections: closed by a limit, by reason.
    files: re-hosted files by outcome.
    spent, saved: micro-USD by endpoint.
    limited: calls that a limit refused, by limit and scope, separated by a space.
    budgets: the largest used share of a budget in its current window, by scope.
    dependencies: 1 or 0 by name, whether the last use of a service or store succeeded.
    changes: when a dependency last failed or recovered, in seconds since 1970, by name.
    last_errors: code or message of the last error of a dependency, by name.
    breakers: 1 or 0 by host of fal, whether its backup host is used.
    health: numbers by their names in HEALTH.
    process: memory, CPU time and open files, by Prometheus's names.
    """

    version: str
    in_progress: int
    connections: int
    closed_connections: dict[str, int]
    requests: dict[str, int]
    own_seconds: dict[str, HistogramData]
    upstream_seconds: dict[str, HistogramData]
    errors: dict[str, int]
    files: dict[str, int]
    spent: dict[str, int]
    saved: dict[str, int]
    limited: dict[str, int]
    budgets: dict[str, float]
    dependencies: dict[str, int]
    changes: dict[str, float]
    last_errors: dict[str, str]
    breakers: dict[str, int]
    health: dict[str, int]
    process: dict[str, float]


# Numbers of `Snapshot.health`, and whether they are sums over the workers; the others are maxima.
HEALTH = {
    "ledger_backlog_rows": True,
    "ledger_dropped_rows": True,
    "fal_keys": False,
    "fal_keys_resting": False,
    "worker_restarts": False,
    "tasks": True,
}
HEALTH_COUNTERS = ("ledger_dropped_rows", "worker_restarts")
FAL_DOWN_ERRORS = ("upstream_unreachable", "upstream_broken")
CLIENT_CLOSED_REQUEST = 499

# Returns the metrics of the other processes that serve the same address.
WorkerSnapshots = Callable[[], Awaitable[Sequence[Snapshot]]]


class Histogram:
    """A histogram that is being filled.

    bounds: upper bounds of the buckets, ascending.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def data(self) -> HistogramData:
        return {"counts": list(self.counts), "sum": self.sum}


class Metrics:
    """The metrics of this process since its start.

    Clients cannot create labels without bound: the labels are fixed names, status codes, and
    endpoints with a price.
    """

    def __init__(self) -> None:
        self.in_progress = 0
        self.connections = 0
        self.job_times = JobTimes()
        self._closed_connections: Counter[str] = Counter()
        self._requests: dict[tuple[str, int, str], int] = {}
        self._own: dict[str, Histogram] = {}
        self._upstream: dict[str, Histogram] = {}
        self._errors: Counter[str] = Counter()
        self._files: Counter[str] = Counter()
        self._spent: Counter[str] = Counter()
        self._saved: Counter[str] = Counter()
        self._limited: Counter[str] = Counter()
        # By scope and subject: the used share, and the time at which its window ends.
        self._budgets: LRUCache[tuple[str, str], tuple[float, float]] = LRUCache(BUDGETS_MAX)
        self._is_fal_up = True
        self._fal_error: str | None = None
        self._states: dict[str, bool] = {}
        self._changes: dict[str, float] = {}
        # Read when the metrics are; calls do not pay for them.
        self.dependencies: dict[str, Callable[[], bool]] = {"fal": lambda: self._is_fal_up}
        self.last_errors: dict[str, Callable[[], str | None]] = {"fal": lambda: self._fal_error}
        self.breakers: dict[str, Callable[[], bool]] = {}
        self.health: dict[str, Callable[[], int]] = {}

    def record_request(
        self, operation: str, status: int, cache: str, own: float, upstream: float | None
    ) -> None:
        """Count a request that is over.

        own: the proxy's share of the seconds until the response began.
        upstream: fal's share, None without a request to fal.
        """
        key = (operation, status, cache)
        counts = self._requests
        counts[key] = counts.get(key, 0) + 1
        histogram = self._own.get(operation)
        if histogram is None:
            histogram = self._own[operation] = Histogram(OWN_BOUNDS)
        histogram.observe(own)
        if upstream is not None:
            histogram = self._upstream.get(operation)
            if histogram is None:
                histogram = self._upstream[operation] = Histogram(UPSTREAM_BOUNDS)
            histogram.observe(upstream)
            if status != CLIENT_CLOSED_REQUEST:
                self._is_fal_up = True

    def record_error(self, code: str) -> None:
        if code in FAL_DOWN_ERRORS:
            self._is_fal_up, self._fal_error = False, code
        has_room = len(self._errors) < ERROR_CODES_MAX and len(code) <= ERROR_CODE_LENGTH_MAX
        is_known = code in self._errors or has_room
        self._errors[code if is_known else OTHER_ERROR] += 1

    def record_closed_connection(self, reason: str) -> None:
        """Count a connection that was closed because of a limit."""
        self._closed_connections[reason] += 1

    def record_rehost(self, rehost_status: str) -> None:
        """Count the files of a result, from the value of the header `x-falproxy-rehost`."""
        for item in rehost_status.split(", "):
            outcome, _, count = item.partition("; count=")
            self._files[outcome] += int(count or 1)

    def record_cost(self, endpoint: str, micros: int) -> None:
        self._spent[endpoint] += micros

    def record_saving(self, endpoint: str, micros: int) -> None:
        """Add the price of a call that was served from the cache."""
        self._saved[endpoint] += micros

    def record_limited(self, limit: str, scope: str) -> None:
        """Count a call that a limit refused."""
        self._limited[f"{limit} {scope}"] += 1

    def record_budget(self, scope: str, subject: str, share: float, seconds: float) -> None:
        """Record the used share of a budget whose window ends in `seconds`."""
        self._budgets[scope, subject] = share, time.monotonic() + seconds

    def _budget_shares(self) -> dict[str, float]:
        now, shares = time.monotonic(), dict[str, float]()
        for (scope, _), (share, ends_at) in self._budgets.items():
            shares[scope] = max(shares.get(scope, 0.0), share if ends_at > now else 0.0)
        return shares

    def observe_dependencies(self) -> dict[str, int]:
        """Return the states of the dependencies, and record which have changed since the last
        time."""
        for name, is_up in self.dependencies.items():
            state = is_up()
            if self._states.get(name, True) != state:
                self._changes[name] = time.time()
            self._states[name] = state
        return {name: int(state) for name, state in self._states.items()}

    def snapshot(self) -> Snapshot:
        dependencies = self.observe_dependencies()
        last_errors = {name: read() for name, read in self.last_errors.items()}
        return {
            "version": __version__,
            "in_progress": self.in_progress,
            "connections": self.connections,
            "closed_connections": dict(self._closed_connections),
            "requests": {
                f"{operation} {status} {cache}": count
                for (operation, status, cache), count in self._requests.items()
            },
            "own_seconds": histogram_data(self._own),
            "upstream_seconds": histogram_data(self._upstream),
            "errors": dict(self._errors),
            "files": dict(self._files),
            "spent": dict(self._spent),
            "saved": dict(self._saved),
            "limited": dict(self._limited),
            "budgets": self._budget_shares(),
            "dependencies": dependencies,
            "changes": dict(self._changes),
            "last_errors": {name: text for name, text in last_errors.items() if text},
            "breakers": {host: int(is_open()) for host, is_open in self.breakers.items()},
            "health": {name: read() for name, read in self.health.items()},
            "process": measure_process(),
        }


METRICS = web.AppKey("falproxy.metrics", Metrics)
WORKER_SNAPSHOTS: web.AppKey[WorkerSnapshots] = web.AppKey("falproxy.worker_snapshots")


def histogram_data(histograms: Mapping[str, Histogram]) -> dict[str, HistogramData]:
    return {str(operation): histogram.data() for operation, histogram in histograms.items()}


def measure_process() -> dict[str, float]:
    """Return memory, CPU time and open files, empty on a system without /proc."""
    from prometheus_client import ProcessCollector  # not needed at start-up

    collector = ProcessCollector("", lambda: "self", "/proc", None)
    return {
        sample.name: sample.value for metric in collector.collect() for sample in metric.samples
    }


def merge_snapshots(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Return the sums over several processes, with the start time of the first one."""
    first, *others = snapshots
    merged = first
    for other in others:
        merged = merge_two_snapshots(merged, other)
    return merged


def merge_two_snapshots(one: Snapshot, other: Snapshot) -> Snapshot:
    return {
        "version": one["version"],
        "in_progress": one["in_progress"] + other["in_progress"],
        "connections": one["connections"] + other["connections"],
        "closed_connections": add_counters(one["closed_connections"], other["closed_connections"]),
        "requests": add_counters(one["requests"], other["requests"]),
        "own_seconds": add_histograms(one["own_seconds"], other["own_seconds"]),
        "upstream_seconds": add_histograms(one["upstream_seconds"], other["upstream_seconds"]),
        "errors": add_counters(one["errors"], other["errors"]),
        "files": add_counters(one["files"], other["files"]),
        "spent": add_counters(one["spent"], other["spent"]),
        "saved": add_counters(one["saved"], other["saved"]),
        "limited": add_counters(one["limited"], other["limited"]),
        "budgets": largest_values(one["budgets"], other["budgets"]),
        "dependencies": merge_values(min, one["dependencies"], other["dependencies"]),
        "changes": merge_changes(one, other),
        "last_errors": {**one["last_errors"], **other["last_errors"]},
        "breakers": merge_values(max, one["breakers"], other["breakers"]),
        "health": merge_health(one["health"], other["health"]),
        "process": add_process_metrics(one["process"], other["process"]),
    }


def add_counters(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def largest_values(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}


def merge_values(
    choose: Callable[[int, int], int], one: Mapping[str, int], other: Mapping[str, int]
) -> dict[str, int]:
    both = {name: choose(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def merge_changes(one: Snapshot, other: Snapshot) -> dict[str, float]:
    """Return when each dependency failed first in one of the processes; if it works in all, when it
    recovered last."""
    both, single = {**one["changes"], **other["changes"]}, {}
    for name in one["changes"].keys() & other["changes"].keys():
        times = [
            each["changes"][name]
            for each in (one, other)
            if each["dependencies"].get(name)
            == min(one["dependencies"].get(name, 1), other["dependencies"].get(name, 1))
        ]
        is_up = one["dependencies"].get(name) and other["dependencies"].get(name)
        single[name] = max(times, default=0.0) if is_up else min(times, default=0.0)
    return {**both, **single}


def merge_health(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    sums, largest = add_counters(one, other), merge_values(max, one, other)
    return {name: sums[name] if HEALTH[name] else largest[name] for name in sums}


def counters_of(snapshot: Snapshot) -> Snapshot:
    """Return what stays of the metrics of a process that has ended: its counters, no states."""
    counters = snapshot["process"].items()
    return {
        **snapshot,
        "in_progress": 0,
        "connections": 0,
        "budgets": {},
        "dependencies": {},
        "changes": {},
        "last_errors": {},
        "breakers": {},
        "health": {
            name: value for name, value in snapshot["health"].items() if name in HEALTH_COUNTERS
        },
        "process": {name: value for name, value in counters if name.endswith("_total")},
    }


def add_histograms(
    one: Mapping[str, HistogramData], other: Mapping[str, HistogramData]
) -> dict[str, HistogramData]:
    merged = {**other, **one}
    for name in one.keys() & other.keys():
        pairs = zip(one[name]["counts"], other[name]["counts"], strict=True)
        merged[name] = {
            "counts": [sum(pair) for pair in pairs],
            "sum": one[name]["sum"] + other[name]["sum"],
        }
    return merged


def add_process_metrics(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    merged = {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}
    for name in one.keys() & other.keys():
        if name.endswith("_start_time_seconds"):
            merged[name] = min(one[name], other[name])
    return merged


def merge_histograms(histograms: Iterable[HistogramData]) -> HistogramData | None:
    """Return the sum of several histograms with the same bounds, None without any."""
    operands = list(histograms)
    if not operands:
        return None
    buckets = zip(*(histogram["counts"] for histogram in operands), strict=True)
    return {
        "counts": [sum(counts) for counts in buckets],
        "sum": sum(histogram["sum"] for histogram in operands),
    }


def quantile(histogram: HistogramData, bounds: Sequence[float], fraction: float) -> float | None:
    """Estimate a quantile in seconds, by linear interpolation within its bucket. None for an empty
    histogram.

    fraction: 0.5 is the median.
    """
    rank = fraction * sum(histogram["counts"])
    if rank <= 0:
        return None
    lower, below = 0.0, 0
    for bound, count in zip(bounds, histogram["counts"], strict=False):
        if below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        lower, below = bound, below + count
    return lower
