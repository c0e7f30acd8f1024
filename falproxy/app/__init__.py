"""Assembly of the proxy: `create_app` and `setup`.

`resources` opens connections and stores, `pipeline` has the order of the middleware, `routes` adds
the paths.
"""

import logging
from functools import cache, partial
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Middleware

from falproxy.app.components import (
    create_fetcher,
    create_registry,
)
from falproxy.app.health import watch_health
from falproxy.app.key_mode import resolve_key_mode
from falproxy.app.pipeline import (
    CallResources,
    authentication,
    authorization,
    call_pipeline,
    check_any_origin,
    handler_factory,
    host_middleware,
    limit_fields,
    outermost_layers,
    policy_middleware,
    unrouted_layers,
)
from falproxy.app.resources import (
    open_background,
    open_fetcher,
    open_keyed_calls,
    open_known_keys,
    open_ledger_writer,
    open_limits,
    open_live,
    open_prices,
    open_rehosting,
    open_result_cache,
    open_upstream,
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
    ShutdownDeadline,
)
from falproxy.dialects import default_error, handle_errors, handle_unrouted_errors
from falproxy.dialects.transparent import BodyLimits
from falproxy.errors import SettingsError
from falproxy.media.fetch import Fetcher
from falproxy.metrics import METRICS, Metrics
from falproxy.middleware.access import AuthHook
from falproxy.middleware.access import Identity as Identity
from falproxy.middleware.access_log import (
    add_timing_headers,
    identify_requests,
    timing_headers,
)
from falproxy.middleware.accounting import account_calls
from falproxy.middleware.idempotency import add_replayed_header
from falproxy.middleware.observe_jobs import observe_jobs
from falproxy.proxy.client_address import TRUSTED_PROXIES
from falproxy.proxy.forward import DirectWrite
from falproxy.proxy.head_only import is_head_only
from falproxy.proxy.transport import MAX_HEADER_FIELD
from falproxy.server.draining import DRAIN_STATE
from falproxy.server.fast_path.protocol import ROUTE_CACHE, is_supported
from falproxy.server.fast_path.protocol import FastPathRunner as FastPathRunner
from falproxy.server.fast_path.route_cache import RouteCache
from falproxy.server.limits import CONNECTION_LIMITS, ConnectionLimits
from falproxy.settings import Settings
from falproxy.trusted_proxies import TrustedProxies
from falproxy.web.estimate import estimate_handler
from falproxy.web.health import Drain

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 2.5  # beyond the drain, and the half of it that paid jobs have in addition
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
    authenticate: AuthHook | None = None,
    fetcher: Fetcher | None = None,
    metrics: Metrics | None = None,
) -> web.Application:
    """Create the proxy as an application, for `falproxy serve`, `web.run_app` or gunicorn.

    authenticate: returns the name of a request's caller, an `Identity`, or None; used besides the
        access keys and tokens of the settings.
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
    authenticate: AuthHook | None = None,
) -> None:
    """Add the proxy to an application, with all paths below `prefix` (such as `/ai`).

    The application's own routes, middleware and error responses stay as they are. Create it with
    `handler_args={"handler_cancellation": True}`, so that a client that disconnects cancels its
    call to fal.
    """
    require_upstream(settings)
    settings = resolve_key_mode(settings, has_hook=authenticate is not None)
    warn_if_open(settings, authenticate)
    app[METRICS] = Metrics()
    add_proxy(app, settings, prefix=prefix.rstrip("/"), is_standalone=False, auth_hook=authenticate)


def require_upstream(settings: Settings) -> None:
    """Raises: SettingsError, FALPROXY_SANDBOX is set, which an embedding application does not
    start, so that calls would go to fal."""
    if settings.sandbox and settings.upstream.origin is None:
        raise SettingsError(
            "FALPROXY_SANDBOX starts no sandbox inside another application: run `falproxy sandbox` "
            "and set FALPROXY_UPSTREAM_ORIGIN=http://127.0.0.1:8081."
        )


def warn_if_open(settings: Settings, authenticate: AuthHook | None) -> None:
    """Log a warning if everyone who reaches the embedding application can use the proxy."""
    if authenticate is None and not settings.auth.is_locked:
        logger.warning(
            "The proxy is open: everyone who reaches this application can use your key. It is "
            "called by IP address, as localhost, and by the names of FALPROXY_PUBLIC_URL and "
            "FALPROXY_ALLOWED_HOSTS only."
        )


def add_proxy(
    app: web.Application,
    settings: Settings,
    *,
    prefix: str,
    is_standalone: bool,
    auth_hook: AuthHook | None,
    fetcher: Fetcher | None = None,
) -> None:
    """Add the proxy's resources and routes to an application.

    is_standalone: the application consists of the proxy only.
    """
    tracing = prepare_app(app, settings)
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

    auth_middleware = authentication(settings, auth_hook, known_keys, app)
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
            [observe_jobs(metrics.job_times)],
        ),
    )
    watch_health(app, settings, calls, ledger_writer)
    direct_write = create_direct_write(app) if is_standalone else None
    if direct_write is not None and fast_path_enabled(settings):
        enable_fast_path(app, settings, direct_write)

    outermost = [*tracing, *outermost_layers(settings, metrics, direct_write)]
    add_call_routes(app, settings, dependencies, prefix, create_handler, outermost)
    create_estimate_handler = handler_factory(
        settings,
        host_check,
        auth_middleware,
        [policy_middleware(settings)],
        estimate_handler(prices, calls.limits),
    )
    add_estimate(app, settings, prefix, create_estimate_handler, outermost)
    plain_layers = [identify_requests(), handle_errors(default_error), *host_check]
    add_docs(
        app,
        settings,
        dependencies,
        prefix,
        plain_layers,
        is_locked=is_locked,
        # Without a prefix, `/` is the embedding application's.
        has_root=bool(prefix) or is_standalone,
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


def prepare_app(app: web.Application, settings: Settings) -> list[Middleware]:
    """Set what all resources and requests of an application use. Return the middleware that
    traces its calls; none if that is not configured."""
    app[TRUSTED_PROXIES] = TrustedProxies(settings.server.trusted_proxies)
    set_shutdown_deadline(app, settings)
    if not settings.telemetry.is_used:
        return []
    try:
        from falproxy.telemetry import install_telemetry
        from falproxy.web.prometheus import collect_metrics
    except ModuleNotFoundError as error:
        logger.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but nothing is exported: that needs %s (pip "
            "install 'falproxy[otel]'; OTEL_SDK_DISABLED=true turns it off)",
            error.name,
        )
        return []
    return [install_telemetry(app, settings.telemetry, collect_metrics)]


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
    """Return whether repeated requests may skip the middleware."""
    has_pool = settings.upstream.transport == "pool"
    return settings.server.fast_path and has_pool and is_supported()


def enable_fast_path(app: web.Application, settings: Settings, direct_write: DirectWrite) -> None:
    """Add the route cache, which the server of `falproxy serve` uses for repeated requests."""
    route_cache = app[ROUTE_CACHE] = RouteCache(
        app[METRICS], direct_write, settings.server.max_body
    )
    app.cleanup_ctx.append(route_cache.cleanup_context)
