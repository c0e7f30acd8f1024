"""A collector that receives traces and metrics by OTLP/HTTP, on loopback."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.support.key_search import LEAKS
from tests.support.waiting import wait_until

SERVER, CLIENT = 2, 3  # kinds of spans
PARTIAL_SUCCESS = b""  # the response of a collector that has accepted everything


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """start, end: nanoseconds since 1970."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Any]
    has_error: bool


@dataclass(slots=True)
class Collector:
    """bodies: of all requests, uncompressed.
    headers: of the last request.
    points: the last values of each metric, by name.
    status: of its responses.
    is_silent: it does not respond.
    """

    origin: str = ""
    bodies: list[bytes] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    spans: list[ReceivedSpan] = field(default_factory=list)
    points: dict[str, list[tuple[dict[str, Any], float]]] = field(default_factory=dict)
    resources: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    is_silent: bool = False
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        LEAKS.search(body.decode("latin-1"), f"request for {request.path}")
        if self.is_silent:
            await self.closing.wait()
        self.bodies.append(body)
        self.headers = dict(request.headers)
        if self.status == 200:
            (self._add_spans if request.path.endswith("/traces") else self._add_metrics)(body)
        return web.Response(
            status=self.status, body=PARTIAL_SUCCESS, content_type="application/x-protobuf"
        )

    def _add_spans(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        document = ExportTraceServiceRequest.FromString(body)
        for resource in document.resource_spans:
            self.resources.append(attributes_of(resource.resource))
            for scope in resource.scope_spans:
                self.spans += [
                    ReceivedSpan(
                        span.name,
                        span.kind,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        attributes_of(span),
                        span.status.code == 2,
                    )
                    for span in scope.spans
                ]

    def _add_metrics(self, body: bytes) -> None:
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
            ExportMetricsServiceRequest,
        )

        document = ExportMetricsServiceRequest.FromString(body)
        for resource in document.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    data = getattr(metric, metric.WhichOneof("data"))
                    self.points[metric.name] = [
                        (attributes_of(point), point_value(point)) for point in data.data_points
                    ]

    async def trace(self, spans: int = 1) -> list[ReceivedSpan]:
        """Return the spans when there are so many, by their start."""
        await wait_until(lambda: len(self.spans) >= spans)
        return sorted(self.spans, key=lambda span: span.start)

    def of_kind(self, kind: int) -> list[ReceivedSpan]:
        return [span for span in self.spans if span.kind == kind]


def attributes_of(message: Any) -> dict[str, Any]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value")) for each in message.attributes
    }


def point_value(point: Any) -> float:
    """Return a number, or the count of a histogram."""
    if hasattr(point, "count"):
        return float(point.count)
    return float(getattr(point, point.WhichOneof("value")))


@asynccontextmanager
async def open_collector() -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/{kind}", collector.handle)
    async with TestServer(app) as server:
        collector.origin = f"http://127.0.0.1:{server.port}"
        try:
            yield collector
        finally:
            collector.closing.set()
