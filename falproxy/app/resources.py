"""Resources of an application: connections to fal, ledger, result cache, storage, …

Each is created by one function, which also registers its cleanup context. Contexts are closed in
reverse order, so a resource is opened before the resources that use it at shutdown.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.app.components import (
    create_cache_store,
    create_idempotency_store,
    create_limits_store,
    create_prices,
    create_storage,
    rehosted_prefixes,
)
from falproxy.app.pipeline import (
    LIVE_STATE,
    CallResources,
    CreateLivePipeline,
    LiveState,
    compose,
)
from falproxy.background import (
    Background,
    background_context,
)
from falproxy.dialects import default_error, handle_errors
from falproxy.dialects.public_url import files_base_url, public_base_url
from falproxy.fal.keys import KeyPool
from falproxy.media.fetch import Fetcher, fetcher_context
from falproxy.metrics import METRICS
from falproxy.middleware.access_log import (
    identify_requests,
)
from falproxy.middleware.idempotency import keyed_calls_context
from falproxy.middleware.job_costs import job_check
from falproxy.middleware.limit_calls import LimitPolicy
from falproxy.middleware.limiter import Limiter, limiter_context
from falproxy.proxy.prices import PriceBook
from falproxy.proxy.upstream import connect_upstream
from falproxy.settings import Settings
from falproxy.stores.cache.result_cache import RESULT_CACHE, ResultCache, result_cache_context
from falproxy.stores.idempotency.keyed_calls import KeyedCalls
from falproxy.stores.keys.known_keys import KNOWN_KEYS, KnownKeys
from falproxy.stores.keys.sql_keys import choose_key_store
from falproxy.stores.ledger.process_starts import this_start
from falproxy.stores.ledger.writer import LedgerWriter, choose_ledger, ledger_context

if TYPE_CHECKING:
    from falproxy.fal.registry import Registry
    from falproxy.middleware.rehost import RehostConfig

LEDGER_SHUTDOWN_TIMEOUT = 2.5  # seconds to write the last records


def open_ledger_writer(app: web.Application, settings: Settings) -> LedgerWriter:
    """Open the ledger first, so that it is closed after everything that writes records."""
    ledger = choose_ledger(settings.ledger.database_url, settings.data_dir)
    writer = LedgerWriter(
        ledger,
        settings.ledger.retention,
        jobs_retention=settings.ledger.jobs_retention,
        start=this_start(),
    )
    app.cleanup_ctx.append(ledger_context(writer, LEDGER_SHUTDOWN_TIMEOUT))
    return writer


def open_known_keys(app: web.Application, settings: Settings) -> KnownKeys | None:
    """Open the keys that are made at run time; None if they are not accepted."""
    if settings.auth.keys != "on":
        return None
    store = choose_key_store(settings.ledger.database_url, settings.data_dir)
    known_keys = app[KNOWN_KEYS] = KnownKeys(store)

    async def known_keys_context(app: web.Application) -> AsyncIterator[None]:
        async with known_keys:
            yield

    app.cleanup_ctx.append(known_keys_context)
    return known_keys


def open_upstream(app: web.Application, settings: Settings) -> KeyPool:
    """Open the connections to fal. Returns the fal keys that calls are sent with."""
    key_pool = KeyPool(settings.fal_keys, time.monotonic)
    app.cleanup_ctx.append(
        connect_upstream(
            key_pool.next_key(),
            origin=settings.upstream.origin,
            timeouts=(settings.upstream.connect_timeout, settings.upstream.timeout),
            transport=settings.upstream.transport,
        )
    )
    return key_pool


def open_limits(
    app: web.Application,
    settings: Settings,
    known_keys: KnownKeys | None,
    key_pool: KeyPool,
    prices: PriceBook,
) -> LimitPolicy | None:
    """Open the limits, after the connections to fal, which is asked about jobs. Returns None if
    nothing can be limited: there are no settings, and no keys that may have limits of their own."""
    if not settings.limits.is_used and known_keys is None:
        return None
    limiter = Limiter(
        create_limits_store(settings),
        job_check(app, key_pool),
        settings.limits.on_error,
        lambda: settings.limits.is_used or (known_keys is not None and known_keys.has_limits),
    )
    app.cleanup_ctx.append(limiter_context(limiter))
    return LimitPolicy(
        limiter, prices, settings.limits, app[METRICS], settings.auth.live_max_seconds
    )


def open_fetcher(app: web.Application, fetcher: Fetcher) -> Fetcher:
    app.cleanup_ctx.append(fetcher_context(fetcher))
    return fetcher


def open_rehosting(
    app: web.Application, settings: Settings, fetcher: Fetcher, prefix: str
) -> "RehostConfig | None":
    """Open the storage of files, and add the route of these if the proxy serves them.

    Returns None if outputs stay with fal.
    """
    if settings.storage_backend == "off":
        return None
    from falproxy.middleware.rehost import RehostConfig
    from falproxy.stores.files.inputs import InputStore, inputs_context
    from falproxy.stores.files.rehosting import Rehoster, rehoster_context
    from falproxy.stores.files.retention import files_retention_context
    from falproxy.stores.files.serve import PATH, file_handler

    base_url: Callable[[web.Request], str] = public_base_url
    storage = create_storage(settings)
    if storage.local_files is not None:
        layers = [identify_requests(), handle_errors(default_error)]
        handler = compose(layers, file_handler(storage.local_files))
        base_url = files_base_url(
            app.router.add_get(prefix + PATH, handler), settings.server.public_url
        )
    rehoster = Rehoster(storage, fetcher, rehosted_prefixes=rehosted_prefixes(settings))
    app.cleanup_ctx.append(rehoster_context(rehoster, settings.server.drain / 2))
    if settings.storage.files_retention is not None:
        app.cleanup_ctx.append(files_retention_context(storage, settings))
    inputs = InputStore(rehoster, fetcher) if settings.storage.rehost_inputs else None
    if inputs is not None:
        app.cleanup_ctx.append(inputs_context(inputs, settings.server.drain / 2))

    async def start_draining(app: web.Application) -> None:
        rehoster.start_draining(settings.server.drain / 4)

    app.on_shutdown.append(start_draining)
    is_strict = settings.storage.on_error == "error"
    return RehostConfig(rehoster, base_url, is_strict, inputs)


def open_result_cache(app: web.Application, settings: Settings) -> ResultCache | None:
    """Open the store of results and shared state; None if both the cache and Redis are off.

    It is opened after the connections to fal, so that calls in progress at shutdown can end.
    """
    if not settings.cache.enabled and settings.cache.redis_url is None:
        return None
    result_cache = app[RESULT_CACHE] = ResultCache(create_cache_store(settings))
    app.cleanup_ctx.append(result_cache_context(result_cache, settings.server.drain / 2))
    return result_cache


def open_prices(
    app: web.Application, settings: Settings, load_registry: "Callable[[], Registry]"
) -> PriceBook:
    """Open the prices of all endpoints, after the connections to fal, which is asked for them."""
    prices = create_prices(settings, load_registry)
    app.cleanup_ctx.append(prices.cleanup_context)
    return prices


def open_keyed_calls(app: web.Application, settings: Settings) -> KeyedCalls:
    """Open the records of calls with an Idempotency-Key. As the result cache, they are opened after
    the connections to fal."""
    keyed_calls = KeyedCalls(create_idempotency_store(settings))
    app.cleanup_ctx.append(keyed_calls_context(keyed_calls, settings.server.drain / 2))
    return keyed_calls


def open_live(
    app: web.Application,
    settings: Settings,
    calls: CallResources,
    prices: PriceBook,
    *,
    is_locked: bool,
) -> CreateLivePipeline:
    """Return the function that creates the pipeline of live video, imported when it is called."""
    state = app[LIVE_STATE] = LiveState()

    async def close_live(app: web.Application) -> AsyncIterator[None]:
        async with state.closing:
            yield

    app.cleanup_ctx.append(close_live)

    def create(layers: Sequence[Middleware], post: Handler) -> Handler:
        from falproxy.app.live_pipeline import LiveResources, create_live_pipeline

        live = LiveResources(app, settings, calls, prices, is_locked, state)
        return create_live_pipeline(live, layers, post)

    return create


def open_background(app: web.Application, settings: Settings) -> Background:
    """Open the group of tasks that may outlive their request."""
    background = Background()
    app.cleanup_ctx.append(background_context(background, settings.server.drain / 2))
    return background
