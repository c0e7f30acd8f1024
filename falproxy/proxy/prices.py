"""Prices of endpoints: of the registry and the operator's own models, else of fal's price list.

fal is asked about an endpoint when a price is first needed, and once a day after that. A price that
is out of date is used until a newer one has arrived.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache, partial
from typing import Literal
from urllib.parse import quote

from aiohttp import hdrs, web
from cachetools import LRUCache
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.errors import ProxyError, TemporaryError
from falproxy.fal.endpoint import is_endpoint
from falproxy.fal.estimates import SIZED_INPUTS, TEXT_INPUTS, estimate_units, select_inputs
from falproxy.fal.pricing import Price, cost_from_units, parse_price_list
from falproxy.fal.target import Target
from falproxy.proxy.call import Call
from falproxy.proxy.model_schemas import SchemaClient, SchemaUnavailable
from falproxy.proxy.upstream import UPSTREAM, Upstream, read_chunk
from falproxy.shared_tasks import SharedTasks
from falproxy.stores.price_file import ListedPrice, PriceFile

logger = logging.getLogger(__name__)

COST_HEADER, SAVED_HEADER = "x-falproxy-cost", "x-falproxy-saved"  # USD
HOST, PATH = "api.fal.ai", "/v1/models/pricing"
HEADERS = CIMultiDictProxy(CIMultiDict({hdrs.ACCEPT: "application/json"}))
# Seconds until fal is asked again: about a price, about an endpoint without one, and after fal
# could not be asked.
PRICE_TTL, NO_PRICE_TTL, RETRY_AFTER = 24 * 3600.0, 3600.0, 30.0
FETCH_TIMEOUT = 10.0  # seconds of a request
WAIT_TIMEOUT = 3.0  # seconds that a caller waits for it
DOCUMENT_MAX = 2**20  # bytes
NO_PRICES = b'{"prices": []}'
CACHE_SIZE = 4096  # endpoints, whose ids are short, with a few defaults each
DEFAULTS_TEXT_MAX = 200  # characters of a default
# Units whose number is the same for all inputs, or unknown before the result.
UNITS_WITHOUT_DEFAULTS = ("requests", "characters", "compute seconds")
ACCOUNT_STATUSES = (401, 403, 429)  # of responses that concern all endpoints

Source = Literal["registry", "fal"]


@dataclass(frozen=True, slots=True)
class PricedModel:
    """A model of the registry. defaults: values of inputs that a call does not have."""

    price: Price | None
    defaults: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Quote:
    """The price of an endpoint.

    price: None if fal has none.
    source: None without a price.
    is_found: False if fal does not know the endpoint.
    defaults: as in PricedModel.
    """

    price: Price | None
    source: Source | None = None
    is_found: bool = True
    defaults: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The expected cost of a call. cost: micro-USD. Each field is None if it is unknown."""

    price: Price | None = None
    units: Decimal | None = None
    cost: int | None = None


UNKNOWN = Quote(None)
NO_ESTIMATE = Estimate()
ESTIMATES_MAX = 1024  # in memory
# Of the inputs of an estimate in memory: types, and characters.
SIMPLE_TYPES, SIMPLE_MAX = (int, str, bool, float), 32
RegistryPrices = Callable[[], Mapping[str, PricedModel]]


class PriceUnavailable(TemporaryError):
    """fal could not be asked for a price, and no earlier one is known."""

    def __init__(self) -> None:
        message = "fal.ai cannot be asked for the price now. Try again."
        super().__init__(503, "price_unavailable", message, {hdrs.RETRY_AFTER: "5"})


class NoPriceList(Exception):
    """fal did not respond with a price list. concerns_all: it would not for other endpoints."""

    def __init__(self, *, concerns_all: bool) -> None:
        super().__init__("no price list")
        self.concerns_all = concerns_all


