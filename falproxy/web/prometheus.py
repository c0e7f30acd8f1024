"""`/metrics`: the numbers of the process, as Prometheus reads them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from falproxy.fal.pricing import MICROS_PER_USD
from falproxy.metrics import OWN_BOUNDS, UPSTREAM_BOUNDS, HistogramData, Snapshot

PROXY_DURATION = (
    "falproxy_request_duration_seconds",
    "The proxy's own share of the time to an answer.",
)
UPSTREAM_DURATION = (
    "falproxy_upstream_duration_seconds",
    "The time to fal's answer, where it was asked.",
)
ERRORS = "falproxy_errors", "Errors of the proxy's own, by their code.", "code"
FILES = "falproxy_rehosted_files", "Files of results, by what became of them.", "outcome"
SPENT = "falproxy_spent_dollars", "What calls cost, in USD, where the price is known.", "endpoint"
SAVED = "falproxy_saved_dollars", "What reused results would have cost, in USD.", "endpoint"
PROCESS_METRICS = {
    "process_virtual_memory_bytes": "Virtual memory.",
    "process_resident_memory_bytes": "Resident memory.",
    "process_start_time_seconds": "When the first process began, since 1970.",
    "process_cpu_seconds_total": "Processor time.",
    "process_open_fds": "Open files.",
    "process_max_fds": "Files that may be open.",
}


def render_metrics(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """The page and its content type: text, or OpenMetrics for whom that suits better."""
    told = CollectorRegistry()
    told.register(SnapshotCollector(snapshot))
    encode, kind = choose_encoder(accept)
    return encode(told), kind


class SnapshotCollector(Collector):
    """A snapshot in the library's terms."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        version = {"version": snapshot["version"]}
        yield InfoMetricFamily("falproxy_build", "The proxy's version.", value=version)
        yield request_counter(snapshot["requests"])
        yield GaugeMetricFamily(
            "falproxy_requests_in_progress",
            "Requests whose answer is not out yet.",
            value=snapshot["in_progress"],
        )
        yield duration_histogram(*PROXY_DURATION, snapshot["own_seconds"], OWN_BOUNDS)
        yield duration_histogram(*UPSTREAM_DURATION, snapshot["upstream_seconds"], UPSTREAM_BOUNDS)
        yield counter_family(*ERRORS, snapshot["errors"])
        yield counter_family(*FILES, snapshot["files"])
        yield counter_family(*SPENT, snapshot["spent"], MICROS_PER_USD)
        yield counter_family(*SAVED, snapshot["saved"], MICROS_PER_USD)
        yield from process_metrics(snapshot["process"])


def request_counter(counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(
        "falproxy_requests",
        "Requests that are over, by what they asked of fal and how the cache met them.",
        labels=("operation", "status", "cache"),
    )
    for name, count in sorted(counts.items()):
        family.add_metric(name.split(" "), count)
    return family


def counter_family(
    name: str, documentation: str, label: str, counts: Mapping[str, int], unit: int = 1
) -> Metric:
    """unit: what is counted, in how many parts of it."""
    family = CounterMetricFamily(name, documentation, labels=(label,))
    for value, count in sorted(counts.items()):
        family.add_metric((value,), count / unit)
    return family


def duration_histogram(
    name: str, documentation: str, timings: Mapping[str, HistogramData], bounds: Sequence[float]
) -> Metric:
    family = HistogramMetricFamily(name, documentation, labels=("operation",))
    ends = [*map(repr, bounds), "+Inf"]
    for operation, timing in sorted(timings.items()):
        buckets = list(zip(ends, accumulate(timing["counts"]), strict=True))
        family.add_metric((operation,), buckets, timing["sum"])
    return family


def process_metrics(values: Mapping[str, float]) -> Iterator[Metric]:
    for name, about in PROCESS_METRICS.items():
        if name not in values:
            continue
        if name.endswith("_total"):
            yield CounterMetricFamily(name.removesuffix("_total"), about, value=values[name])
        else:
            yield GaugeMetricFamily(name, about, value=values[name])
