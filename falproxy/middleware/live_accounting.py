"""Accounting of live video: heartbeats extend the record of their session, and its cost."""

from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from cachetools import LRUCache

from falproxy.fal.live import HEARTBEAT_INTERVAL, is_over, session_cost, session_units
from falproxy.metrics import Metrics
from falproxy.middleware.live_calls import IS_ENDED, LIVE_SECONDS, LIVE_SESSION, read_document
from falproxy.proxy.head_only import any_request_id
from falproxy.proxy.prices import PriceBook
from falproxy.stores.ledger import Outcome
from falproxy.stores.ledger.writer import LedgerWriter
from falproxy.stores.live_sessions import LiveSession

PRICED_SECONDS = 1.0  # length of a session whose price is asked for
SESSIONS_MAX = 10_000  # whose cost in the metrics is remembered


def account_heartbeats(writer: LedgerWriter, prices: PriceBook, metrics: Metrics) -> Middleware:
    """Middleware: write the length and the cost of a session with each of its heartbeats."""
    accounting = HeartbeatAccounting(writer, prices, metrics)

    @any_request_id
    @web.middleware
    async def account_heartbeats_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        return await accounting.respond(request, handler)

    return account_heartbeats_middleware


class HeartbeatAccounting:
    """Writes the length and the cost of sessions to the ledger, with each heartbeat: the process
    that receives the last one does not know that it is."""

    def __init__(self, writer: LedgerWriter, prices: PriceBook, metrics: Metrics) -> None:
        self._writer = writer
        self._prices = prices
        self._metrics = metrics
        self._counted_costs: LRUCache[str, int] = LRUCache(SESSIONS_MAX)  # in the metrics

    def __repr__(self) -> str:
        return f"<HeartbeatAccounting of {len(self._counted_costs)} sessions>"

    async def respond(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        session = request.get(LIVE_SESSION)
        if session is None or IS_ENDED in request or response.status != web.HTTPOk.status_code:
            return response
        if is_over(await read_document(response)):
            return response
        seconds: float = request[LIVE_SECONDS]
        self._record(session, seconds)
        if seconds >= PRICED_SECONDS:
            self._prices.refresh_soon(session.endpoint, partial(self._record, session, seconds))
        return response

    def _record(self, session: LiveSession, seconds: float) -> None:
        """Write the length of a session so far, with its cost if the price is known."""
        price = self._prices.known(session.endpoint)
        cost = session_cost(price, seconds)
        outcome = Outcome(
            request_id=session.id,
            status=web.HTTPOk.status_code,
            units=session_units(price, seconds),
            settled=cost,
        )
        self._writer.enqueue(outcome)
        if cost is not None:
            # Of a session that other processes have counted so far, the time of one heartbeat.
            is_new = seconds < 2 * HEARTBEAT_INTERVAL
            before = 0 if is_new else session_cost(price, seconds - HEARTBEAT_INTERVAL) or 0
            before = self._counted_costs.get(session.id, before)
            self._counted_costs[session.id] = cost
            self._metrics.record_cost(session.endpoint, max(0, cost - before))
