"""What the process counts of its requests, for `/metrics` and the dashboard."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypedDict

from aiohttp import web

from falproxy.version import __version__

# Upper bounds of the histograms' buckets, in seconds; a last bucket holds the rest.
OWN_BOUNDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0,
)  # fmt: skip
UPSTREAM_BOUNDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
# Requests that are no call to fal, such as one for a list of models, or a refused one.
NO_OPERATION = "none"
ERROR_CODES_MAX = 100  # of errors; some are words of fal's
OTHER_ERROR = "other"


class HistogramData(TypedDict):
    """A histogram. counts: of each bucket alone. sum: seconds."""

    counts: list[int]
    sum: float


class Snapshot(TypedDict):
    """The numbers of one process, or of several, as JSON can hold them.

    requests: by operation, status and cache outcome, with a space between. spent, saved:
    micro-USD by endpoint. process: what the system says of it, by Prometheus's names.
    """

    version: str
    in_progress: int
    requests: dict[str, int]
    own_seconds: dict[str, HistogramData]
    upstream_seconds: dict[str, HistogramData]
    errors: dict[str, int]
    files: dict[str, int]
    spent: dict[str, int]
    saved: dict[str, int]
    process: dict[str, float]


# The numbers of the other processes that serve the same address.
WorkerSnapshots = Callable[[], Awaitable[Sequence[Snapshot]]]


class Histogram:
    """A histogram that is counted on. bounds: of its buckets, the lowest first."""

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
    """The numbers of this process since it began. No client can make there be more of them: what
    they are told apart by are words of ours, fal's status codes and the endpoints with a price."""

    def __init__(self) -> None:
        self.in_progress = 0
        self._requests: dict[tuple[str, int, str], int] = {}
        self._own: dict[str, Histogram] = {}
        self._upstream: dict[str, Histogram] = {}
        self._errors: Counter[str] = Counter()
        self._files: Counter[str] = Counter()
        self._spent: Counter[str] = Counter()
        self._saved: Counter[str] = Counter()

    def record_request(
        self, operation: str, status: int, cache: str, own: float, upstream: float | None
    ) -> None:
        """A request that is over. own, upstream: seconds of ours, and of fal's where it was asked,
        until the answer began."""
        key = (operation, status, cache)
        counts = self._requests
        counts[key] = counts.get(key, 0) + 1
        latency = self._own.get(operation)
        if latency is None:
            latency = self._own[operation] = Histogram(OWN_BOUNDS)
        latency.observe(own)
        if upstream is not None:
            latency = self._upstream.get(operation)
            if latency is None:
                latency = self._upstream[operation] = Histogram(UPSTREAM_BOUNDS)
            latency.observe(upstream)

    def record_error(self, code: str) -> None:
        """An error of the proxy's own, by its word."""
        is_known = code in self._errors or len(self._errors) < ERROR_CODES_MAX
        self._errors[code if is_known else OTHER_ERROR] += 1

    def record_rehost(self, rehost_status: str) -> None:
        """What became of a result's files, as the answer's header says it."""
        for fate in rehost_status.split(", "):
            outcome, _, count = fate.partition("; count=")
            self._files[outcome] += int(count or 1)

    def record_cost(self, endpoint: str, micros: int) -> None:
        self._spent[endpoint] += micros

    def record_saving(self, endpoint: str, micros: int) -> None:
        """What a result that was there already would have cost."""
        self._saved[endpoint] += micros

    def snapshot(self) -> Snapshot:
        return {
            "version": __version__,
            "in_progress": self.in_progress,
            "requests": {
                f"{operation} {status} {cache}": count
                for (operation, status, cache), count in self._requests.items()
            },
            "own_seconds": {str(name): each.data() for name, each in self._own.items()},
            "upstream_seconds": {str(name): each.data() for name, each in self._upstream.items()},
            "errors": dict(self._errors),
            "files": dict(self._files),
            "spent": dict(self._spent),
            "saved": dict(self._saved),
            "process": measure_process(),
        }


METRICS = web.AppKey("falproxy.metrics", Metrics)
WORKER_SNAPSHOTS: web.AppKey[WorkerSnapshots] = web.AppKey("falproxy.siblings")


def measure_process() -> dict[str, float]:
    """Memory, processor time and open files; nothing where the system does not say."""
    from prometheus_client import ProcessCollector  # only those who ask for numbers need it

    collector = ProcessCollector("", lambda: "self", "/proc", None)
    return {
        sample.name: sample.value for metric in collector.collect() for sample in metric.samples
    }


def merge_snapshots(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The numbers of several processes as those of one: sums, and the time the first one began."""
    first, *others = snapshots
    merged = first
    for other in others:
        merged = merge_two_snapshots(merged, other)
    return merged


def merge_two_snapshots(one: Snapshot, other: Snapshot) -> Snapshot:
    return {
        "version": one["version"],
        "in_progress": one["in_progress"] + other["in_progress"],
        "requests": add_counters(one["requests"], other["requests"]),
        "own_seconds": add_histograms(one["own_seconds"], other["own_seconds"]),
        "upstream_seconds": add_histograms(one["upstream_seconds"], other["upstream_seconds"]),
        "errors": add_counters(one["errors"], other["errors"]),
        "files": add_counters(one["files"], other["files"]),
        "spent": add_counters(one["spent"], other["spent"]),
        "saved": add_counters(one["saved"], other["saved"]),
        "process": add_process_metrics(one["process"], other["process"]),
    }


def add_counters(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def add_histograms(
    one: Mapping[str, HistogramData], other: Mapping[str, HistogramData]
) -> dict[str, HistogramData]:
    added = {**other, **one}
    for name in one.keys() & other.keys():
        pairs = zip(one[name]["counts"], other[name]["counts"], strict=True)
        added[name] = {
            "counts": [sum(pair) for pair in pairs],
            "sum": one[name]["sum"] + other[name]["sum"],
        }
    return added


def add_process_metrics(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    added = {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}
    for name in one.keys() & other.keys():
        if name.endswith("_start_time_seconds"):
            added[name] = min(one[name], other[name])
    return added


def merge_histograms(histograms: Iterable[HistogramData]) -> HistogramData | None:
    """Several histograms of the same bounds as one. None: there are none."""
    found = list(histograms)
    if not found:
        return None
    return {
        "counts": [sum(counts) for counts in zip(*(each["counts"] for each in found), strict=True)],
        "sum": sum(each["sum"] for each in found),
    }


def quantile(histogram: HistogramData, bounds: Sequence[float], fraction: float) -> float | None:
    """Seconds within which that share of all was done: an estimate, since only the buckets are
    known, within which they are taken to be spread evenly. None: there are none."""
    rank = fraction * sum(histogram["counts"])
    if rank <= 0:
        return None
    lower, below = 0.0, 0
    for bound, count in zip(bounds, histogram["counts"], strict=False):
        if below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        lower, below = bound, below + count
    return lower
