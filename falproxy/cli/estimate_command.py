"""`falproxy estimate`: what a call would cost, as a table or as JSON."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from pathlib import Path
from time import monotonic

from falproxy.app.components import create_prices, create_registry
from falproxy.cli.cache_command import read_call
from falproxy.errors import SettingsError
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import is_model_call, model_of
from falproxy.fal.pricing import Price, format_usd
from falproxy.json_object import parse_object
from falproxy.proxy.prices import PriceBook, PriceUnavailable, Quote, make_estimate
from falproxy.proxy.upstream import Upstream, open_transport
from falproxy.settings import SANDBOX_KEY, Settings
from falproxy.web.estimate import Json, estimate_document

STANDARD_INPUT = Path("/dev/stdin")
TIMEOUT = 10.0  # seconds without a byte from fal
UNKNOWN = "?"
UNKNOWN_UNITS = "the input does not determine the number of units"
SOURCES = {"registry": "of the registry", "fal": "of fal.ai"}


class EstimateError(Exception):
    """There is no price. The message is a sentence without a period."""


async def estimate(settings: Settings, file: Path, *, is_json: bool) -> AsyncIterator[str]:
    """Yield the lines of the estimate. file: describes the call; `-` is standard input.

    Raises: SettingsError, the file does not describe a call of a model; EstimateError.
    """
    described = read_call(STANDARD_INPUT if str(file) == "-" else file)
    target, inputs = described.call.target, parse_object(described.body)
    if not is_model_call("POST", target) or inputs is None:
        raise SettingsError(f"{file} must describe a call of a model, with an object as `input`.")
    endpoint = model_of(target)
    async with open_prices(settings) as prices:
        try:
            found = await prices.find(endpoint)
        except PriceUnavailable as error:
            raise EstimateError(unavailable_reason(settings, endpoint)) from error
    if not found.is_found:
        raise EstimateError(f"fal.ai knows no endpoint {endpoint}")
    document = estimate_document(endpoint, found, inputs)
    lines = [json.dumps(document, indent=2)] if is_json else format_lines(document, found, inputs)
    for line in lines:
        yield line


@asynccontextmanager
async def open_prices(settings: Settings) -> AsyncIterator[PriceBook]:
    """Open the prices; without a fal key they are those of the registry, and those that a proxy has
    stored."""
    prices = create_prices(settings, cache(partial(create_registry, settings)))
    await prices.load()
    if is_offline(settings):
        yield prices
        return
    timeouts = (settings.upstream.connect_timeout, TIMEOUT)
    key = KeyPool(settings.fal_keys, monotonic).next_key()
    async with open_transport(timeouts) as transport:
        prices.open(Upstream(transport, key, origin=settings.upstream.origin))
        try:
            yield prices
        finally:
            await prices.close()


def is_offline(settings: Settings) -> bool:
    return settings.fal_keys == (SANDBOX_KEY,) and settings.upstream.origin is None


def unavailable_reason(settings: Settings, endpoint: str) -> str:
    if is_offline(settings):
        return f"{endpoint} is not in the registry: set FAL_KEY to ask fal.ai for its price"
    return f"fal.ai cannot be asked for the price of {endpoint} now"


def format_lines(document: Json, found: Quote, inputs: Json) -> list[str]:
    expected = make_estimate(found, inputs)
    units = UNKNOWN if expected.units is None else f"{document['units']}"
    cost = UNKNOWN if expected.cost is None else f"${format_usd(expected.cost)}"
    lines = [
        f"endpoint  {document['endpoint']}",
        f"price     {format_price(found)}",
        f"units     {units}",
        f"cost      {cost}",
    ]
    is_undetermined = expected.price is not None and expected.units is None
    return [*lines, "", f"?   {UNKNOWN_UNITS}"] if is_undetermined else lines


def format_price(found: Quote) -> str:
    if found.price is None or found.source is None:
        return f"{UNKNOWN} (fal.ai has none)"
    return f"${found.price.usd.normalize():f} per {unit_name(found.price)}, {SOURCES[found.source]}"


def unit_name(price: Price) -> str:
    return "1000 characters" if price.unit == "characters" else price.unit.removesuffix("s")
