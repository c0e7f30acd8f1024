"""Every model call in the ledger: who made it, what became of it, what it cost."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.policy import normalized_path
from falproxy.fal.pricing import Price, charged_cost, cost_from_sizes, parse_units
from falproxy.fal.results import image_sizes, parse_result_images
from falproxy.fal.target import MODEL_CALLS, Operation
from falproxy.ids import IdGenerator, new_id, time_ordered_id
from falproxy.metrics import Metrics
from falproxy.middleware.cache_policy import CACHED_RESULT
from falproxy.proxy.call import (
    CACHE_OUTCOME,
    CALL,
    LATE_OUTCOME,
    PRINCIPAL,
    UPSTREAM_SECONDS,
    USER_ID,
    LateOutcome,
)
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.local_responses import FAL_REQUEST_ID
from falproxy.stores.cache import CachedResult
from falproxy.stores.cache.virtual_ids import is_virtual_id
from falproxy.stores.ledger import REUSED_OUTCOMES, CallRecord, Outcome
from falproxy.stores.ledger.writer import LedgerWriter

UNITS_HEADER = "x-fal-billable-units"
CLIENT_CLOSED_REQUEST = 499
# fal's answers to who asks for a result that say nothing of the job: to whom it does not tell, and
# that there is no such job. With 400 it says that the job is under way, or that it has failed.
STATUS_DENIED = (401, 403, 404, 405, 429)
AMBIGUOUS_STATUS = 400
FINAL_HEADERS = (UNITS_HEADER, "x-fal-error-type", "x-fal-retryable")
CACHE_SIZE = 50_000
# fal may have taken such a call, and then it is paid.
POSSIBLY_PAID_ERRORS = ("upstream_broken", "upstream_timeout")

Prices = Callable[[], Mapping[str, Price]]
# Of a call's end: error, cache, units, estimated.
RecordDetails = tuple[str | None, str | None, Decimal | None, int | None]


class RecordContext(NamedTuple):
    """What of an entry is known before the call is made."""

    route: str
    principal: str | None
    user_id: str | None
    operation: str
    endpoint: str | None


@dataclass(slots=True)
class Charge:
    """What a call bought is counted as spent once, however often it is told. endpoint: of the
    model; price: None where nobody knows it."""

    endpoint: str
    price: Price | None
    metrics: Metrics
    is_paid: bool = False

    def settle(self, units: Decimal | None, status: int) -> int | None:
        """What it cost, in micro-USD. None: unknown."""
        settled = charged_cost(self.price, units, status)
        if settled and not self.is_paid:
            self.is_paid = True
            self.metrics.record_cost(self.endpoint, settled)
        return settled


def account_calls(writer: LedgerWriter, prices: Prices, metrics: Metrics) -> Middleware:
    """Middleware: records calls that make a job, and how queued jobs ended. prices: by endpoint
    id, asked for with the first such call; what is not there costs nobody knows what."""
    submitted, names = PendingCharges(), IdGenerator()

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        operation = call.target.operation
        if operation is Operation.RESULT and call.method == hdrs.METH_GET:
            response = await handler(request)
            request_id = call.target.request_id or ""
            if is_final(response):
                writer.enqueue(job_outcome(request_id, response, submitted.find(request_id)))
            return response
        if operation not in MODEL_CALLS or call.method != hdrs.METH_POST:
            return await handler(request)
        endpoint = normalized_path(call.target).strip("/").removesuffix("/stream")
        price, caller = prices().get(endpoint), record_context(request)
        page = RecordTemplate(writer, metrics, endpoint, price, caller, submitted, names)
        if operation is Operation.SUBMIT:
            request[RECORD_TEMPLATE] = page
        account = request.pop(OPEN_RECORD, None)
        return await handle_recorded(request, account or page.open_record(), handler)

    return middleware


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
    """A request's call, with its entry."""
    if LATE_OUTCOME in request:  # what became of a call that it made before is not this one's
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
    """What the cache did for a call, and what a kept result would have cost."""
    kept: CachedResult | None = request.get(CACHED_RESULT)
    return request.get(CACHE_OUTCOME), None if kept is None else record.estimate_cost(kept)


def upstream_headers(response: web.StreamResponse) -> Mapping[str, str]:
    return response.upstream_headers if isinstance(response, RelayedResponse) else response.headers


