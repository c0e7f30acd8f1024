"""The costs of calls: estimated before, settled when fal has sent its units."""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from cachetools import FIFOCache

from falproxy.fal.pricing import charged_cost, cost_from_sizes, format_usd
from falproxy.fal.results import image_sizes, parse_result_images
from falproxy.metrics import Metrics
from falproxy.proxy.prices import COST_HEADER, SAVED_HEADER, PriceBook

PENDING_CHARGES_MAX = 50_000

CostHeaders = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Charge:
    """The cost of one call, added to the metrics once. Amounts are micro-USD.

    estimated: None if it is unknown.
    saved: price of the cached result that the call got.
    """

    endpoint: str
    prices: PriceBook
    metrics: Metrics
    estimated: int | None = None
    saved: int | None = None
    is_paid: bool = False

    def settle(
        self, units: Decimal | None, status: int, document: bytes | None = None
    ) -> int | None:
        """Return the cost; None if it is unknown.

        document: a result of unknown units, whose images are counted.
        """
        price = self.prices.known(self.endpoint)
        settled = charged_cost(price, units, status)
        if settled is None and units is None and document is not None:
            settled = cost_from_sizes(price, image_sizes(parse_result_images(document)))
        if settled and not self.is_paid:
            self.is_paid = True
            self.metrics.record_cost(self.endpoint, settled)
        return settled

    def when_priced(self, settle: Callable[[], None]) -> None:
        """Ask for the price, and call a function when it is known."""
        self.prices.refresh_soon(self.endpoint, settle)


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


def format_cost_headers(cost: int | None, saved: int | None = None) -> CostHeaders:
    amounts = ((COST_HEADER, cost), (SAVED_HEADER, saved))
    return tuple((name, format_usd(amount)) for name, amount in amounts if amount is not None)