class PriceBook:
    """The prices of all endpoints. Concurrent callers share one request.

    registry: returns the models with a price of their own by endpoint id; called on first use.
    schemas: fetches the schemas of models, which have the defaults of their inputs.
    file: the prices that earlier processes and other processes have fetched.
    clock, wall_clock: seconds; monotonic, and since 1970.
    """

    def __init__(
        self,
        registry: RegistryPrices,
        *,
        schemas: SchemaClient | None = None,
        file: PriceFile | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.wait_timeout, self.retry_after = WAIT_TIMEOUT, RETRY_AFTER
        self._registry = registry
        self.schemas = schemas or SchemaClient()
        self._file = file
        self._clock = clock
        self._wall_clock = wall_clock
        self._upstream: Upstream | None = None
        self._listed: LRUCache[str, ListedPrice] = LRUCache(CACHE_SIZE)
        # Prices for lists of models, without defaults.
        self._quoted: LRUCache[str, ListedPrice] = LRUCache(CACHE_SIZE)
        # Endpoint → time until which fal is not asked about it; an empty name for all endpoints.
        self._paused: LRUCache[str, float] = LRUCache(CACHE_SIZE)
        self._refreshes: SharedTasks[str, None] = SharedTasks()

    def __repr__(self) -> str:
        return f"<PriceBook {len(self._listed)} prices of fal, {len(self._refreshes)} asked for>"

    async def cleanup_context(self, app: web.Application) -> AsyncIterator[None]:
        """Cleanup context: fal can be asked for as long as its connections are open."""
        self.open(app[UPSTREAM])
        await self.load()
        yield
        await self.close()

    def open(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def close(self) -> None:
        self._upstream = None
        await self._refreshes.close()

    async def load(self) -> None:
        """Read the prices on the disk, newer ones of other processes as well."""
        if self._file is None:
            return
        for name, listed in (await asyncio.to_thread(self._file.load)).items():
            known = self._listed.get(name)
            if known is None or known.fetched_at < listed.fetched_at:
                self._listed[name] = listed

    def known(self, endpoint: str) -> Price | None:
        """Return the price of an endpoint without asking fal; None if it is not known here."""
        return self._known_quote(endpoint).price

    def known_estimate(self, endpoint: str, inputs: Mapping[str, object] | None) -> Estimate:
        """Estimate a call without asking fal. inputs: None if they could not be read."""
        return make_estimate(self._known_quote(endpoint), inputs)

    async def get(self, endpoint: str) -> Price | None:
        """Return the price of an endpoint; None if fal has none. Raises: PriceUnavailable."""
        return (await self.find(endpoint)).price

    async def estimate(self, endpoint: str, inputs: Mapping[str, object] | None) -> Estimate:
        """Estimate a call. inputs: None if they could not be read. Raises: PriceUnavailable."""
        return make_estimate(await self.find(endpoint), inputs)

    async def find(self, endpoint: str) -> Quote:
        """Return the price of an endpoint, and ask fal for it if that is due. Raises:
        PriceUnavailable."""
        known = self._known_quote(endpoint)
        if known.source == "registry" or not is_endpoint(endpoint):
            return known
        task = self._start_refresh(endpoint)
        if task is not None and known.price is None:
            await asyncio.wait([task], timeout=self.wait_timeout)
        if endpoint not in self._listed:
            raise PriceUnavailable
        return self._known_quote(endpoint)

    async def find_many(self, endpoints: Sequence[str]) -> dict[str, Price]:
        """Return the known prices of endpoints, those of fal by one request. Estimates do not use
        the latter: they need the defaults of the model as well."""
        missing = [name for name in endpoints if self._quoted_price(name) is None]
        upstream = self._upstream
        if missing and upstream is not None and self._paused.get("", 0.0) <= self._clock():
            fetch = partial(self._fetch_many, upstream, missing)
            task = self._refreshes.start(",".join(missing), fetch)
            await asyncio.wait([task], timeout=self.wait_timeout)
        prices = {name: self._quoted_price(name) for name in endpoints}
        return {name: price for name, price in prices.items() if price is not None}

    def _quoted_price(self, endpoint: str) -> Price | None:
        quoted = self._quoted.get(endpoint)
        is_fresh = quoted is not None and quoted.fetched_at > self._wall_clock() - PRICE_TTL
        return self.known(endpoint) or (quoted.price if quoted is not None and is_fresh else None)

    async def _fetch_many(self, upstream: Upstream, endpoints: Sequence[str]) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT):
                prices = await fetch_prices(upstream, endpoints)
        except (ProxyError, TimeoutError, NoPriceList):
            logger.warning("The prices of %d endpoints are unavailable", len(endpoints))
            return
        now = self._wall_clock()
        self._quoted.update({name: ListedPrice(price, now) for name, price in prices.items()})

    def refresh_soon(self, endpoint: str, when_known: Callable[[], None] | None = None) -> None:
        """Ask fal for the price of an endpoint in the background, if that is due.

        when_known: called once if the price was unknown and has arrived.
        """
        known = self._known_quote(endpoint)
        if known.source == "registry" or not is_endpoint(endpoint):
            return
        task = self._start_refresh(endpoint)
        if task is None or known.price is not None or when_known is None:
            return

        def on_done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and self.known(endpoint) is not None:
                when_known()

        task.add_done_callback(on_done)

    def _known_quote(self, endpoint: str) -> Quote:
        model = self._registry().get(endpoint)
        if model is not None and model.price is not None:
            return Quote(model.price, "registry", defaults=model.defaults)
        if (listed := self._listed.get(endpoint)) is None:
            return UNKNOWN
        source: Source | None = None if listed.price is None else "fal"
        defaults = {**(listed.defaults or {}), **(model.defaults if model is not None else {})}
        return Quote(listed.price, source, listed.is_found, defaults)

    def _start_refresh(self, endpoint: str) -> "asyncio.Task[None] | None":
        """Return the running request for a price, started now if it is due. None if there is no
        need to ask, or if fal cannot be asked now."""
        if self._is_fresh(endpoint) or self._upstream is None:
            return None
        now = self._clock()
        if any(self._paused.get(name, 0.0) > now for name in ("", endpoint)):
            return None
        return self._refreshes.start(endpoint, partial(self._refresh, self._upstream, endpoint))

    def _is_fresh(self, endpoint: str) -> bool:
        if (listed := self._listed.get(endpoint)) is None:
            return False
        ttl = NO_PRICE_TTL if listed.price is None else PRICE_TTL
        # A clock that was set back must not keep a price for ever.
        return abs(self._wall_clock() - listed.fetched_at) < ttl

    async def _refresh(self, upstream: Upstream, endpoint: str) -> None:
        await self.load()
        if self._is_fresh(endpoint):
            return
        try:
            async with asyncio.timeout(FETCH_TIMEOUT):
                price, is_found = await fetch_price(upstream, endpoint)
        except (ProxyError, TimeoutError, NoPriceList) as error:
            concerns_all = not isinstance(error, NoPriceList) or error.concerns_all
            logger.warning("The price of %s is unavailable", endpoint)
            self._paused["" if concerns_all else endpoint] = self._clock() + self.retry_after
            return
        listed = ListedPrice(price, self._wall_clock(), is_found)
        self._listed[endpoint] = listed
        defaults = await self._find_defaults(upstream, endpoint, price)
        listed = self._listed[endpoint] = replace(listed, defaults=defaults)
        if self._file is not None:
            await asyncio.to_thread(self._file.save, {endpoint: listed})

    async def _find_defaults(
        self, upstream: Upstream, endpoint: str, price: Price | None
    ) -> Mapping[str, object] | None:
        if price is None or price.unit in UNITS_WITHOUT_DEFAULTS:
            return None
        try:
            schema = await self.schemas.get_schema(upstream, endpoint)
        except SchemaUnavailable:
            return None
        if schema is None:
            return None
        inputs = schema.inputs.items()
        defaults = {name: each.default for name, each in inputs if name in SIZED_INPUTS}
        return {
            name: value
            for name, value in select_inputs(defaults).items()
            if len(repr(value)) <= DEFAULTS_TEXT_MAX
        }


def make_estimate(found: Quote, inputs: Mapping[str, object] | None) -> Estimate:
    price = found.price
    if price is None or inputs is None:
        return replace(NO_ESTIMATE, price=price)
    priced = {**(found.defaults or {}), **select_inputs(inputs)}
    if price.unit != "characters":
        priced = {name: value for name, value in priced.items() if name not in TEXT_INPUTS}
    items = tuple((name, type(value), value) for name, value in priced.items())
    if all(kind in SIMPLE_TYPES and len(str(value)) <= SIMPLE_MAX for _, kind, value in items):
        return estimate_cached(price, items)
    return estimate_priced(price, priced)


def estimate_priced(price: Price, inputs: Mapping[str, object]) -> Estimate:
    units = estimate_units(price, inputs)
    return Estimate(price, units, cost_from_units(price, units))


@lru_cache(ESTIMATES_MAX)
def estimate_cached(price: Price, items: tuple[tuple[str, type, object], ...]) -> Estimate:
    """Estimate a call. Cached, because most calls have one of few sizes.

    items: names, types and values of the inputs: 1 and True are equal, but not the same input.
    """
    return estimate_priced(price, {name: value for name, _, value in items})


async def fetch_price(upstream: Upstream, endpoint: str) -> tuple[Price | None, bool]:
    """Ask fal for the price of an endpoint. Return it, and whether fal knows the endpoint.

    Raises: NoPriceList, ProxyError.
    """
    body = await fetch_price_list(upstream, [endpoint])
    if body is None:
        return None, False
    try:
        return parse_price_list(body, endpoint), True
    except ValueError as error:
        raise NoPriceList(concerns_all=False) from error


async def fetch_prices(upstream: Upstream, endpoints: Sequence[str]) -> dict[str, Price]:
    """Ask fal for the prices of endpoints; those without a price are left out.

    Raises: NoPriceList, ProxyError.
    """
    body = await fetch_price_list(upstream, endpoints)
    try:
        prices = {name: parse_price_list(body or NO_PRICES, name) for name in endpoints}
    except ValueError as error:
        raise NoPriceList(concerns_all=False) from error
    return {name: price for name, price in prices.items() if price is not None}


async def fetch_price_list(upstream: Upstream, endpoints: Sequence[str]) -> bytes | None:
    """Return fal's response for endpoints; None if it does not know one of them.

    Raises: NoPriceList, ProxyError.
    """
    query = "?" + "&".join(f"endpoint_id={quote(name, safe='')}" for name in endpoints)
    response = await upstream.send(
        Call(hdrs.METH_GET, Target(HOST, PATH, query), HEADERS, needs_identity=True)
    )
    try:
        if response.status == web.HTTPNotFound.status_code:
            return None
        if response.status != web.HTTPOk.status_code:
            raise NoPriceList(concerns_all=response.status in ACCOUNT_STATUSES)
        body = b""
        while chunk := await read_chunk(response):
            body += chunk
            if len(body) > DOCUMENT_MAX:
                raise NoPriceList(concerns_all=False)
    finally:
        response.close()
    return body
