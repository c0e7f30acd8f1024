"""Client spans of requests to fal."""

import time
from collections.abc import Iterator
from http import HTTPStatus

from opentelemetry.trace import Span, SpanKind, set_span_in_context

from falproxy.fal.target import Target
from falproxy.middleware.access_log import LOGGED_ID
from falproxy.proxy.forward import BodyEndObserver
from falproxy.proxy.local_responses import FAL_REQUEST_ID
from falproxy.proxy.transport import Transport, TransportResponse, UpstreamRequest
from falproxy.proxy.transport.http1 import serialize_request_head
from falproxy.telemetry.calls import PROPAGATOR, PROVIDER, fail_span, set_response_status
from falproxy.telemetry.instruments import Instruments

TRACE_HEADERS = ("traceparent", "tracestate")


class TracedTransport:
    """A `Transport` that records each request until its response has been read, and passes the
    trace on in `traceparent`."""

    def __init__(self, inner: Transport, instruments: Instruments) -> None:
        self._inner = inner
        self._instruments = instruments

    def __repr__(self) -> str:
        return f"<TracedTransport {self._inner!r}>"

    async def send(self, request: UpstreamRequest) -> TransportResponse:
        started = time.perf_counter()
        host = host_of(request)
        labels: dict[str, str | int] = {
            "http.request.method": request.method,
            "server.address": host,
        }
        target = Target(host, *split_path(request.path))
        attributes = dict(target_attributes(target)) | labels
        name = f"{request.method} {host}"
        span = self._instruments.tracer.start_span(name, None, SpanKind.CLIENT, attributes)
        try:
            response = await self._inner.send(with_trace(request, span))
        except BaseException as error:
            fail_span(span, error)
            span.end()
            raise
        set_response_status(span, response.status)
        labels["http.response.status_code"] = response.status
        request_id = response.headers.get(FAL_REQUEST_ID)
        if request_id is not None and LOGGED_ID.fullmatch(request_id):
            span.set_attribute("gen_ai.response.id", request_id)
        context = set_span_in_context(span)
        seconds = time.perf_counter() - started
        self._instruments.client_durations.record(seconds, labels, context)
        if response.is_complete or response.status == HTTPStatus.SWITCHING_PROTOCOLS:
            span.end()
            return response
        return BodyEndObserver(response, OnceEnded(span).end)


class OnceEnded:
    """A span that is ended by the first of several calls."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def __repr__(self) -> str:
        return f"<OnceEnded {self._span!r}>"

    def end(self) -> None:
        if self._span.is_recording():
            self._span.end()


def host_of(request: UpstreamRequest) -> str:
    """Return the host of a request's target, which is not the server with an origin of its own."""
    named = next((value for name, value in request.headers if name == "host"), None)
    return named or request.origin.host


def split_path(path: str) -> tuple[str, str]:
    path, mark, query = path.partition("?")
    return path, mark + query


def target_attributes(target: Target) -> Iterator[tuple[str, str]]:
    yield "falproxy.operation", str(target.operation)
    if target.endpoint is not None:
        yield "gen_ai.provider.name", PROVIDER
        yield "gen_ai.request.model", target.endpoint


def with_trace(request: UpstreamRequest, span: Span) -> UpstreamRequest:
    """Return a request whose trace headers name its span instead of the client's."""
    given: dict[str, str] = {}
    PROPAGATOR.inject(given, set_span_in_context(span))
    headers = [*other_headers(request), *given.items()]
    traced = request._replace(headers=headers, head=b"")
    return traced._replace(head=serialize_request_head(traced))


def other_headers(request: UpstreamRequest) -> Iterator[tuple[str, str]]:
    return ((name, value) for name, value in request.headers if name.lower() not in TRACE_HEADERS)
