"""Estimates of what a call will be charged for."""

from decimal import Decimal

import pytest

from falproxy.fal.estimates import estimate_cost, estimate_units
from falproxy.fal.pricing import Price, Unit, parse_unit
from tests.support.input_json import long_string

LONG = long_string(b" " * 5000 + b"4")


@pytest.mark.parametrize(
    ("unit", "inputs", "units"),
    [
        ("images", {}, "1"),
        ("images", {"num_images": 4}, "4"),
        ("images", {"num_images": 4.0}, "4"),
        ("images", {"num_images": True}, "1"),
        ("images", {"num_images": "4"}, "4"),
        ("images", {"num_images": -3}, "1"),
        ("images", {"num_images": "+4"}, "4"),
        ("images", {"num_images": " " * 50 + "4"}, "4"),
        ("images", {"num_images": "0" * 20 + "4"}, "4"),
        ("images", {"num_images": "0" * 50 + "4"}, "1000"),
        ("images", {"num_images": "4." + "0" * 50}, "1000"),
        ("images", {"num_images": "1" * 50}, "1000"),
        ("images", {"num_images": LONG}, "1000"),
        ("megapixels", {"image_size": {"width": "0" * 20 + "2048", "height": 1024}}, "2"),
        ("megapixels", {"image_size": {"width": "0" * 50 + "2048", "height": 1024}}, "64"),
        ("seconds", {"duration": "0" * 20 + "8", "seconds": 1}, "8"),
        ("seconds", {"duration": "8e0", "seconds": 1}, "8"),
        ("seconds", {"duration": "0" * 50 + "8", "seconds": 1}, "86400"),
        ("seconds", {"duration": "8." + "0" * 50 + "s", "seconds": 1}, "86400"),
        ("seconds", {"duration": LONG, "seconds": 1}, "86400"),
        ("images", {"num_images": 10**30}, "1000"),
        ("images", {"num_images": ["1", "4"]}, "4"),  # twice in a query
        ("images", {"number_of_images": 3}, "3"),
        ("images", {"num_results": 3}, "3"),
        ("images", {"max_images": 6}, "6"),
        ("images", {"num_images": 2, "max_images": "6"}, "12"),
        ("images", {"max_images": 10**30, "num_images": 10**30}, "1000"),
        ("images", {"upscale_factor": 4}, "1"),
        ("megapixels", {"upscale_factor": 4}, None),  # depends on the image
        ("megapixels", {"scale": 2, "image_size": "square"}, None),
        ("megapixels", {}, "1"),
        ("megapixels", {"image_size": "square_hd"}, "1"),
        ("megapixels", {"image_size": {"width": 1920, "height": 1080}}, "2"),
        ("megapixels", {"image_size": {"width": 1025, "height": 1024}, "num_images": 3}, "6"),
        ("megapixels", {"width": 2048, "height": 2048}, "4"),
        ("megapixels", {"image_size": {"width": float("nan"), "height": 10**400}}, "64"),
        ("megapixels", {"image_size": "unknown"}, "1"),
        ("seconds", {"duration": 5}, "5"),
        ("seconds", {"duration": "8s"}, "8"),
        ("seconds", {"duration": "10", "num_videos": 2}, "20"),
        ("seconds", {"seconds": "4.5"}, "4.5"),
        ("seconds", {"duration": "auto"}, None),
        ("seconds", {"num_frames": 48, "fps": 24}, "2"),
        ("seconds", {"num_frames": 48, "fps": 24, "frames_per_second": 10**6}, "2"),
        ("seconds", {"num_frames": 48, "fps": "1e-999999"}, "4800"),
        ("seconds", {"num_frames": 10**18, "fps": "1e-999999"}, "86400"),
        ("seconds", {}, None),
        ("videos", {}, "1"),
        ("requests", {"num_images": 4}, "1"),
        ("characters", {"text": "a" * 1500}, "1.5"),
        ("characters", {"prompt": "a" * 10}, "0.01"),
        ("characters", {"text": "", "prompt": "a" * 10}, "0.01"),
        ("characters", {"text": "a", "script": LONG}, "5.001"),
        ("characters", {}, None),
        ("compute seconds", {"duration": 5}, None),
    ],
)
def test_units_of_an_input(unit: Unit, inputs: dict[str, object], units: str | None) -> None:
    expected = None if units is None else Decimal(units)
    assert estimate_units(Price(Decimal(1), unit), inputs) == expected


def test_a_missing_input_has_the_default_of_the_model() -> None:
    price = Price(Decimal("0.05"), "seconds")
    assert estimate_cost(price, {}, {"duration": "5"}) == 250_000
    assert estimate_cost(price, {"duration": 10}, {"duration": "5"}) == 500_000
    assert estimate_cost(price, {}, {}) is None
    assert estimate_cost(None, {"duration": 10}, {}) is None


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("image", "images"),
        ("Images", "images"),
        ("megapixels", "megapixels"),
        ("per second", "seconds"),
        ("1,000 characters", "characters"),
        ("compute seconds", "compute seconds"),
        ("parsec", None),
        ("", None),
    ],
)
def test_names_of_units(text: str, unit: str | None) -> None:
    assert parse_unit(text) == unit
