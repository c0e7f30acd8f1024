"""Costs are exact, and None if a price or size is unknown."""

from collections.abc import Sequence
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falproxy.fal.pricing import (
    MICROS_MAX,
    Price,
    Size,
    Unit,
    charged_cost,
    cost_from_sizes,
    cost_from_units,
    format_usd,
    parse_units,
)

DEV = Price(Decimal("0.025"), "megapixels")
KONTEXT = Price(Decimal("0.04"))
SQUARE = (1024, 1024)
UNITS_BESIDE_IMAGES: tuple[Unit, ...] = (
    "videos", "seconds", "characters", "requests", "compute seconds",
)  # fmt: skip


@pytest.mark.parametrize(
    ("price", "sizes", "micros"),
    [
        pytest.param(KONTEXT, [None], 40_000, id="an image of any size"),
        pytest.param(KONTEXT, [SQUARE, None, (1, 1)], 120_000, id="three images"),
        pytest.param(KONTEXT, [], 0, id="no image"),
        pytest.param(DEV, [SQUARE], 25_000, id="fal's square is one megapixel"),
        pytest.param(DEV, [(1024, 1025)], 50_000, id="one line more is two megapixels"),
        pytest.param(DEV, [(512, 512)] * 4, 100_000, id="each image is rounded up"),
        pytest.param(DEV, [(1, 1)], 25_000, id="one pixel is one megapixel"),
        pytest.param(DEV, [SQUARE, None], None, id="an unknown size"),
        pytest.param(None, [SQUARE], None, id="no price"),
        *(
            pytest.param(Price(Decimal("0.07"), unit), sizes, None, id=f"{unit}: no {kind}")
            for unit in UNITS_BESIDE_IMAGES
            for kind, sizes in (("image", []), ("image counts", [SQUARE]))
        ),
        pytest.param(Price(Decimal("0.0000005")), [None], 1, id="half a micro-USD is rounded up"),
        pytest.param(Price(Decimal("0.0000004")), [None], 0, id="less is rounded down"),
        pytest.param(Price(Decimal("0.0000004")), [None] * 5, 2, id="the sum is rounded"),
    ],
)
def test_cost_of_images_by_size(
    price: Price | None, sizes: Sequence[Size | None], micros: int | None
) -> None:
    assert cost_from_sizes(price, sizes) == micros


@pytest.mark.parametrize(
    ("header", "units"),
    [
        pytest.param("1", Decimal(1), id="a number"),
        pytest.param("0", Decimal(0), id="zero"),
        pytest.param("1.50", Decimal("1.5"), id="a fraction"),
        pytest.param(None, None, id="no header"),
        pytest.param("", None, id="empty"),
        pytest.param("many", None, id="a word"),
        pytest.param("-1", None, id="negative"),
        pytest.param("NaN", None, id="NaN"),
        pytest.param("Infinity", None, id="infinity"),
        pytest.param("1" * 40, None, id="too long"),
    ],
)
def test_the_units_header_is_parsed(header: str | None, units: Decimal | None) -> None:
    assert parse_units(header) == units


@pytest.mark.parametrize(
    ("price", "units", "status", "micros"),
    [
        pytest.param(DEV, "2", 200, 50_000, id="units of known price"),
        pytest.param(DEV, "2", 422, 50_000, id="a charged rejection"),
        pytest.param(DEV, "0", 422, 0, id="a free rejection"),
        pytest.param(None, "0", 422, 0, id="zero units of unknown price"),
        pytest.param(None, "2", 200, None, id="an unknown price"),
        pytest.param(DEV, None, 200, None, id="unknown units"),
        pytest.param(None, None, 503, 0, id="a server error"),
        pytest.param(DEV, None, 422, None, id="a rejection without units"),
        pytest.param(DEV, "1e25", 200, None, id="above the maximum"),
        pytest.param(DEV, "1e999999", 200, None, id="overflow"),
        pytest.param(DEV, "1e-999999", 200, 0, id="underflow"),
    ],
)
def test_cost_of_a_response(
    price: Price | None, units: str | None, status: int, micros: int | None
) -> None:
    assert charged_cost(price, parse_units(units), status) == micros


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "0.00"),
        (40_000, "0.04"),
        (1, "0.000001"),
        (1_234_500_000, "1234.50"),
        (-5_000, "-0.005"),
    ],
)
def test_an_amount_is_formatted_exactly(micros: int, text: str) -> None:
    assert format_usd(micros) == text


@given(st.integers(0, MICROS_MAX))
def test_a_formatted_amount_parses_to_itself(micros: int) -> None:
    assert cost_from_units(Price(Decimal(format_usd(micros))), Decimal(1)) == micros


@given(st.integers(0, 10**9), st.integers(0, 1000))
def test_costs_of_several_images_are_exact(micros: int, count: int) -> None:
    price = Price(Decimal(micros).scaleb(-6))
    assert cost_from_sizes(price, [None] * count) == micros * count


@pytest.mark.parametrize("unit", ["images", "megapixels"])
def test_units_are_multiplied_by_the_price_of_any_unit(unit: Unit) -> None:
    assert cost_from_units(Price(Decimal("0.5"), unit), Decimal("1.5")) == 750_000


@pytest.mark.parametrize("text", ["", "free", "-0.04", "nan", "$0.04"])
def test_text_that_is_no_number_of_units_is_none(text: str) -> None:
    assert parse_units(text) is None
