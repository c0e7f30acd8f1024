"""Accounting: a ledger record for every model call, with its caller, outcome and cost."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import NamedTuple

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.estimates import call_inputs
from falproxy.fal.policy import is_model_call, model_of
from falproxy.fal.pricing import cost_from_sizes, parse_units
from falproxy.fal.results import image_sizes, parse_result_images
from falproxy.fal.target import Operation
from falproxy.ids import IdGenerator, new_id, time_ordered_id
from falproxy.json_object import parse_object
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import CLIENT_CLOSED_REQUEST
from falproxy.middleware.cache_policy import CACHED_RESULT
from falproxy.middleware.charges import Charge, CostHeaders, PendingCharges, format_cost_headers
from falproxy.middleware.error_types import find_error_type
from falproxy.middleware.job_ends import (
    AMBIGUOUS_STATUS,
    RESULT_ACCOUNTING,
    UNITS_HEADER,
    ResultAccounting,
    is_final,
    upstream_headers,
)
from falproxy.proxy.call import (
    CACHE_OUTCOME,
    CALL,
    LATE_OUTCOME,
    OPENED_SESSION,
    PRICED_INPUTS,
    PRINCIPAL,
    REQUEST_ID,
    STORED_SECONDS,
    UPSTREAM_SECONDS,
    USER,
    LateOutcome,
)
from falproxy.proxy.forward import add_headers
from falproxy.proxy.head_only import any_request_id
from falproxy.proxy.local_responses import FAL_REQUEST_ID
from falproxy.proxy.prices import PriceBook
from falproxy.stores.cache import CachedResult
from falproxy.stores.cache.virtual_requests import is_virtual_id
from falproxy.stores.ledger import FREE_OUTCOMES, CallRecord, Outcome
from falproxy.stores.ledger.writer import LedgerWriter

CANCELLED = "client_cancelled"  # the error type of fal's result of a cancelled job
# After these errors fal may have processed the call, and charges it.
POSSIBLY_PAID_ERRORS = ("upstream_broken", "upstream_timeout")

# Error, cache, units, estimated.
RecordDetails = tuple[str | None, str | None, Decimal | None, int | None]


class RecordContext(NamedTuple):
    """The fields of a record that are known before the call."""

    route: str
    principal: str | None
    user_id: str | None
    operation: str
    endpoint: str | None
    query: str = ""


def account_calls(writer: LedgerWriter, prices: PriceBook, metrics: Metrics) -> Middleware:
    """Middleware: record model calls, and the outcomes of queued jobs, and add headers with their
    cost to the responses."""
    pending_charges, ids = PendingCharges(), IdGenerator()
    results = ResultAccounting(writer, metrics, pending_charges)

    @any_request_id
    @web.middleware
    async def account_calls_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        call = request[CALL]
        operation = call.target.operation
        if operation is Operation.RESULT and call.method == hdrs.METH_GET:
            request[RESULT_ACCOUNTING] = results
            response = await handler(request)
            if is_final(response):
                request_id = call.target.request_id or ""
                await results.record(request_id, response, request.get(STORED_SECONDS))
            return response
        if operation is Operation.CANCEL and call.method == hdrs.METH_PUT:
            response = await handler(request)
            if response.status < AMBIGUOUS_STATUS:
                record_cancellation(writer, call.target.request_id or "", response.status)
            return response
        if not is_model_call(call.method, call.target):
            return await handler(request)
        endpoint = model_of(call.target)
        context = record_context(request)
        template = RecordTemplate(writer, metrics, endpoint, prices, context, pending_charges, ids)
        if operation is Operation.SUBMIT:
            request[RECORD_TEMPLATE] = template
        record = request.pop(OPEN_RECORD, None)  # set if the fast path gave the request back
        record = record or template.open_record()
        record.proxy_request_id = request.get(REQUEST_ID)
        return await handle_recorded(request, record, handler)

    return account_calls_middleware


def record_cancellation(writer: LedgerWriter, request_id: str, status: int) -> None:
    """Write the outcome of a job whose cancellation fal accepted. The result replaces it if the job
    ends nevertheless: then it is charged, and its expected cost counts until that is known.

    status: 200 if the job was removed from the queue, 202 if it may be running.
    """
    is_free = status == web.HTTPOk.status_code or is_virtual_id(request_id)
    writer.enqueue(
        Outcome(
            request_id=request_id,
            status=CLIENT_CLOSED_REQUEST,
            settled=0 if is_free else None,
            error_type=CANCELLED,
            ended_at=time.time(),
        )
    )


def record_context(request: web.Request) -> RecordContext:
    route, target = request.match_info.route.resource, request[CALL].target
    return RecordContext(
        route.canonical if route is not None else "",
        request.get(PRINCIPAL),
        request.get(USER),
        target.operation,
        target.endpoint,
        target.query,
    )


async def handle_recorded(
    request: web.Request, record: "OpenRecord", handler: Handler
) -> web.StreamResponse:
    if LATE_OUTCOME in request:  # an earlier call: `dialects/queue_client.py` makes several
        for key in (CACHE_OUTCOME, CACHED_RESULT, UPSTREAM_SECONDS, STORED_SECONDS):
            request.pop(key, None)
    request.pop(PRICED_INPUTS, None)
    request[LATE_OUTCOME] = LateOutcome(record.complete_late)
    try:
        response = await handler(request)
    except asyncio.CancelledError:
        record.inputs = request.get(PRICED_INPUTS)
        record.client_left(request.get(UPSTREAM_SECONDS, 0.0), *cache_details(request, record))
        raise
    except ProxyError as error:
        record.inputs = request.get(PRICED_INPUTS)
        record.fail(error, request.get(UPSTREAM_SECONDS, 0.0), *cache_details(request, record))
        raise
    record.inputs = request.get(PRICED_INPUTS)
    upstream = request.get(UPSTREAM_SECONDS, 0.0)
    if response.status >= AMBIGUOUS_STATUS:
        # The headers are dropped before the body has been relayed.
        request_id = upstream_headers(response).get(FAL_REQUEST_ID)
        complete_error = partial(record.complete_error, response.status, request_id)
        record.error_type = await find_error_type(response, complete_error)
    record.stored_seconds = request.get(STORED_SECONDS)
    cost_headers = record.complete(
        response.status,
        upstream_headers(response),
        upstream,
        *cache_details(request, record),
        request_id=request.get(OPENED_SESSION),
    )
    add_headers(response, cost_headers)
    return response


def cache_details(request: web.Request, record: "OpenRecord") -> tuple[str | None, int | None]:
    """Return the cache outcome of a call, and the price of the cached result if there is one."""
    cached: CachedResult | None = request.get(CACHED_RESULT)
    return request.get(CACHE_OUTCOME), None if cached is None else record.saved_cost(cached)


@dataclass(frozen=True, slots=True, eq=False)
class RecordTemplate:
    """The common fields of the records of one caller's calls to one endpoint."""

    writer: LedgerWriter
    metrics: Metrics
    endpoint: str
    prices: PriceBook
    context: RecordContext
    pending_charges: PendingCharges
    ids: IdGenerator

    def open_record(self) -> "OpenRecord":
        return OpenRecord(self)


