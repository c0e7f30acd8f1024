"""Limits of a proxy under test: what is counted, and the clock of its store."""

import time
from decimal import Decimal
from typing import Any

from aiohttp import web

from falproxy.fal.pricing import MICROS_PER_USD, Price
from falproxy.middleware.limiter import LIMITER, Limiter
from falproxy.proxy.prices import PriceBook, PricedModel
from falproxy.stores.limits import Limit
from falproxy.windows import DAY, Window

HOUR = Window(3600)
LONG = Window(1000 * DAY)  # does not end while a test runs
# A model of $0.025 for a megapixel, whose results are not cached, and one of $0.04 for a result
# that is.
MODEL, APP, PRICE = "fal-ai/flux/dev", "fal-ai/flux", 25_000
SUBMIT, RUN = f"https://queue.fal.run/{MODEL}", f"https://fal.run/{MODEL}"


def limiter_of(app: web.Application) -> Limiter:
    return app[LIMITER]


async def spent(app: web.Application, subject: str) -> int:
    """Return the micro-USD that a budget of LONG counts."""
    return await counted(app, Limit("budget", subject, 1, LONG))


async def running(app: web.Application, subject: str) -> int:
    return await counted(app, Limit("concurrency", subject, 1))


async def counted(app: web.Application, limit: Limit) -> int:
    (state,) = await limiter_of(app)._store.count([limit])
    return state.used


async def sweep_after(app: web.Application, seconds: float) -> None:
    """Let seconds pass in the limits store, which is a file, and end what is due."""
    limiter = limiter_of(app)
    store: Any = limiter._store
    offset = getattr(store, "offset", 0.0) + seconds
    store.offset = offset
    store._clock = lambda: time.time() + offset
    await limiter.sweep()


async def open_reservations(app: web.Application) -> int:
    """Return the number of reservations that are open, which are then claimed."""
    store: Any = limiter_of(app)._store
    store._clock = lambda: time.time() + 3600.0
    return len(await store.claim_due(1000, 0.0))


def price_book() -> PriceBook:
    """Return the prices of MODEL only."""
    return PriceBook(lambda: {MODEL: PricedModel(Price(Decimal(PRICE) / MICROS_PER_USD), {})})
