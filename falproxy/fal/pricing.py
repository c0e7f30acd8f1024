"""What calls cost: exact arithmetic on prices. Money is whole micro-USD, never a float."""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Literal

MICROS_PER_USD = 1_000_000  # micro-USD
MICRO_USD = Decimal(1) / MICROS_PER_USD
# What fal's presets of 1024x1024 are one of.
MEGAPIXEL = 1024 * 1024
# What a column of a database holds. A sum that does not fit is no sum that anybody paid.
MICROS_MAX = 2**53
# Digits that a number of units may have; "1e999999" would take for ever.
UNITS_TEXT_MAX = 32

Unit = Literal["images", "megapixels"]
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Price:
    """usd: for one unit. unit: images, or megapixels, which are rounded up for each image."""

    usd: Decimal
    unit: Unit = "images"


def parse_usd(text: str) -> Decimal:
    """An amount such as `0.04`. Raises: ValueError."""
    usd = parse_decimal(text)
    if usd is None:
        raise ValueError(f"must be a price in USD like 0.04, not {text!r}")
    return usd


def parse_units(text: str | None) -> Decimal | None:
    """What fal's header X-Fal-Billable-Units says; None when it says nothing that is a number."""
    return None if text is None else parse_decimal(text)


def parse_decimal(text: str) -> Decimal | None:
    """A finite number that is not negative."""
    if len(text) > UNITS_TEXT_MAX:
        return None
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() and number >= 0 else None


def cost_from_sizes(price: Price | None, sizes: Iterable[Size | None]) -> int | None:
    """Micro-USD for images of these sizes. None: unknown, for want of a price or of a size."""
    if price is None:
        return None
    units = 0
    for size in sizes:
        if price.unit == "images":
            units += 1
        elif size is None:
            return None
        else:
            units += -(-size[0] * size[1] // MEGAPIXEL)
    return cost_from_units(price, Decimal(units))


def cost_from_units(price: Price | None, units: Decimal | None) -> int | None:
    """Micro-USD for what fal charged, in the price's own unit. No units cost nothing, whatever
    the price. None: unknown."""
    if units is not None and units == 0:
        return 0
    if price is None or units is None:
        return None
    return to_micros(price.usd * units)


def charged_cost(price: Price | None, units: Decimal | None, status: int) -> int | None:
    """Micro-USD for an answer of fal's. None: unknown.

    What failed on fal's side (5xx) is never charged; for a 422 the units say it.
    """
    cost = cost_from_units(price, units)
    return 0 if cost is None and status >= 500 else cost


def to_micros(usd: Decimal) -> int | None:
    """The nearest micro-USD, half of one rounded up. None: more than can be meant."""
    if usd > MICROS_MAX * MICRO_USD:
        return None
    return int(usd.quantize(MICRO_USD, ROUND_HALF_UP) * MICROS_PER_USD)


def format_usd(micros: int) -> str:
    """`0.04` for 40000, with cents at least and no digit lost."""
    sign = "-" if micros < 0 else ""
    whole, rest = divmod(abs(micros), MICROS_PER_USD)
    digits = f"{rest:06}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{digits}"
