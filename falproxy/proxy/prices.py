"""Prices of model calls."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from falproxy.fal.estimates import estimate_units
from falproxy.fal.pricing import Price, cost_from_units


@dataclass(frozen=True, slots=True)
class Estimate:
    """The expected cost of a call. Fields that are not known are None.

    cost: micro-USD.
    """

    price: Price | None
    units: Decimal | None
    cost: int | None


class PriceUnavailable(Exception):
    """fal's price cannot be read now."""


class PriceBook:
    """The known prices."""

    def __init__(self, prices: Callable[[], Mapping[str, Price]]) -> None:
        self._prices = prices

    async def estimate(self, endpoint: str, inputs: Mapping[str, object]) -> Estimate:
        """Raises: PriceUnavailable."""
        price = self._prices().get(endpoint)
        units = None if price is None else estimate_units(price, inputs)
        return Estimate(price, units, cost_from_units(price, units))
