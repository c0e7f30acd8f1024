"""Every model call in the ledger: who made it, what became of it, what it cost."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from uuid import uuid4

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.answers import REQUEST_ID
from falproxy.cache import Result
from falproxy.cache.claims import is_own
from falproxy.call import CACHE, CALL, LATE, PRINCIPAL, UPSTREAM_SECONDS, USER_ID, Call, Late
from falproxy.errors import ProxyError
from falproxy.ledger import REUSED, Entry, Outcome
from falproxy.ledger.book import Book
from falproxy.middleware.terms import KEPT_RESULT
from falproxy.pictures import pictures_in, sizes_of
from falproxy.policy import plain_path
from falproxy.pricing import Price, cost_of, read_units, settle
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

Prices = Mapping[str, Price]


def keep_books(book: Book, prices: Prices) -> Middleware:
    """Middleware: records calls that make a job, and how queued jobs ended. prices: by endpoint
    id; what is not there costs nobody knows what."""
    submitted = Submitted()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        operation = call.target.operation
        if operation is Operation.RESULT and call.method == hdrs.METH_GET:
            response = await handler(request)
            request_id = call.target.request_id or ""
            if tells_of_end(response):
                book.record(outcome_of(request_id, response, submitted.price(request_id)))
            return response
        if operation not in MODEL_CALLS or call.method != hdrs.METH_POST:
            return await handler(request)
        price = prices.get(plain_path(call.target).strip("/").removesuffix("/stream"))
        response = await Account(request, call, book, price).keep(handler)
        if operation is Operation.SUBMIT and price is not None:
            submitted.add(response.headers.get(REQUEST_ID, ""), price)
        return response

    return middleware


class Submitted:
    """What the jobs cost that were submitted here lately: the address of a result names no
    endpoint."""

    def __init__(self) -> None:
        self._prices: OrderedDict[str, Price] = OrderedDict()

    def add(self, request_id: str, price: Price) -> None:
        self._prices[request_id] = price
        if len(self._prices) > REMEMBERED_MAX:
            self._prices.popitem(last=False)

    def price(self, request_id: str) -> Price | None:
        return self._prices.get(request_id)


def tells_of_end(response: web.StreamResponse) -> bool:
    """Whether an answer to who asks for a result is how the job ended. A failure without a request
    id is not fal's own word, but that of something before it."""
    if response.status < NOT_YET:
        return True
    if REQUEST_ID not in response.headers or response.status in UNTOLD:
        return False
    return response.status != NOT_YET or any(name in response.headers for name in OF_AN_END)


def outcome_of(request_id: str, response: web.StreamResponse, price: Price | None) -> Outcome:
    """How a queued job ended. One that shares another's job, or gets a kept result, is free."""
    units = None if is_own(request_id) else read_units(response.headers.get(UNITS))
    settled = 0 if is_own(request_id) else settle(price, units, response.status)
    return Outcome(request_id=request_id, status=response.status, units=units, settled=settled)


class Account:
    """One call's entry."""

    def __init__(self, request: web.Request, call: Call, book: Book, price: Price | None) -> None:
        self._request = request
        self._call = call
        self._book = book
        self._price = price
        # What became of a call that the same request made before is not this one's.
        request.pop(CACHE, None)
        request.pop(KEPT_RESULT, None)
        self._at, self._started = time.time(), time.perf_counter()

    async def keep(self, handler: Handler) -> web.StreamResponse:
        stand_in = uuid4().hex  # for fal's id, which nobody has heard
        self._request[LATE] = Late(partial(self._settle_late, stand_in))
        try:
            response = await handler(self._request)
        except asyncio.CancelledError:
            self._record(CLIENT_LEFT, {REQUEST_ID: stand_in}, None, "client_left")
            raise
        except ProxyError as error:
            settled = None if error.code in LOST else 0
            self._record(error.status, {}, settled, error.code)
            raise
        units = read_units(response.headers.get(UNITS))
        settled = settle(self._price, units, response.status)
        self._record(response.status, response.headers, settled)
        return response

    def _settle_late(self, request_id: str, status: int, headers: Mapping[str, str]) -> None:
        units = read_units(headers.get(UNITS))
        settled = settle(self._price, units, status)
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
                estimated=self._estimate(request.get(KEPT_RESULT)),
                settled=0 if cache in REUSED else settled,
            )
        )

    def _estimate(self, kept: Result | None) -> int | None:
        """What a kept result would have cost."""
        return None if kept is None else cost_of(self._price, sizes_of(pictures_in(kept.body)))
