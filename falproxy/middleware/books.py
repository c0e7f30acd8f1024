"""Every model call in the ledger: who made it, what became of it, what it cost."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.answers import REQUEST_ID
from falproxy.cache import Result
from falproxy.cache.claims import is_own
from falproxy.call import CACHE, CALL, PRINCIPAL, UPSTREAM_SECONDS, USER_ID, Call
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
NOT_YET = 400  # how fal answers who asks for a result before it is there
REMEMBERED_MAX = 50_000

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
            if response.status != NOT_YET:
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
        self._at, self._started = time.time(), time.perf_counter()

    async def keep(self, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(self._request)
        except asyncio.CancelledError:
            self._record(CLIENT_LEFT, {}, "client_left")
            raise
        except ProxyError as error:
            self._record(error.status, {}, error.code)
            raise
        self._record(response.status, response.headers, None)
        return response

    def _record(self, status: int, headers: Mapping[str, str], error: str | None) -> None:
        request, units = self._request, read_units(headers.get(UNITS))
        cache = request.get(CACHE)
        settled = 0 if cache in REUSED else settle(self._price, units, status)
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
                units=units,
                estimated=self._estimate(request.get(KEPT_RESULT)),
                settled=settled,
            )
        )

    def _estimate(self, kept: Result | None) -> int | None:
        """What a kept result would have cost."""
        return None if kept is None else cost_of(self._price, sizes_of(pictures_in(kept.body)))
