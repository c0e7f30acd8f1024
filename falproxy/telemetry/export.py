"""Exports traces and metrics by OTLP/HTTP, in threads with bounded queues.

A collector that is away delays no call and no stop: spans are dropped when the queue is full, and
what is not exported within a second of the shutdown is lost.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import MeterProvider as AnyMeterProvider
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import NoOpTracerProvider
from opentelemetry.trace import TracerProvider as AnyTracerProvider

from falproxy.telemetry_settings import TelemetrySettings
from falproxy.version import __version__

logger = logging.getLogger(__name__)

ATTRIBUTE_LENGTH_MAX = 256  # characters; endpoints and users are named by clients


class ExportReport:
    """Logs when exports begin to fail, and when they succeed again.

    noun: what is exported.
    """

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._has_failed = False

    def __repr__(self) -> str:
        return f"<ExportReport {self._noun}, {'down' if self._has_failed else 'up'}>"

    def record(self, *, succeeded: bool) -> None:
        if succeeded and self._has_failed:
            logger.info("%s are exported again", self._noun)
        elif not succeeded and not self._has_failed:
            logger.warning("%s cannot be exported: the collector does not accept them", self._noun)
        self._has_failed = not succeeded


class ReportingSpanExporter(OTLPSpanExporter):  # type: ignore[misc]  # see setup.cfg
    def __init__(self, endpoint: str, headers: dict[str, str] | None) -> None:
        super().__init__(endpoint=endpoint, headers=headers)
        self._report = ExportReport("Traces")

    def export(self, spans: object) -> SpanExportResult:
        result = super().export(spans)
        self._report.record(succeeded=result is SpanExportResult.SUCCESS)
        return result


class ReportingMetricExporter(OTLPMetricExporter):  # type: ignore[misc]  # see setup.cfg
    def __init__(self, endpoint: str, headers: dict[str, str] | None) -> None:
        super().__init__(endpoint=endpoint, headers=headers)
        self._report = ExportReport("Metrics")

    def export(self, *arguments: object, **options: object) -> MetricExportResult:
        result = super().export(*arguments, **options)
        self._report.record(succeeded=result is MetricExportResult.SUCCESS)
        return result


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The providers of spans and metrics of one application.

    closing: functions that export the rest and end the threads; each one blocks.
    """

    tracers: AnyTracerProvider
    meters: AnyMeterProvider
    closing: Sequence[Callable[[], None]]


def open_telemetry(settings: TelemetrySettings) -> Telemetry:
    """Start to export. The threads of the SDK are daemons, which do not keep the process."""
    # The SDK's own log lines repeat with each export, and contain the collector's URL.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    resource = Resource.create(
        {
            "service.name": settings.service_name,
            "service.version": __version__,
            "service.instance.id": str(uuid4()),  # of each worker process
        }
    )
    headers = dict(settings.headers) or None
    tracers, meters = NoOpTracerProvider(), NoOpMeterProvider()
    closing: list[Callable[[], None]] = []
    if (url := settings.traces_url) is not None:
        tracers = TracerProvider(
            resource=resource,
            span_limits=SpanLimits(max_span_attribute_length=ATTRIBUTE_LENGTH_MAX),
            shutdown_on_exit=False,
        )
        exporter = ReportingSpanExporter(url, headers)
        tracers.add_span_processor(BatchSpanProcessor(exporter))
        closing.append(tracers.shutdown)
    if (url := settings.metrics_url) is not None:
        metric_exporter = ReportingMetricExporter(url, headers)
        reader = PeriodicExportingMetricReader(metric_exporter)
        meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        closing.append(meters.shutdown)

    return Telemetry(tracers, meters, closing)
