"""Accounting of live video: heartbeats extend the record of their session, and its cost."""

from decimal import Decimal
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler
from cachetools import LRUCache

from falproxy.fal.live import is_over
from falproxy.fal.pricing import Price, cost_from_units
from falproxy.metrics import Metrics
from falproxy.middleware.live_calls import IS_ENDED, LIVE_SECONDS, LIVE_SESSION, read_document
from falproxy.proxy.prices import PriceBook
from falproxy.stores.ledger import Outcome
from falproxy.stores.ledger.writer import LedgerWriter
from falproxy.stores.live_sessions import LiveSession

HEARTBEAT_INTERVAL = 5.0  # seconds; of fal's client
PRICED_SECONDS = 1.0  # length of a session whose price is asked for
SESSIONS_MAX = 10_000  # whose cost in the metrics is remembered
SECOND_UNITS = ("seconds", "compute seconds")
SESSION_UNITS = ("requests", "videos")


def session_units(price: Price | None, seconds: float) -> Decimal | None:
    """Return the units of a session of this length; None if they are unknown."""
    if price is None or price.unit in SECOND_UNITS:
        return Decimal(f"{max(0.0, seconds):.1f}")
    return Decimal(1) if price.unit in SESSION_UNITS else None


def session_cost(price: Price | None, seconds: float) -> int | None:
    """Return the cost of a session in micro-USD; None if it is unknown."""
    return None if price is None else cost_from_units(price, session_units(price, seconds))


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
