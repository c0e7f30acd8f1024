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

from falproxy.fal.pricing import USD
from falproxy.metrics import OWN_BOUNDS, UPSTREAM_BOUNDS, Snapshot, Timing

OWN = "falproxy_request_duration_seconds", "The proxy's own share of the time to an answer."
UPSTREAM = "falproxy_upstream_duration_seconds", "The time to fal's answer, where it was asked."
ERRORS = "falproxy_errors", "Errors of the proxy's own, by their code.", "code"
FILES = "falproxy_rehosted_files", "Files of results, by what became of them.", "outcome"
SPENT = "falproxy_spent_dollars", "What calls cost, in USD, where the price is known.", "endpoint"
SAVED = "falproxy_saved_dollars", "What reused results would have cost, in USD.", "endpoint"
OF_THE_PROCESS = {
    "process_virtual_memory_bytes": "Virtual memory.",
    "process_resident_memory_bytes": "Resident memory.",
    "process_start_time_seconds": "When the first process began, since 1970.",
    "process_cpu_seconds_total": "Processor time.",
    "process_open_fds": "Open files.",
    "process_max_fds": "Files that may be open.",
}


def write_metrics(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """The page and its content type: text, or OpenMetrics for whom that suits better."""
    told = CollectorRegistry()
    told.register(Told(snapshot))
    encode, kind = choose_encoder(accept)
    return encode(told), kind


class Told(Collector):
    """A snapshot in the library's terms."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        version = {"version": snapshot["version"]}
        yield InfoMetricFamily("falproxy_build", "The proxy's version.", value=version)
        yield requests(snapshot["requests"])
        yield GaugeMetricFamily(
            "falproxy_requests_in_progress",
            "Requests whose answer is not out yet.",
            value=snapshot["in_progress"],
        )
        yield durations(*OWN, snapshot["own_seconds"], OWN_BOUNDS)
        yield durations(*UPSTREAM, snapshot["upstream_seconds"], UPSTREAM_BOUNDS)
        yield counter(*ERRORS, snapshot["errors"])
        yield counter(*FILES, snapshot["files"])
        yield counter(*SPENT, snapshot["spent"], USD)
        yield counter(*SAVED, snapshot["saved"], USD)
        yield from process(snapshot["process"])


def requests(counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(
        "falproxy_requests",
        "Requests that are over, by what they asked of fal and how the cache met them.",
        labels=("operation", "status", "cache"),
    )
    for name, count in sorted(counts.items()):
        family.add_metric(name.split(" "), count)
    return family


def counter(name: str, about: str, label: str, counts: Mapping[str, int], unit: int = 1) -> Metric:
    """unit: what is counted, in how many parts of it."""
    family = CounterMetricFamily(name, about, labels=(label,))
    for value, count in sorted(counts.items()):
        family.add_metric((value,), count / unit)
    return family


def durations(
    name: str, about: str, timings: Mapping[str, Timing], bounds: Sequence[float]
) -> Metric:
    family = HistogramMetricFamily(name, about, labels=("operation",))
    ends = [*map(repr, bounds), "+Inf"]
    for operation, timing in sorted(timings.items()):
        buckets = list(zip(ends, accumulate(timing["counts"]), strict=True))
        family.add_metric((operation,), buckets, timing["sum"])
    return family


def process(measured: Mapping[str, float]) -> Iterator[Metric]:
    for name, about in OF_THE_PROCESS.items():
        if name not in measured:
            continue
        if name.endswith("_total"):
            yield CounterMetricFamily(name.removesuffix("_total"), about, value=measured[name])
        else:
            yield GaugeMetricFamily(name, about, value=measured[name])
