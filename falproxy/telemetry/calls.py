"""Spans of calls, and of the requests to stores and image hosts that are made for them."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from falproxy.fal.policy import is_model_call
from falproxy.middleware.access_log import CLIENT_CLOSED_REQUEST, LOGGED_ID
from falproxy.proxy.call import (
    CACHE_OUTCOME,
    CALL,
    ERROR_CODE,
    JOB_ID,
    PRINCIPAL,
    REHOST_STATUS,
    REQUEST_ID,
    USER,
)
from falproxy.proxy.client_address import client_address, client_scheme
from falproxy.proxy.forward import RelayedResponse
from falproxy.spans import CALL_TRACER, ClientSpan
from falproxy.telemetry.instruments import Instruments

# The methods of the semantic conventions; others could be any text.
METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
)
OTHER_METHOD = "_OTHER"
HTTP_STATUS = "http.response.status_code"
SERVER_ERROR, CLIENT_ERROR = 500, 400
PROPAGATOR = TraceContextTextMapPropagator()
# Systems of client spans → the attribute that names them.
DATABASES = ("redis", "postgresql")
PROVIDER, GENERATE = "fal", "generate_content"  # values of the GenAI conventions


def trace_calls(instruments: Instruments) -> Middleware:
    """Middleware: record the span of a call until its response is sent, and its duration."""

    @web.middleware
    async def trace_calls_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = TracedCall(request, instruments)
        token = CALL_TRACER.set(SpanTracer(instruments.tracer, call.span))
        try:
            with use_span(call.span, record_exception=False, set_status_on_exception=False):
                response = await handler(request)
        except asyncio.CancelledError:
            call.finish(CLIENT_CLOSED_REQUEST, "client_left")
            raise
        except web.HTTPException as redirect:
            call.finish(redirect.status)
            raise
        except BaseException as error:
            call.finish(SERVER_ERROR, type(error).__name__)
            raise
        finally:
            CALL_TRACER.reset(token)
        if isinstance(response, RelayedResponse) and not response.prepared:
            response.on_sent = partial(call.on_sent, response.on_sent, response.status)
        else:
            call.finish(response.status)
        return response

    return trace_calls_middleware


class TracedCall:
    """A call with its span, which `finish` ends."""

    def __init__(self, request: web.Request, instruments: Instruments) -> None:
        self._request = request
        self._durations = instruments.server_durations
        self._started = time.perf_counter()
        method = request.method if request.method in METHODS else OTHER_METHOD
        route = request_route(request)
        self._labels: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": route,
            "url.scheme": "https" if client_scheme(request) == "https" else "http",
        }
        self.span = instruments.tracer.start_span(
            f"{method} {route}",
            PROPAGATOR.extract(trace_headers(request)),
            SpanKind.SERVER,
            self._labels | {"client.address": client_address(request)},
        )

    def __repr__(self) -> str:
        return f"<TracedCall {self.span!r}>"

    def on_sent(self, first: Callable[[bool], None] | None, status: int, complete: bool) -> None:
        """Finish when the response was sent, after an earlier callback."""
        try:
            if first is not None:
                first(complete)
        finally:
            self.finish(status, None if complete else "incomplete")

    def finish(self, status: int, error: str | None = None) -> None:
        """Record the end of the call. error: type of an error that no layer below reported."""
        error = error or self._request.get(ERROR_CODE)
        if error is None and status >= SERVER_ERROR:
            error = str(status)
        end_span(self.span, self._request, status, error)
        labels = self._labels | {HTTP_STATUS: status}
        seconds = time.perf_counter() - self._started
        self._durations.record(seconds, labels, set_span_in_context(self.span))


def request_route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical


def trace_headers(request: web.Request) -> dict[str, str]:
    """Return the headers of the trace that the client belongs to. Repeated ones are ambiguous."""
    given = {name: request.headers.getall(name, ()) for name in ("traceparent", "tracestate")}
    if len(given["traceparent"]) != 1:
        return {}
    return {name: ",".join(values) for name, values in given.items() if values}


def end_span(span: Span, request: web.Request, status: int, error: str | None) -> None:
    """End the span of a call with what is known about it now."""
    if not span.is_recording():
        return
    span.set_attributes({name: value for name, value in facts(request) if value is not None})
    span.set_attribute(HTTP_STATUS, status)
    if error is not None:
        span.set_attribute("error.type", error)
        if status >= SERVER_ERROR or status == CLIENT_CLOSED_REQUEST:
            span.set_status(StatusCode.ERROR)
    span.end()


def facts(request: web.Request) -> Iterator[tuple[str, str | None]]:
    """Yield names and values of attributes of a call: ids, names and outcomes only."""
    yield "falproxy.request_id", request.get(REQUEST_ID)
    yield "falproxy.principal", request.get(PRINCIPAL)
    yield "user.id", request.get(USER)
    yield "falproxy.cache", request.get(CACHE_OUTCOME)
    yield "falproxy.rehost", request.get(REHOST_STATUS)
    call = request.get(CALL)
    if call is None:
        return
    job_id = request.get(JOB_ID) or call.target.request_id
    if job_id is not None and LOGGED_ID.fullmatch(job_id):
        yield "gen_ai.response.id", job_id
    yield "falproxy.operation", str(call.target.operation)
    if call.target.endpoint is not None:
        yield "gen_ai.request.model", call.target.endpoint
        yield "gen_ai.provider.name", PROVIDER
    if is_model_call(call.method, call.target):
        yield "gen_ai.operation.name", GENERATE


class SpanTracer:
    """Records the requests that are made for one call, until its span has ended: tasks that go on
    afterwards work for other calls as well."""

    def __init__(self, tracer: Tracer, call_span: Span) -> None:
        self._tracer = tracer
        self._call_span = call_span

    def __repr__(self) -> str:
        return f"<SpanTracer {self._call_span!r}>"

    @contextmanager
    def start(self, system: str, operation: str, host: str) -> Iterator[ClientSpan]:
        if not self._call_span.is_recording():
            yield RecordedSpan(None)
            return
        name = f"{operation} {host or system}"
        kind = "db.system.name" if system in DATABASES else "peer.service"
        verb = "db.operation.name" if system in DATABASES else "http.request.method"
        attributes = {kind: system, verb: operation} | ({"server.address": host} if host else {})
        span = self._tracer.start_span(name, None, SpanKind.CLIENT, attributes)
        try:
            yield RecordedSpan(span)
        except BaseException as error:
            fail_span(span, error)
            raise
        finally:
            span.end()


class RecordedSpan:
    """A span of a request. span: None if the request is not recorded."""

    def __init__(self, span: Span | None) -> None:
        self._span = span

    def __repr__(self) -> str:
        return f"<RecordedSpan {self._span!r}>"

    def set_status(self, status: int) -> None:
        if self._span is not None:
            set_response_status(self._span, status)


def set_response_status(span: Span, status: int) -> None:
    """Set the status of a response that the proxy has received."""
    span.set_attribute(HTTP_STATUS, status)
    if status >= CLIENT_ERROR:
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)


def fail_span(span: Span, error: BaseException) -> None:
    """Set the type of an error. Its text is left out, since it may have an address or a value."""
    if isinstance(error, asyncio.CancelledError):
        span.set_attribute("error.type", "cancelled")
        return
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(StatusCode.ERROR)
