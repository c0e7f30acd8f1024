"""`/metrics`: the metrics in the formats of Prometheus."""

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
from falproxy.metrics import (
    HEALTH_COUNTERS,
    OWN_BOUNDS,
    UPSTREAM_BOUNDS,
    HistogramData,
    Snapshot,
)

PROXY_DURATION = (
    "falproxy_request_duration_seconds",
    "Time in the proxy until the response starts.",
)
UPSTREAM_DURATION = (
    "falproxy_upstream_duration_seconds",
    "Time until the response of fal starts, for requests sent to fal.",
)
CLOSED = "falproxy_closed_connections", "Connections closed by a limit, by reason.", "reason"
ERRORS = "falproxy_errors", "Errors of the proxy, by code.", "code"
FILES = "falproxy_rehosted_files", "Output files, by rehosting outcome.", "outcome"
SPENT = "falproxy_spent_dollars", "Cost of calls of known price, in USD.", "endpoint"
SAVED = "falproxy_saved_dollars", "Cost saved by reused results, in USD.", "endpoint"
DEPENDENCIES = (
    "falproxy_dependency_up",
    "1 if the last use of a service or store succeeded; of several workers, in all of them.",
    "dependency",
)
BREAKERS = "falproxy_breaker_open", "1 while the backup of a host of fal is used.", "host"
HEALTH_METRICS = {
    "ledger_backlog_rows": "Rows that wait to be written to the ledger.",
    "ledger_dropped_rows": "Rows that were not written to the ledger.",
    "fal_keys": "Keys of fal.",
    "fal_keys_resting": "Keys that are not used for a while, because fal refused them.",
    "worker_restarts": "Workers that ended unexpectedly and were started again.",
    "tasks": "Tasks of the event loops.",
}
PROCESS_METRICS = {
    "process_virtual_memory_bytes": "Virtual memory.",
    "process_resident_memory_bytes": "Resident memory.",
    "process_start_time_seconds": "Start time of the first process, in seconds since 1970.",
    "process_cpu_seconds_total": "Processor time.",
    "process_open_fds": "Open files.",
    "process_max_fds": "Maximum number of open files.",
}


def render_metrics(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """Return the body and its content type, in OpenMetrics if the Accept header prefers it."""
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(snapshot))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def collect_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    return SnapshotCollector(snapshot).collect()


class SnapshotCollector(Collector):
    """Provides a snapshot to the Prometheus client."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        version = {"version": snapshot["version"]}
        yield InfoMetricFamily("falproxy_build", "The proxy's version.", value=version)
        yield request_counter(snapshot["requests"])
        yield GaugeMetricFamily(
            "falproxy_requests_in_progress",
            "Requests without a complete response.",
            value=snapshot["in_progress"],
        )
        yield GaugeMetricFamily(
            "falproxy_connections", "Open connections of clients.", value=snapshot["connections"]
        )
        yield counter_family(*CLOSED, snapshot["closed_connections"])
        yield duration_histogram(*PROXY_DURATION, snapshot["own_seconds"], OWN_BOUNDS)
        yield duration_histogram(*UPSTREAM_DURATION, snapshot["upstream_seconds"], UPSTREAM_BOUNDS)
        yield counter_family(*ERRORS, snapshot["errors"])
        yield counter_family(*FILES, snapshot["files"])
        yield counter_family(*SPENT, snapshot["spent"], MICROS_PER_USD)
        yield counter_family(*SAVED, snapshot["saved"], MICROS_PER_USD)
        yield limited_counter(snapshot["limited"])
        yield budget_gauge(snapshot["budgets"])
        yield state_gauge(*DEPENDENCIES, snapshot["dependencies"])
        yield state_gauge(*BREAKERS, snapshot["breakers"])
        yield from health_metrics(snapshot["health"])
        yield from process_metrics(snapshot["process"])


def request_counter(counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(
        "falproxy_requests",
        "Finished requests, by operation, status and cache outcome.",
        labels=("operation", "status", "cache"),
    )
    for name, count in sorted(counts.items()):
        family.add_metric(name.split(" "), count)
    return family


def counter_family(
    name: str, documentation: str, label: str, counts: Mapping[str, int], unit: int = 1
) -> Metric:
    """Return a counter. unit: number of counted items in one unit of the metric."""
    family = CounterMetricFamily(name, documentation, labels=(label,))
    for value, count in sorted(counts.items()):
        family.add_metric((value,), count / unit)
    return family


def limited_counter(counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(
        "falproxy_limited", "Calls refused by a limit, by its scope.", labels=("limit", "scope")
    )
    for name, count in sorted(counts.items()):
        family.add_metric(name.split(" "), count)
    return family


def budget_gauge(shares: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(
        "falproxy_budget_used_ratio",
        "Used share of the budget that has the least left, by scope.",
        labels=("scope",),
    )
    for scope, share in sorted(shares.items()):
        family.add_metric((scope,), share)
    return family


def state_gauge(name: str, documentation: str, label: str, states: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=(label,))
    for value, state in sorted(states.items()):
        family.add_metric((value,), state)
    return family


def health_metrics(values: Mapping[str, int]) -> Iterator[Metric]:
    for name, documentation in HEALTH_METRICS.items():
        if name in values:
            family = CounterMetricFamily if name in HEALTH_COUNTERS else GaugeMetricFamily
            yield family(f"falproxy_{name}", documentation, value=values[name])


def duration_histogram(
    name: str, documentation: str, timings: Mapping[str, HistogramData], bounds: Sequence[float]
) -> Metric:
    family = HistogramMetricFamily(name, documentation, labels=("operation",))
    upper_bounds = [*map(repr, bounds), "+Inf"]
    for operation, histogram in sorted(timings.items()):
        buckets = list(zip(upper_bounds, accumulate(histogram["counts"]), strict=True))
        family.add_metric((operation,), buckets, histogram["sum"])
    return family


def process_metrics(values: Mapping[str, float]) -> Iterator[Metric]:
    for name, documentation in PROCESS_METRICS.items():
        if name not in values:
            continue
        if name.endswith("_total"):
            yield CounterMetricFamily(
                name.removesuffix("_total"), documentation, value=values[name]
            )
        else:
            yield GaugeMetricFamily(name, documentation, value=values[name])