class PendingCharges:
    """What was bought here lately and is settled with its result, whose address names no
    endpoint."""

    def __init__(self) -> None:
        self._charges: OrderedDict[str, Charge] = OrderedDict()

    def add(self, request_id: str, charge: Charge) -> None:
        self._charges[request_id] = charge
        if len(self._charges) > CACHE_SIZE:
            self._charges.popitem(last=False)

    def find(self, request_id: str) -> Charge | None:
        return self._charges.get(request_id)


def is_final(response: web.StreamResponse) -> bool:
    """Whether an answer to who asks for a result is how the job ended. A failure without a request
    id is not fal's own word, but that of something before it."""
    if response.status < AMBIGUOUS_STATUS:
        return True
    if FAL_REQUEST_ID not in response.headers or response.status in STATUS_DENIED:
        return False
    return response.status != AMBIGUOUS_STATUS or any(
        name in response.headers for name in FINAL_HEADERS
    )


def job_outcome(request_id: str, response: web.StreamResponse, charge: Charge | None) -> Outcome:
    """How a queued job ended. One that shares another's job, or gets a kept result, is free."""
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
    """Where equal calls are written down: of one caller, to one endpoint. price: None where nobody
    knows it."""

    writer: LedgerWriter
    metrics: Metrics
    endpoint: str
    price: Price | None
    context: RecordContext
    pending_charges: PendingCharges
    ids: IdGenerator

    def open_record(self) -> "OpenRecord":
        return OpenRecord(self)


RECORD_TEMPLATE = web.RequestKey("falproxy.page", RecordTemplate)


class OpenRecord:
    """One call's entry: exactly one of `end`, `fail` and `leave` writes it."""

    __slots__ = ("_charge", "_created_at", "_placeholder_id", "_started", "_template")

    def __init__(self, template: RecordTemplate) -> None:
        self._template = template
        self._charge = Charge(template.endpoint, template.price, template.metrics)
        self._placeholder_id: str | None = None  # for fal's id, which nobody has heard
        self._created_at, self._started = time.time(), time.perf_counter()

    def complete(
        self,
        status: int,
        headers: Mapping[str, str],
        upstream_seconds: float,
        cache: str | None = None,
        estimated: int | None = None,
    ) -> None:
        """There is an answer. upstream: seconds that fal took for it. cache: what the cache did,
        and estimated what the result would have cost without it."""
        said = headers.get(UNITS_HEADER)
        units = None if said is None else parse_units(said)
        settled = 0 if cache in REUSED_OUTCOMES else self._charge.settle(units, status)
        request_id = headers.get(FAL_REQUEST_ID)
        self._record(status, request_id, settled, upstream_seconds, (None, cache, units, estimated))
        page = self._template
        if page.context.operation is Operation.SUBMIT and page.price is not None:
            page.pending_charges.add(request_id or "", self._charge)

    def fail(
        self,
        error: ProxyError,
        upstream_seconds: float,
        cache: str | None = None,
        estimated: int | None = None,
    ) -> None:
        """The call was refused, or fal did not answer."""
        settled = None if error.code in POSSIBLY_PAID_ERRORS else 0
        told = (error.code, cache, None, estimated)
        self._record(error.status, None, settled, upstream_seconds, told)

    def client_left(
        self, upstream_seconds: float, cache: str | None = None, estimated: int | None = None
    ) -> None:
        """The client did not wait for the answer."""
        told = ("client_left", cache, None, estimated)
        self._record(
            CLIENT_CLOSED_REQUEST, self._get_placeholder_id(), None, upstream_seconds, told
        )

    def complete_late(self, status: int, headers: Mapping[str, str]) -> None:
        """fal's answer came after the client had left."""
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
        page, caller = self._template, self._template.context
        if estimated and cache in REUSED_OUTCOMES:
            page.metrics.record_saving(page.endpoint, estimated)
        page.writer.enqueue(
            CallRecord(
                id=time_ordered_id(page.ids.next_id(), self._created_at),
                at=self._created_at,
                route=caller.route,
                status=status,
                principal=caller.principal,
                user_id=caller.user_id,
                operation=caller.operation,
                endpoint=caller.endpoint,
                request_id=request_id,
                error=error,
                cache=cache,
                seconds=time.perf_counter() - self._started,
                upstream_seconds=upstream_seconds,
                units=units,
                estimated=estimated,
                settled=settled,
            )
        )


# There for a call whose entry was begun before the layers had it.
OPEN_RECORD = web.RequestKey("falproxy.account", OpenRecord)