# Read by the fast path, which opens the records of repeated submits.
RECORD_TEMPLATE = web.RequestKey("falproxy.record_template", RecordTemplate)


class OpenRecord:
    """The record of a running call. One of `complete`, `fail` and `client_left` writes it.

    error_type: type of fal's error, if its response has begun with it.
    inputs: those that the price depends on; None if they are unknown.
    proxy_request_id: as in the access log.
    stored_seconds: time to store the files of the result.
    """

    __slots__ = (
        "_charge",
        "_created_at",
        "_placeholder_id",
        "_started",
        "_template",
        "error_type",
        "inputs",
        "proxy_request_id",
        "stored_seconds",
    )

    def __init__(self, template: RecordTemplate) -> None:
        self._template = template
        self.inputs: Mapping[str, object] | None = None
        self.proxy_request_id: str | None = None
        self.error_type: str | None = None
        self.stored_seconds: float | None = None
        self._charge = Charge(template.endpoint, template.prices, template.metrics)
        self._placeholder_id: str | None = None  # used if fal's request id is not received
        self._created_at, self._started = time.time(), time.perf_counter()

    def __repr__(self) -> str:
        elapsed = time.perf_counter() - self._started
        return f"<OpenRecord {self._template.endpoint}, {elapsed:.1f} s>"

    def read_inputs(self, body: bytes) -> None:
        """Read the inputs from a small body that no middleware has read."""
        document = parse_object(body)
        query = self._template.context.query
        self.inputs = None if document is None else call_inputs(query, document)

    def complete(
        self,
        status: int,
        headers: Mapping[str, str],
        upstream_seconds: float,
        cache: str | None = None,
        saved: int | None = None,
        request_id: str | None = None,
    ) -> CostHeaders:
        """Write the record of a call that got a response. Return the headers with its cost.

        cache: cache outcome.
        saved: price of a cached result, in micro-USD.
        request_id: None for the one in the headers.
        """
        template, charge = self._template, self._charge
        units = parse_units(headers.get(UNITS_HEADER))
        request_id = request_id or headers.get(FAL_REQUEST_ID)
        is_free = cache in FREE_OUTCOMES or template.context.operation == Operation.ICE
        charge.estimated = 0 if is_free else self._estimate()
        charge.saved = saved if is_free else None
        settled = 0 if is_free else charge.settle(units, status)
        # A call that failed, and whose cost fal did not send, is not expected to cost anything.
        is_failed = status >= AMBIGUOUS_STATUS
        estimated = saved if is_free else None if is_failed else charge.estimated
        self._record(status, request_id, settled, upstream_seconds, (None, cache, units, estimated))
        if template.context.operation is Operation.SUBMIT and request_id is not None:
            template.pending_charges.add(request_id, charge)
        if is_failed:
            return format_cost_headers(settled)
        is_session = template.context.operation == Operation.SESSION  # heartbeats complete it
        if settled is None and request_id is not None and not is_session:
            outcome = Outcome(request_id=request_id, status=status, units=units)
            charge.when_priced(partial(self._settle_late, outcome))
        return format_cost_headers(charge.estimated if settled is None else settled, charge.saved)

    def _settle_late(self, outcome: Outcome) -> None:
        """Write the cost of a call whose price was not known before."""
        if outcome.units is not None:
            settled = self._charge.settle(outcome.units, outcome.status)
            self._template.writer.enqueue(replace(outcome, settled=settled))

    def fail(
        self,
        error: ProxyError,
        upstream_seconds: float,
        cache: str | None = None,
        saved: int | None = None,
    ) -> None:
        """Write the record of a call that the proxy refused, or that fal did not respond to."""
        is_paid = error.code in POSSIBLY_PAID_ERRORS and cache not in FREE_OUTCOMES
        settled = None if is_paid else 0
        details = (error.code, cache, None, self._estimate() if is_paid else saved)
        self._record(error.status, None, settled, upstream_seconds, details)

    def client_left(
        self, upstream_seconds: float, cache: str | None = None, saved: int | None = None
    ) -> None:
        """Write the record of a call whose client disconnected before the response."""
        estimated = saved if cache in FREE_OUTCOMES else self._estimate()
        details = ("client_left", cache, None, estimated)
        self._record(
            CLIENT_CLOSED_REQUEST, self._get_placeholder_id(), None, upstream_seconds, details
        )

    def complete_late(self, status: int, headers: Mapping[str, str]) -> None:
        """Write the outcome of a call whose response arrived after the client disconnected."""
        units = parse_units(headers.get(UNITS_HEADER))
        settled = self._charge.settle(units, status)
        outcome = Outcome(
            request_id=self._get_placeholder_id(), status=status, units=units, settled=settled
        )
        self._template.writer.enqueue(outcome)

    def complete_error(self, status: int, request_id: str | None, error_type: str) -> None:
        """Write the type of an error that was in the body of fal's response."""
        if request_id is not None:
            outcome = Outcome(request_id=request_id, status=status, error_type=error_type)
            self._template.writer.enqueue(outcome)

    def saved_cost(self, cached: CachedResult) -> int | None:
        """Return the price of a cached result, in micro-USD."""
        price = self._template.prices.known(self._template.endpoint)
        cost = cost_from_sizes(price, image_sizes(parse_result_images(cached.body)))
        return self._estimate() if cost is None else cost

    def _estimate(self) -> int | None:
        template = self._template
        return template.prices.known_estimate(template.endpoint, self.inputs).cost

    def _get_placeholder_id(self) -> str:
        if self._placeholder_id is None:
            self._placeholder_id = new_id()
        return self._placeholder_id

    def _record(
        self,
        status: int,
        request_id: str | None,
        settled: int | None,
        upstream_seconds: float,
        details: RecordDetails,
    ) -> None:
        error, cache, units, estimated = details
        template, context = self._template, self._template.context
        if estimated and cache in FREE_OUTCOMES:
            template.metrics.record_saving(template.endpoint, estimated)
        template.writer.enqueue(
            CallRecord(
                id=time_ordered_id(template.ids.next_id(), self._created_at),
                at=self._created_at,
                route=context.route,
                status=status,
                principal=context.principal,
                user_id=context.user_id,
                operation=context.operation,
                endpoint=context.endpoint,
                request_id=request_id,
                error=error,
                cache=cache,
                seconds=time.perf_counter() - self._started,
                upstream_seconds=upstream_seconds,
                units=units,
                estimated=estimated,
                settled=settled,
                proxy_request_id=self.proxy_request_id,
                error_type=self.error_type,
                stored_seconds=self.stored_seconds,
            )
        )


# Set by the fast path when it gives a request back whose record it has opened.
OPEN_RECORD = web.RequestKey("falproxy.open_record", OpenRecord)
