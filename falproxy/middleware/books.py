"""Every model call in the ledger: who made it, what became of it, what it cost."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.answers import REQUEST_ID
from falproxy.cache import Result
from falproxy.cache.claims import is_own
from falproxy.call import CACHE, CALL, LATE, PRINCIPAL, UPSTREAM_SECONDS, USER_ID, Call, Late
from falproxy.errors import ProxyError
from falproxy.ids import new_name
from falproxy.ledger import REUSED, Entry, Outcome
from falproxy.ledger.book import Book
from falproxy.metrics import Metrics
from falproxy.middleware.terms import KEPT_RESULT
from falproxy.pictures import pictures_in, sizes_of
from falproxy.policy import plain_path
from falproxy.pricing import Price, cost_of, read_units, settle
from falproxy.proxy import UpstreamResponse
from falproxy.target import MODEL_CALLS, Operation

UNITS = "x-fal-billable-units"
CLIENT_LEFT = 499
# fal's answers to who asks for a result that say nothing of the job: to whom it does not tell, and
# that there is no such job. With 400 it says that the job is under way, or that it has failed.
UNTOLD = (401, 403, 404, 405, 429)
NOT_YET = 400
OF_AN_END = (UNITS, "x-fal-error-type", "x-fal-retryable")
REMEMBERED_MAX = 50_000
# fal may have taken such a call, and then it is paid.
LOST = ("upstream_broken", "upstream_timeout")

Prices = Callable[[], Mapping[str, Price]]


@dataclass(slots=True)
class Purchase:
    """What a call bought is counted as spent once, however often it is told. endpoint: of the
    model; price: None where nobody knows it."""

    endpoint: str
    price: Price | None
    metrics: Metrics
    is_paid: bool = False

    def settle(self, units: Decimal | None, status: int) -> int | None:
        """What it cost, in micro-USD. None: unknown."""
        settled = settle(self.price, units, status)
        if settled and not self.is_paid:
            self.is_paid = True
            self.metrics.spend(self.endpoint, settled)
        return settled


def keep_books(book: Book, prices: Prices, metrics: Metrics) -> Middleware:
    """Middleware: records calls that make a job, and how queued jobs ended. prices: by endpoint
    id, asked for with the first such call; what is not there costs nobody knows what."""
    submitted = Submitted()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        operation = call.target.operation
        if operation is Operation.RESULT and call.method == hdrs.METH_GET:
            response = await handler(request)
            request_id = call.target.request_id or ""
            if tells_of_end(response):
                book.record(outcome_of(request_id, response, submitted.purchase(request_id)))
            return response
        if operation not in MODEL_CALLS or call.method != hdrs.METH_POST:
            return await handler(request)
        endpoint = plain_path(call.target).strip("/").removesuffix("/stream")
        purchase = Purchase(endpoint, prices().get(endpoint), metrics)
        response = await Account(request, call, book, purchase).keep(handler)
        if operation is Operation.SUBMIT and purchase.price is not None:
            submitted.add(headers_of(response).get(REQUEST_ID, ""), purchase)
        return response

    return middleware


def headers_of(response: web.StreamResponse) -> Mapping[str, str]:
    return response.said if isinstance(response, UpstreamResponse) else response.headers


class Submitted:
    """What was bought here lately and is settled with its result, whose address names no
    endpoint."""

    def __init__(self) -> None:
        self._purchases: OrderedDict[str, Purchase] = OrderedDict()

    def add(self, request_id: str, purchase: Purchase) -> None:
        self._purchases[request_id] = purchase
        if len(self._purchases) > REMEMBERED_MAX:
            self._purchases.popitem(last=False)

    def purchase(self, request_id: str) -> Purchase | None:
        return self._purchases.get(request_id)


def tells_of_end(response: web.StreamResponse) -> bool:
    """Whether an answer to who asks for a result is how the job ended. A failure without a request
    id is not fal's own word, but that of something before it."""
    if response.status < NOT_YET:
        return True
    if REQUEST_ID not in response.headers or response.status in UNTOLD:
        return False
    return response.status != NOT_YET or any(name in response.headers for name in OF_AN_END)


def outcome_of(request_id: str, response: web.StreamResponse, purchase: Purchase | None) -> Outcome:
    """How a queued job ended. One that shares another's job, or gets a kept result, is free."""
    if is_own(request_id):
        return Outcome(request_id=request_id, status=response.status, settled=0)
    units = read_units(response.headers.get(UNITS))
    if purchase is None:
        settled = settle(None, units, response.status)
    else:
        settled = purchase.settle(units, response.status)
    return Outcome(request_id=request_id, status=response.status, units=units, settled=settled)


class Account:
    """One call's entry."""

    def __init__(self, request: web.Request, call: Call, book: Book, purchase: Purchase) -> None:
        self._request = request
        self._call = call
        self._book = book
        self._purchase = purchase
        # What became of a call that the same request made before is not this one's.
        if LATE in request:
            for key in (CACHE, KEPT_RESULT, UPSTREAM_SECONDS):
                request.pop(key, None)
        self._at, self._started = time.time(), time.perf_counter()

    async def keep(self, handler: Handler) -> web.StreamResponse:
        stand_in = new_name()  # for fal's id, which nobody has heard
        self._request[LATE] = Late(partial(self._settle_late, stand_in))
        try:
            response = await handler(self._request)
        except asyncio.CancelledError:
            self._record(CLIENT_LEFT, {REQUEST_ID: stand_in}, None, "client_left")
            raise
        except ProxyError as error:
            self._record(error.status, {}, None if error.code in LOST else 0, error.code)
            raise
        settled: int | None = 0
        if self._request.get(CACHE) not in REUSED:
            units = read_units(headers_of(response).get(UNITS))
            settled = self._purchase.settle(units, response.status)
        self._record(response.status, headers_of(response), settled)
        return response

    def _settle_late(self, request_id: str, status: int, headers: Mapping[str, str]) -> None:
        units = read_units(headers.get(UNITS))
        settled = self._purchase.settle(units, status)
        outcome = Outcome(request_id=request_id, status=status, units=units, settled=settled)
        self._book.record(outcome)

    def _record(
        self,
        status: int,
        headers: Mapping[str, str],
        settled: int | None,
        error: str | None = None,
    ) -> None:
        request = self._request
        cache = request.get(CACHE)
        estimated = self._estimate(request.get(KEPT_RESULT))
        if estimated and cache in REUSED:
            self._purchase.metrics.save(self._purchase.endpoint, estimated)
        route = request.match_info.route.resource
        self._book.record(
            Entry(
                at=self._at,
                route=route.canonical if route is not None else "",
                status=status,
                principal=request.get(PRINCIPAL),
                user_id=request.get(USER_ID),
                operation=self._call.target.operation,
                endpoint=self._call.target.endpoint,
                request_id=headers.get(REQUEST_ID),
                error=error,
                cache=cache,
                seconds=time.perf_counter() - self._started,
                upstream_seconds=request.get(UPSTREAM_SECONDS, 0.0),
                units=read_units(headers.get(UNITS)),
                estimated=estimated,
                settled=settled,
            )
        )

    def _estimate(self, kept: Result | None) -> int | None:
        """What a kept result would have cost."""
        if kept is None:
            return None
        return cost_of(self._purchase.price, sizes_of(pictures_in(kept.body)))
