"""Accounting: a ledger record for every model call, with its caller, outcome and cost."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from cachetools import FIFOCache

from falproxy.errors import ProxyError
from falproxy.fal.policy import is_model_call, normalized_path
from falproxy.fal.pricing import Price, charged_cost, cost_from_sizes, parse_units
from falproxy.fal.results import image_sizes, parse_result_images
from falproxy.fal.target import Operation
from falproxy.ids import IdGenerator, new_id, time_ordered_id
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import CLIENT_CLOSED_REQUEST
from falproxy.middleware.cache_policy import CACHED_RESULT
from falproxy.proxy.call import (
    CACHE_OUTCOME,
    CALL,
    LATE_OUTCOME,
    PRINCIPAL,
    REQUEST_ID,
    UPSTREAM_SECONDS,
    USER_ID,
    LateOutcome,
)
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.local_responses import FAL_REQUEST_ID
from falproxy.stores.cache import CachedResult
from falproxy.stores.cache.virtual_requests import is_virtual_id
from falproxy.stores.ledger import FREE_OUTCOMES, CallRecord, Outcome
from falproxy.stores.ledger.writer import LedgerWriter

UNITS_HEADER = "x-fal-billable-units"
# Statuses of a result request that do not concern the job: access denied, unknown job. With 400,
# fal reports that the job is in progress or that it has failed.
NOT_JOB_STATUSES = (401, 403, 404, 405)
AMBIGUOUS_STATUS = 400
FINAL_HEADERS = (UNITS_HEADER, "x-fal-error-type", "x-fal-retryable")
PENDING_CHARGES_MAX = 50_000
# After these errors fal may have processed the call, and charges it.
POSSIBLY_PAID_ERRORS = ("upstream_broken", "upstream_timeout")

Prices = Callable[[], Mapping[str, Price]]
# Error, cache, units, estimated.
RecordDetails = tuple[str | None, str | None, Decimal | None, int | None]


class RecordContext(NamedTuple):
    """The fields of a record that are known before the call."""

    route: str
    principal: str | None
    user_id: str | None
    operation: str
    endpoint: str | None


@dataclass(slots=True)
class Charge:
    """The cost of one call, added to the metrics once.

    price: None if it is unknown.
    """

    endpoint: str
    price: Price | None
    metrics: Metrics
    is_paid: bool = False

    def settle(self, units: Decimal | None, status: int) -> int | None:
        """Return the cost in micro-USD; None if it is unknown."""
        settled = charged_cost(self.price, units, status)
        if settled and not self.is_paid:
            self.is_paid = True
            self.metrics.record_cost(self.endpoint, settled)
        return settled


def account_calls(writer: LedgerWriter, prices: Prices, metrics: Metrics) -> Middleware:
    """Middleware: record model calls, and the outcomes of queued jobs.

    prices: by endpoint id; requested with the first model call.
    """
    pending_charges, ids = PendingCharges(), IdGenerator()

    @head_only
    @web.middleware
    async def account_calls_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        call = request[CALL]
        operation = call.target.operation
        if operation is Operation.RESULT and call.method == hdrs.METH_GET:
            response = await handler(request)
            request_id = call.target.request_id or ""
            if is_final(response):
                writer.enqueue(job_outcome(request_id, response, pending_charges.find(request_id)))
            return response
        if not is_model_call(call.method, call.target):
            return await handler(request)
        endpoint = normalized_path(call.target).strip("/").removesuffix("/stream")
        price, context = prices().get(endpoint), record_context(request)
        template = RecordTemplate(writer, metrics, endpoint, price, context, pending_charges, ids)
        if operation is Operation.SUBMIT:
            request[RECORD_TEMPLATE] = template
        record = request.pop(OPEN_RECORD, None)  # set if the fast path gave the request back
        record = record or template.open_record()
        record.proxy_request_id = request.get(REQUEST_ID)
        return await handle_recorded(request, record, handler)

    return account_calls_middleware


def record_context(request: web.Request) -> RecordContext:
    route, target = request.match_info.route.resource, request[CALL].target
    return RecordContext(
        route.canonical if route is not None else "",
        request.get(PRINCIPAL),
        request.get(USER_ID),
        target.operation,
        target.endpoint,
    )


async def handle_recorded(
    request: web.Request, record: "OpenRecord", handler: Handler
) -> web.StreamResponse:
    if LATE_OUTCOME in request:  # an earlier call: `dialects/queue_client.py` makes several
        for key in (CACHE_OUTCOME, CACHED_RESULT, UPSTREAM_SECONDS):
            request.pop(key, None)
    request[LATE_OUTCOME] = LateOutcome(record.complete_late)
    try:
        response = await handler(request)
    except asyncio.CancelledError:
        record.client_left(request.get(UPSTREAM_SECONDS, 0.0), *cache_details(request, record))
        raise
    except ProxyError as error:
        record.fail(error, request.get(UPSTREAM_SECONDS, 0.0), *cache_details(request, record))
        raise
    upstream = request.get(UPSTREAM_SECONDS, 0.0)
    record.complete(
        response.status, upstream_headers(response), upstream, *cache_details(request, record)
    )
    return response


def cache_details(request: web.Request, record: "OpenRecord") -> tuple[str | None, int | None]:
    """Return the cache outcome of a call, and the price of the cached result if there is one."""
    cached: CachedResult | None = request.get(CACHED_RESULT)
    return request.get(CACHE_OUTCOME), None if cached is None else record.estimate_cost(cached)


def upstream_headers(response: web.StreamResponse) -> Mapping[str, str]:
    return response.upstream_headers if isinstance(response, RelayedResponse) else response.headers


class PendingCharges:
    """Recent submits by request id. Their cost is known with the result, whose URL does not contain
    the full endpoint id."""

    def __init__(self) -> None:
        self._charges: FIFOCache[str, Charge] = FIFOCache(PENDING_CHARGES_MAX)

    def __repr__(self) -> str:
        return f"<PendingCharges {len(self._charges)}>"

    def add(self, request_id: str, charge: Charge) -> None:
        self._charges[request_id] = charge

    def find(self, request_id: str) -> Charge | None:
        return self._charges.get(request_id)


def is_final(response: web.StreamResponse) -> bool:
    """Return whether the response to a result request is the outcome of the job. An error without a
    request id was not sent by fal's queue, but by a proxy or load balancer in front of it."""
    if response.status < AMBIGUOUS_STATUS:
        return True
    if FAL_REQUEST_ID not in response.headers or response.status in NOT_JOB_STATUSES:
        return False
    return response.status != AMBIGUOUS_STATUS or any(
        name in response.headers for name in FINAL_HEADERS
    )


