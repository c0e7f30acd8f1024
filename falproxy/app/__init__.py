"""Assembly of the proxy: `create_app`, `setup`, and the resources of an application.

`pipeline` has the order of the middleware, `routes` adds the paths.

A resource (connections to fal, ledger, result cache, …) is created by one function here, which also
registers its cleanup context. Contexts are closed in reverse order, so a resource is opened before
the resources that use it at shutdown.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.app.components import (
    create_cache_store,
    create_fetcher,
    create_idempotency_store,
    create_limits_store,
    create_prices,
    create_registry,
    create_storage,
    rehosted_prefixes,
)
from falproxy.app.key_mode import resolve_key_mode
from falproxy.app.pipeline import (
    LIVE_STATE,
    CallResources,
    CreateLivePipeline,
    LiveState,
    authentication,
    authorization,
    call_pipeline,
    check_any_origin,
    compose,
    handler_factory,
    host_middleware,
    limit_fields,
    outermost_layers,
    policy_middleware,
    unrouted_layers,
)
from falproxy.app.routes import (
    Dependencies,
    add_call_routes,
    add_docs,
    add_estimate,
    add_health,
    add_keys,
    add_usage,
    error_responder,
)
from falproxy.background import (
    SHUTDOWN_DEADLINE,
    Background,
    ShutdownDeadline,
    background_context,
)
from falproxy.dialects import default_error, handle_errors, handle_unrouted_errors
from falproxy.dialects.public_url import files_base_url, public_origin
from falproxy.dialects.transparent import BodyLimits
from falproxy.fal.keys import KeyPool
from falproxy.media.fetch import Fetcher, fetcher_context
from falproxy.metrics import METRICS, Metrics
from falproxy.middleware.access import Authenticator
from falproxy.middleware.access_log import (
    add_timing_headers,
    identify_requests,
    timing_headers,
)
from falproxy.middleware.accounting import account_calls
from falproxy.middleware.idempotency import add_replayed_header, keyed_calls_context
from falproxy.middleware.job_costs import job_check
from falproxy.middleware.limit_calls import LimitPolicy
from falproxy.middleware.limiter import Limiter, limiter_context
from falproxy.proxy.forward import DirectWrite
from falproxy.proxy.head_only import is_head_only
from falproxy.proxy.prices import PriceBook
from falproxy.proxy.transport import MAX_HEADER_FIELD
from falproxy.proxy.upstream import connect_upstream
from falproxy.server.draining import DRAIN_STATE
from falproxy.server.fast_path.protocol import ROUTE_CACHE, is_supported
from falproxy.server.fast_path.route_cache import RouteCache
from falproxy.server.limits import CONNECTION_LIMITS, ConnectionLimits
from falproxy.settings import Settings
from falproxy.stores.cache.result_cache import RESULT_CACHE, ResultCache, result_cache_context
from falproxy.stores.idempotency.keyed_calls import KeyedCalls
from falproxy.stores.keys.known_keys import KNOWN_KEYS, KnownKeys
from falproxy.stores.keys.sql_keys import choose_key_store
from falproxy.stores.ledger.writer import LedgerWriter, choose_ledger, ledger_context
from falproxy.web.estimate import estimate_handler
from falproxy.web.health import Drain

if TYPE_CHECKING:
    from falproxy.fal.registry import Registry
    from falproxy.middleware.rehost import RehostConfig

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 2.5  # beyond the drain, and the half of it that paid jobs have in addition
LEDGER_SHUTDOWN_TIMEOUT = 2.5  # seconds to write the last records
READ_AHEAD = 64 * 2**10  # buffered bytes of a request body; reading pauses at twice as many

# Arguments of aiohttp's server protocol.
HANDLER_ARGS = {
    "handler_cancellation": True,  # a client that disconnects cancels its call to fal
    "auto_decompress": False,  # request bodies are forwarded as they are
    "max_field_size": MAX_HEADER_FIELD,
    "max_line_size": MAX_HEADER_FIELD,
    "read_bufsize": READ_AHEAD,
}


def create_app(
    settings: Settings,
    *,
    authenticate: Authenticator | None = None,
    fetcher: Fetcher | None = None,
    metrics: Metrics | None = None,
) -> web.Application:
    """Create the proxy as an application, for `falproxy serve`, `web.run_app` or gunicorn.

    authenticate: returns the name of a request's caller, or None; used besides the access keys and
        tokens of the settings.
    fetcher: reads the URLs in inputs; for tests and for other rules than the default.
    metrics: those of an earlier application, which go on; None for new ones.
    """
    settings = resolve_key_mode(settings, has_hook=authenticate is not None)
    server = settings.server
    handler_args = HANDLER_ARGS | {"keepalive_timeout": server.idle_timeout}
    errors = handle_unrouted_errors(error_responder, unrouted_layers(settings))
    app = web.Application(handler_args=handler_args, middlewares=[errors])
    app[CONNECTION_LIMITS] = ConnectionLimits(
        max_head=server.max_head,
        head_timeout=server.head_timeout,
        idle_timeout=server.idle_timeout,
        max_connections=server.max_connections,
    )
    app[METRICS] = metrics or Metrics()
    add_proxy(app, settings, prefix="", is_standalone=True, auth_hook=authenticate, fetcher=fetcher)
    return app


def setup(
    app: web.Application,
    settings: Settings,
    *,
    prefix: str = "",
    authenticate: Authenticator | None = None,
) -> None:
    """Add the proxy to an application, with all paths below `prefix` (such as `/ai`).

    The application's own routes, middleware and error responses stay as they are. Create it with
    `handler_args={"handler_cancellation": True}`, so that a client that disconnects cancels its
    call to fal.
    """
    settings = resolve_key_mode(settings, has_hook=authenticate is not None)
    if authenticate is None and not settings.auth.is_locked:
        logger.warning(
            "The proxy is open: everyone who reaches this application can use your key. It is "
            "called by IP address, as localhost, and by the names of FALPROXY_PUBLIC_URL and "
            "FALPROXY_ALLOWED_HOSTS only."
        )
    app[METRICS] = Metrics()
    add_proxy(app, settings, prefix=prefix.rstrip("/"), is_standalone=False, auth_hook=authenticate)


def add_proxy(
    app: web.Application,
    settings: Settings,
    *,
    prefix: str,
    is_standalone: bool,
    auth_hook: Authenticator | None,
    fetcher: Fetcher | None = None,
) -> None:
    """Add the proxy's resources and routes to an application.

    is_standalone: the application consists of the proxy only.
    """
    set_shutdown_deadline(app, settings)
    ledger_writer = open_ledger_writer(app, settings)
    metrics = app[METRICS]
    key_pool = open_upstream(app, settings)
    load_registry = cache(partial(create_registry, settings))
    prices = open_prices(app, settings, load_registry)
    known_keys = open_known_keys(app, settings)
    fetcher = open_fetcher(app, fetcher or create_fetcher(settings))
    calls = CallResources(
        key_pool=key_pool,
        limits=open_limits(app, settings, known_keys, key_pool, prices),
        fetcher=fetcher,
        rehosting=open_rehosting(app, settings, fetcher, prefix),
        result_cache=open_result_cache(app, settings),
        keyed_calls=open_keyed_calls(app, settings),
    )
    dependencies = Dependencies(
        body_limits=BodyLimits(settings.server.max_body, is_standalone),
        fetcher=calls.fetcher,
        rehosting=calls.rehosting,
        background=open_background(app, settings),
        load_registry=load_registry,
        jobs=ledger_writer.ledger,
        prices=prices,
    )

    auth_middleware = authentication(settings, auth_hook, known_keys)
    is_locked = bool(auth_middleware)
    host_check = host_middleware(settings, is_locked=is_locked)
    check_any_origin(settings, is_locked=is_locked)
    create_handler = handler_factory(
        settings,
        host_check,
        [*auth_middleware, *limit_fields(calls.limits)],
        authorization(app, settings, key_pool, calls.result_cache, is_locked=is_locked),
        call_pipeline(
            settings,
            calls,
            [account_calls(ledger_writer, prices, metrics)],
            open_live(app, settings, calls, prices, is_locked=is_locked),
        ),
    )
    direct_write = create_direct_write(app) if is_standalone else None
    if direct_write is not None and auth_hook is None and fast_path_enabled(settings):
        enable_fast_path(app, settings, direct_write, calls.result_cache)

    outermost = outermost_layers(settings, metrics, direct_write)
    add_call_routes(app, settings, dependencies, prefix, create_handler, outermost)
    create_estimate_handler = handler_factory(
        settings,
        host_check,
        auth_middleware,
        [policy_middleware(settings)],
        estimate_handler(prices, calls.limits),
    )
    add_estimate(app, settings, prefix, create_estimate_handler, outermost)
    has_root = bool(prefix) or is_standalone  # without a prefix, `/` is the embedding application's
    plain_layers = [identify_requests(), handle_errors(default_error), *host_check]
    add_docs(
        app, settings, dependencies, prefix, plain_layers, is_locked=is_locked, has_root=has_root
    )
    add_usage(app, settings, prefix, plain_layers, auth_middleware, ledger_writer.ledger)
    if known_keys is not None:
        add_keys(app, settings, prefix, [*plain_layers, *auth_middleware], known_keys)
    add_drain(app, prefix, direct_write)


def add_drain(app: web.Application, prefix: str, direct_write: DirectWrite | None) -> None:
    """Add the health checks, and the headers that every response gets."""
    drain = app[DRAIN_STATE] = Drain(direct_write)
    add_health(app, prefix, drain)
    app.on_shutdown.append(drain.start)
    app.on_response_prepare.extend(
        (add_timing_headers, add_replayed_header, drain.add_connection_close)
    )


def set_shutdown_deadline(app: web.Application, settings: Settings) -> None:
    """Limit the time that all resources together take to close."""
    deadline = ShutdownDeadline(settings.server.drain * 1.5 + SHUTDOWN_SECONDS)
    app[SHUTDOWN_DEADLINE] = deadline
    app.on_shutdown.append(deadline.start)


def create_direct_write(app: web.Application) -> DirectWrite:
    """Create the object that decides whether responses may be written directly.

    It is enabled at startup if the application has no middleware and no `on_response_prepare`
    signal from outside falproxy, because these would not be called.
    """
    direct_write = DirectWrite(timing_headers, enabled=False)

    async def enable_if_unobserved(app: web.Application) -> None:
        signals = app.on_response_prepare
        direct_write.enabled = all(
            is_head_only(middleware) for middleware in app.middlewares
        ) and all(signal.__module__.startswith("falproxy.") for signal in signals)

    app.on_startup.append(enable_if_unobserved)
    return direct_write


def fast_path_enabled(settings: Settings) -> bool:
    """Return whether repeated requests may skip the middleware. Not with tokens: they expire."""
    auth = settings.auth
    has_tokens = auth.jwt_secret is not None or auth.jwks_url is not None
    has_pool = settings.upstream.transport == "pool"
    return settings.server.fast_path and has_pool and not has_tokens and is_supported()


def enable_fast_path(
    app: web.Application,
    settings: Settings,
    direct_write: DirectWrite,
    result_cache: ResultCache | None,
) -> None:
    """Add the route cache, which the server of `falproxy serve` uses for repeated requests."""

    def is_virtual_request(request_id: str) -> bool:
        if result_cache is None:
            return False
        return result_cache.virtual_requests.peek(request_id) is not None

    route_cache = app[ROUTE_CACHE] = RouteCache(
        app[METRICS], direct_write, settings.server.max_body, is_virtual_request
    )
    app.cleanup_ctx.append(route_cache.cleanup_context)


def open_ledger_writer(app: web.Application, settings: Settings) -> LedgerWriter:
    """Open the ledger first, so that it is closed after everything that writes records."""
    ledger = choose_ledger(settings.ledger.database_url, settings.data_dir)
    writer = LedgerWriter(ledger, settings.ledger.retention)
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
    from falproxy.stores.files.serve import PATH, file_handler

    base_url: Callable[[web.Request], str] = public_origin
    storage = create_storage(settings)
    if storage.local_files is not None:
        layers = [identify_requests(), handle_errors(default_error)]
        handler = compose(layers, file_handler(storage.local_files))
        base_url = files_base_url(
            app.router.add_get(prefix + PATH, handler), settings.server.public_url
        )
    rehoster = Rehoster(storage, fetcher, rehosted_prefixes=rehosted_prefixes(settings))
    app.cleanup_ctx.append(rehoster_context(rehoster, settings.server.drain / 2))
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
