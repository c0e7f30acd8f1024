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
from falproxy.fal.policy import plain_path
from falproxy.fal.pricing import Price, cost_of, read_units, settle
from falproxy.fal.results import pictures_in, sizes_of
from falproxy.fal.target import MODEL_CALLS, Operation
from falproxy.ids import Names, dated, new_name
from falproxy.metrics import Metrics
from falproxy.middleware.cache_policy import KEPT_RESULT
from falproxy.proxy.call import CACHE, CALL, LATE, PRINCIPAL, UPSTREAM_SECONDS, USER_ID, Late
from falproxy.proxy.forward import UpstreamResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.local_responses import REQUEST_ID
from falproxy.stores.cache import Result
from falproxy.stores.cache.virtual_ids import is_own
from falproxy.stores.ledger import REUSED, Entry, Outcome
from falproxy.stores.ledger.writer import Book

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
# Of a call's end: error, cache, units, estimated.
Told = tuple[str | None, str | None, Decimal | None, int | None]


class Caller(NamedTuple):
    """What of an entry is known before the call is made."""

    route: str
    principal: str | None
    user_id: str | None
    operation: str
    endpoint: str | None


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
    submitted, names = Submitted(), Names()

    @head_only
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
        price, caller = prices().get(endpoint), caller_of(request)
        page = Page(book, metrics, endpoint, price, caller, submitted, names)
        if operation is Operation.SUBMIT:
            request[PAGE] = page
        account = request.pop(ACCOUNT, None)
        return await keep(request, account or page.open(), handler)

    return middleware


def caller_of(request: web.Request) -> Caller:
    route, target = request.match_info.route.resource, request[CALL].target
    return Caller(
        route.canonical if route is not None else "",
        request.get(PRINCIPAL),
        request.get(USER_ID),
        target.operation,
        target.endpoint,
    )


async def keep(request: web.Request, account: "Account", handler: Handler) -> web.StreamResponse:
    """A request's call, with its entry."""
    if LATE in request:  # what became of a call that it made before is not this one's
        for key in (CACHE, KEPT_RESULT, UPSTREAM_SECONDS):
            request.pop(key, None)
    request[LATE] = Late(account.settle_late)
    try:
        response = await handler(request)
    except asyncio.CancelledError:
        account.leave(request.get(UPSTREAM_SECONDS, 0.0), *reuse_of(request, account))
        raise
    except ProxyError as error:
        account.fail(error, request.get(UPSTREAM_SECONDS, 0.0), *reuse_of(request, account))
        raise
    upstream = request.get(UPSTREAM_SECONDS, 0.0)
    account.end(response.status, headers_of(response), upstream, *reuse_of(request, account))
    return response


def reuse_of(request: web.Request, account: "Account") -> tuple[str | None, int | None]:
    """What the cache did for a call, and what a kept result would have cost."""
    kept: Result | None = request.get(KEPT_RESULT)
    return request.get(CACHE), None if kept is None else account.cost_of(kept)


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


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """Where equal calls are written down: of one caller, to one endpoint. price: None where nobody
    knows it."""

    book: Book
    metrics: Metrics
    endpoint: str
    price: Price | None
    caller: Caller
    submitted: Submitted
    names: Names

    def open(self) -> "Account":
        return Account(self)


PAGE = web.RequestKey("falproxy.page", Page)


class Account:
    """One call's entry: exactly one of `end`, `fail` and `leave` writes it."""

    __slots__ = ("_at", "_page", "_purchase", "_stand_in", "_started")

    def __init__(self, page: Page) -> None:
        self._page = page
        self._purchase = Purchase(page.endpoint, page.price, page.metrics)
        self._stand_in: str | None = None  # for fal's id, which nobody has heard
        self._at, self._started = time.time(), time.perf_counter()

    def end(
        self,
        status: int,
        headers: Mapping[str, str],
        upstream: float,
        cache: str | None = None,
        estimated: int | None = None,
    ) -> None:
        """There is an answer. upstream: seconds that fal took for it. cache: what the cache did,
        and estimated what the result would have cost without it."""
        said = headers.get(UNITS)
        units = None if said is None else read_units(said)
        settled = 0 if cache in REUSED else self._purchase.settle(units, status)
        request_id = headers.get(REQUEST_ID)
        self._record(status, request_id, settled, upstream, (None, cache, units, estimated))
        page = self._page
        if page.caller.operation is Operation.SUBMIT and page.price is not None:
            page.submitted.add(request_id or "", self._purchase)

    def fail(
        self,
        error: ProxyError,
        upstream: float,
        cache: str | None = None,
        estimated: int | None = None,
    ) -> None:
        """The call was refused, or fal did not answer."""
        settled = None if error.code in LOST else 0
        told = (error.code, cache, None, estimated)
        self._record(error.status, None, settled, upstream, told)

    def leave(
        self, upstream: float, cache: str | None = None, estimated: int | None = None
    ) -> None:
        """The client did not wait for the answer."""
        told = ("client_left", cache, None, estimated)
        self._record(CLIENT_LEFT, self._name(), None, upstream, told)

    def settle_late(self, status: int, headers: Mapping[str, str]) -> None:
        """fal's answer came after the client had left."""
        units = read_units(headers.get(UNITS))
        settled = self._purchase.settle(units, status)
        outcome = Outcome(request_id=self._name(), status=status, units=units, settled=settled)
        self._page.book.record(outcome)

    def cost_of(self, kept: Result) -> int | None:
        return cost_of(self._page.price, sizes_of(pictures_in(kept.body)))

    def _name(self) -> str:
        if self._stand_in is None:
            self._stand_in = new_name()
        return self._stand_in

    def _record(
        self, status: int, request_id: str | None, settled: int | None, upstream: float, told: Told
    ) -> None:
        error, cache, units, estimated = told
        page, caller = self._page, self._page.caller
        if estimated and cache in REUSED:
            page.metrics.save(page.endpoint, estimated)
        page.book.record(
            Entry(
                id=dated(page.names.next(), self._at),
                at=self._at,
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
                upstream_seconds=upstream,
                units=units,
                estimated=estimated,
                settled=settled,
            )
        )


# There for a call whose entry was begun before the layers had it.
ACCOUNT = web.RequestKey("falproxy.account", Account)