def job_outcome(request_id: str, response: web.StreamResponse, charge: Charge | None) -> Outcome:
    """Return the outcome of a queued job. Virtual requests share the job of another request or
    have a cached result, and are free."""
    if is_virtual_id(request_id):
        return Outcome(request_id=request_id, status=response.status, settled=0)
    units = parse_units(response.headers.get(UNITS_HEADER))
    if charge is None:
        settled = charged_cost(None, units, response.status)
    else:
        settled = charge.settle(units, response.status)
    return Outcome(request_id=request_id, status=response.status, units=units, settled=settled)


@dataclass(frozen=True, slots=True, eq=False)
class RecordTemplate:
    """What the records of one caller's calls to one endpoint have in common.

    price: None if it is unknown.
    """

    writer: LedgerWriter
    metrics: Metrics
    endpoint: str
    price: Price | None
    context: RecordContext
    pending_charges: PendingCharges
    ids: IdGenerator

    def open_record(self) -> "OpenRecord":
        return OpenRecord(self)


# Read by the fast path, which opens the records of repeated submits.
RECORD_TEMPLATE = web.RequestKey("falproxy.record_template", RecordTemplate)


class OpenRecord:
    """The record of a running call. One of `complete`, `fail` and `client_left` writes it.

    proxy_request_id: as in the access log.
    """

    __slots__ = (
        "_charge",
        "_created_at",
        "_placeholder_id",
        "_started",
        "_template",
        "proxy_request_id",
    )

    def __init__(self, template: RecordTemplate) -> None:
        self._template = template
        self.proxy_request_id: str | None = None
        self._charge = Charge(template.endpoint, template.price, template.metrics)
        self._placeholder_id: str | None = None  # used if fal's request id is not received
        self._created_at, self._started = time.time(), time.perf_counter()

    def __repr__(self) -> str:
        elapsed = time.perf_counter() - self._started
        return f"<OpenRecord {self._template.endpoint}, {elapsed:.1f} s>"

    def complete(
        self,
        status: int,
        headers: Mapping[str, str],
        upstream_seconds: float,
        cache: str | None = None,
        estimated: int | None = None,
    ) -> None:
        """Write the record of a call that got a response.

        cache: cache outcome.
        estimated: price of a cached result, in micro-USD.
        """
        units = parse_units(headers.get(UNITS_HEADER))
        settled = 0 if cache in FREE_OUTCOMES else self._charge.settle(units, status)
        request_id = headers.get(FAL_REQUEST_ID)
        self._record(status, request_id, settled, upstream_seconds, (None, cache, units, estimated))
        template = self._template
        is_new_job = template.context.operation is Operation.SUBMIT and cache not in FREE_OUTCOMES
        if is_new_job and template.price is not None:
            template.pending_charges.add(request_id or "", self._charge)

    def fail(
        self,
        error: ProxyError,
        upstream_seconds: float,
        cache: str | None = None,
        estimated: int | None = None,
    ) -> None:
        """Write the record of a call that the proxy refused, or that fal did not respond to."""
        is_paid = error.code in POSSIBLY_PAID_ERRORS and cache not in FREE_OUTCOMES
        settled = None if is_paid else 0
        details = (error.code, cache, None, estimated)
        self._record(error.status, None, settled, upstream_seconds, details)

    def client_left(
        self, upstream_seconds: float, cache: str | None = None, estimated: int | None = None
    ) -> None:
        """Write the record of a call whose client disconnected before the response."""
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

    def estimate_cost(self, cached: CachedResult) -> int | None:
        return cost_from_sizes(self._template.price, image_sizes(parse_result_images(cached.body)))

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
            )
        )


# Set by the fast path when it gives a request back whose record it has opened.
OPEN_RECORD = web.RequestKey("falproxy.open_record", OpenRecord)
