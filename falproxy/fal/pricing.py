"""Costs of calls, in exact arithmetic: amounts are integers, in micro-USD."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Literal

MICROS_PER_USD = 1_000_000
MICRO_USD = Decimal(1) / MICROS_PER_USD
# fal's presets of 1024x1024 count as one megapixel.
MEGAPIXEL = 1024 * 1024
# Larger amounts are not plausible. This one fits into a column of every database.
MICROS_MAX = 2**53
# Characters of a number. Arithmetic with numbers such as "1e999999" would take too long.
UNITS_TEXT_MAX = 32
NUMBER_MAX = 10**18  # products of larger numbers could exceed what `Decimal` can hold

Unit = Literal[
    "images", "megapixels", "videos", "seconds", "characters", "requests", "compute seconds"
]
# Words of fal's price list and of the registry, which are free text, in lower case.
UNITS: Mapping[str, Unit] = {
    "image": "images",
    "megapixel": "megapixels",
    "mp": "megapixels",
    "video": "videos",
    "clip": "videos",
    "audio": "requests",
    "second": "seconds",
    "video second": "seconds",
    "audio second": "seconds",
    "1000 character": "characters",
    "1k character": "characters",
    "request": "requests",
    "generation": "requests",
    "run": "requests",
    "compute second": "compute seconds",
    "gpu second": "compute seconds",
}
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Price:
    """Price of a model.

    usd: price of one unit.
    unit: megapixels are rounded up for each image, characters are counted in thousands.
    """

    usd: Decimal
    unit: Unit = "images"


def parse_unit(text: str) -> Unit | None:
    """Parse the name of a unit, singular or plural: `image`, `Megapixels`. None if it is not
    known, so that the price cannot be used."""
    words = " ".join(text.lower().replace(",", "").split()).removeprefix("per ")
    return UNITS.get(words) or UNITS.get(words.removesuffix("s"))


def parse_price(usd: object, unit: object, currency: object = "USD") -> Price | None:
    """Parse a price of fal's list, whose numbers were parsed to Decimal or int. Return None if it
    is no price that costs can be computed with."""
    if isinstance(usd, bool) or not isinstance(usd, int | Decimal) or not isinstance(unit, str):
        return None
    amount, parsed_unit = parse_decimal(str(usd)), parse_unit(unit)
    if amount is None or parsed_unit is None or str(currency).upper() != "USD":
        return None
    return Price(amount, parsed_unit)


def parse_price_list(document: bytes, endpoint: str) -> Price | None:
    """Return the price of an endpoint in a response of fal's pricing API; None if it has none.

    Raises: ValueError, the document is not a price list.
    """
    try:
        prices = json.loads(document, parse_float=Decimal)["prices"]
        entries = [entry for entry in prices if entry["endpoint_id"] == endpoint]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError("not a price list") from error
    if not entries:
        return None
    entry = entries[0]
    return parse_price(entry.get("unit_price"), entry.get("unit"), entry.get("currency", "USD"))


def parse_units(text: str | None) -> Decimal | None:
    """Parse fal's header X-Fal-Billable-Units. Return None if it is missing or invalid."""
    return None if text is None else parse_decimal(text)


def parse_decimal(text: str) -> Decimal | None:
    """Parse a finite number that is not negative. Return None for other texts."""
    if len(text) > UNITS_TEXT_MAX:
        return None
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() and 0 <= number <= NUMBER_MAX else None


def cost_from_sizes(price: Price | None, sizes: Iterable[Size | None]) -> int | None:
    """Return the price of images of these sizes, in micro-USD. None if the price of the model, or a
    size that it depends on, is unknown, or if the model is not charged by images."""
    if price is None or price.unit not in ("images", "megapixels"):
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
    """Return the cost of a number of units, in micro-USD; None if it is unknown. Zero units cost
    nothing, also if the price is unknown."""
    if units is not None and units == 0:
        return 0
    if price is None or units is None:
        return None
    return to_micros(price.usd * units)


def charged_cost(price: Price | None, units: Decimal | None, status: int) -> int | None:
    """Return the cost of a call by fal's response, in micro-USD; None if it is unknown.

    fal does not charge server errors (5xx). A 422 may be charged; its units decide.
    """
    cost = cost_from_units(price, units)
    return 0 if cost is None and status >= 500 else cost


def to_micros(usd: Decimal) -> int | None:
    """Round to micro-USD, half up. Return None for amounts above MICROS_MAX."""
    if usd > MICROS_MAX * MICRO_USD:
        return None
    return int(usd.quantize(MICRO_USD, ROUND_HALF_UP) * MICROS_PER_USD)


def format_usd(micros: int) -> str:
    """Format an amount exactly, with at least two decimal places: `0.04` for 40000."""
    sign = "-" if micros < 0 else ""
    dollars, fraction = divmod(abs(micros), MICROS_PER_USD)
    digits = f"{fraction:06}".rstrip("0").ljust(2, "0")
    return f"{sign}{dollars}.{digits}"


def sum_usd(amounts: Iterable[str]) -> str:
    """Return the exact sum of formatted amounts."""
    return format_usd(sum(int(Decimal(amount) * MICROS_PER_USD) for amount in amounts))
