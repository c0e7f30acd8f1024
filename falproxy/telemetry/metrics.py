"""The metrics of `/metrics` by OTLP, except for its histograms, which are recorded by call."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)

from falproxy.metrics import Metrics, Snapshot

logger = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT = 2.0  # seconds to wait for the event loop
SNAPSHOT_AGE = 0.5  # seconds in which all metrics are from the same snapshot

# Returns the metrics of a snapshot for Prometheus.
CollectMetrics = Callable[[Snapshot], Iterable[Metric]]


class MetricSource:
    """Reads the metrics for the SDK's thread."""

    def __init__(
        self, metrics: Metrics, collect: CollectMetrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._metrics = metrics
        self._collect = collect
        self._loop = loop
        self._families: dict[str, Metric] = {}
        self._read_at = float("-inf")

    def __repr__(self) -> str:
        return f"<MetricSource {len(self._families)} metrics>"

    def observe(self, name: str, options: CallbackOptions) -> Iterable[Observation]:
        """Return the current values of a metric; none if the event loop does not respond."""
        if time.monotonic() - self._read_at > SNAPSHOT_AGE:
            self._read()
        family = self._families.get(name)
        samples = [] if family is None else family.samples
        return [
            Observation(sample.value, sample.labels)
            for sample in samples
            if not sample.name.endswith("_created")
        ]

    def _read(self) -> None:
        snapshot: Future[Snapshot] = Future()
        self._families = {}
        try:
            self._loop.call_soon_threadsafe(lambda: snapshot.set_result(self._metrics.snapshot()))
            families = self._collect(snapshot.result(SNAPSHOT_TIMEOUT))
            self._families = {family.name: family for family in families}
        except (FutureTimeoutError, RuntimeError) as error:  # the event loop is busy, or closed
            logger.debug("The metrics cannot be read: %s", type(error).__name__)
        self._read_at = time.monotonic()


def observe_metrics(meter: Meter, metrics: Metrics, collect: CollectMetrics) -> None:
    """Have the counters and gauges of `/metrics` exported, under the same names."""
    source = MetricSource(metrics, collect, asyncio.get_running_loop())
    create: dict[type[Metric], Callable[..., object]] = {
        CounterMetricFamily: meter.create_observable_counter,
        GaugeMetricFamily: meter.create_observable_gauge,
    }
    for family in collect(metrics.snapshot()):
        if (create_instrument := create.get(type(family))) is not None:
            callback = partial(source.observe, family.name)
            create_instrument(family.name, [callback], description=family.documentation)
