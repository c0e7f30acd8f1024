"""create_app and setup: the table of dialects, and the cleanup contexts."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Middleware

from falproxy.app.components import (
    create_fetcher,
    create_registry,
    create_storage,
    create_store,
    rehosted_prefixes,
)
from falproxy.app.pipeline import (
    authentication,
    authorization,
    call_pipeline,
    compose,
    route_handler,
)
from falproxy.app.routes import Dependencies, add_docs, dialect_handlers, price_list, usage_handlers
from falproxy.background import Background, background_context
from falproxy.dialects import default_error, dialect_route, handle_errors
from falproxy.dialects.base_url import BASE_URL_HOSTS, base_url_dialect
from falproxy.dialects.public_url import files_base_url, public_origin
from falproxy.dialects.transparent import BodyLimits, transparent_dialect
from falproxy.fal.keys import KeyPool
from falproxy.media.fetch import Fetcher, fetcher_context
from falproxy.metrics import METRICS, Metrics
from falproxy.middleware.access import Authenticator
from falproxy.middleware.access_log import access_log, add_timing_headers, timing_headers
from falproxy.middleware.accounting import account_calls
from falproxy.middleware.cors import cors
from falproxy.proxy.direct_write import DirectWrite
from falproxy.proxy.head_only import is_head_only
from falproxy.proxy.transport import MAX_HEADER_FIELD
from falproxy.proxy.upstream import connect_upstream
from falproxy.server.fast_path.protocol import ROUTE_CACHE, is_supported
from falproxy.server.fast_path.route_cache import RouteCache
from falproxy.settings import Settings
from falproxy.stores.cache.result_cache import ResultCache, result_cache_context
from falproxy.stores.ledger import Ledger
from falproxy.stores.ledger.writer import LedgerWriter, choose_ledger, ledger_context
from falproxy.web.health import Drain

if TYPE_CHECKING:
    from falproxy.middleware.rehost import RehostConfig

logger = logging.getLogger(__name__)

LEDGER_SHUTDOWN_TIMEOUT = 5.0  # seconds that the ledger has at the end
READ_AHEAD = 64 * 2**10  # bytes of a body; twice as many, and the client has to wait

# What the server under the application is told.
HANDLER_ARGS = {
    "handler_cancellation": True,  # a client that leaves takes its call to fal with it
    "auto_decompress": False,  # a body goes up as it came
    "max_field_size": MAX_HEADER_FIELD,
    "max_line_size": MAX_HEADER_FIELD,
    "read_bufsize": READ_AHEAD,
}


def create_app(
    settings: Settings,
    *,
    authenticate: Authenticator | None = None,
    fetcher: Fetcher | None = None,
) -> web.Application:
    """The proxy as an application of its own, for `falproxy serve`, `web.run_app` or gunicorn.

    authenticate: names the caller of a request, None for nobody known; beside the settings' keys.
    fetcher: reads the addresses that users name, by other rules than ours.
    """
    app = web.Application(handler_args=HANDLER_ARGS, middlewares=[handle_errors(default_error)])
    add_proxy(app, settings, prefix="", is_standalone=True, auth_hook=authenticate, fetcher=fetcher)
    return app


def setup(
    app: web.Application,
    settings: Settings,
    *,
    prefix: str = "",
    authenticate: Authenticator | None = None,
) -> None:
    """Puts the proxy into an application, all its paths below `prefix` (like `/ai`).

    The application's own routes, middleware and errors stay as they are. Make it with
    `handler_args={"handler_cancellation": True}`, so that a client that leaves takes its call to
    fal with it.
    """
    if authenticate is None and not settings.is_locked:
        logger.warning("The proxy is open: whoever reaches this application spends your balance")
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
    rules = BodyLimits(settings.max_body, is_standalone)
    ways = {"/api/fal/proxy": dialect_route(transparent_dialect(rules))}
    for name in BASE_URL_HOSTS:
        dialect = base_url_dialect(name, rules, settings.public_url)
        ways[f"/api/fal/{name}/{{path:.+}}"] = dialect_route(dialect)

    book = open_ledger_writer(app, settings)
    metrics = app[METRICS] = Metrics()
    registered = cache(partial(create_registry, settings))
    ring = KeyPool(settings.fal_keys, time.monotonic)
    app.cleanup_ctx.append(
        connect_upstream(
            ring.next_key(),
            origin=settings.upstream_origin,
            timeouts=(settings.connect_timeout, settings.upstream_timeout),
            fast=settings.fast_path,
        )
    )
    fetcher = fetcher or create_fetcher(settings)
    app.cleanup_ctx.append(fetcher_context(fetcher))
    rehosting = open_rehosting(app, settings, fetcher, prefix)
    shelf = open_result_cache(app, settings)
    background = Background()
    app.cleanup_ctx.append(background_context(background, settings.drain / 2))
    parts = Dependencies(
        body_limits=rules,
        fetcher=fetcher,
        rehosting=rehosting,
        background=background,
        load_registry=registered,
        jobs=book.ledger,
    )
    seen = [cors(settings.allowed_origins)] if settings.allowed_origins else []
    known = authentication(settings, auth_hook)
    allowed = authorization(app, settings, ring, shelf, is_locked=bool(known))
    books = [account_calls(book, price_list(settings, registered), metrics)]
    around = call_pipeline(settings, ring, shelf, fetcher, rehosting, books)
    answer = route_handler(settings, known, allowed, around)
    short_cut = create_direct_write(app) if is_standalone else None
    enable_fast_path(app, settings, short_cut if auth_hook is None else None, shelf)
    seen.append(access_log(metrics, short_cut))
    handlers = {path: answer(way) for path, way in ways.items()}
    for path, handler in (handlers | dialect_handlers(settings, parts, answer)).items():
        app.router.add_route("*", prefix + path, compose(seen, handler))

    add_docs(
        app,
        settings,
        parts,
        prefix,
        is_locked=bool(known),
        has_root=bool(prefix) or is_standalone,  # somebody's own application may have its own /
    )
    add_usage(app, settings, prefix, known, book.ledger)
    add_health(app, prefix, short_cut)


def add_usage(
    app: web.Application,
    settings: Settings,
    prefix: str,
    auth_middleware: Sequence[Middleware],
    ledger: Ledger,
) -> None:
    """`/api/usage` and `/metrics`, for those who may call as well."""
    handlers = usage_handlers(settings, ledger, app[METRICS], is_locked=bool(auth_middleware))
    for path, handler in handlers.items():
        answer = compose([handle_errors(default_error), *auth_middleware], handler)
        app.router.add_get(prefix + path, answer)


def add_health(app: web.Application, prefix: str, direct_write: DirectWrite | None) -> None:
    """`/health` and what is below it. From the beginning of the end, answers say so."""
    drain = Drain(direct_write)
    app.router.add_get(f"{prefix}/health/live", drain.live)
    app.router.add_get(f"{prefix}/health/ready", drain.ready)
    app.router.add_get(f"{prefix}/health", drain.ready)
    app.on_shutdown.append(drain.start)
    app.on_response_prepare.extend((add_timing_headers, drain.add_connection_close))


def create_direct_write(app: web.Application) -> DirectWrite:
    """The proxy's own application has nobody else in it, who would have a say about answers,
    unless somebody put it there."""
    short_cut = DirectWrite(timing_headers, enabled=False)

    async def look(app: web.Application) -> None:
        signals = app.on_response_prepare
        short_cut.enabled = all(is_head_only(middleware) for middleware in app.middlewares) and all(
            signal.__module__.startswith("falproxy.") for signal in signals
        )

    app.on_startup.append(look)
    return short_cut


def fast_path_enabled(settings: Settings) -> bool:
    """Whether what may be called hangs on a request's bytes alone. A token's time runs out."""
    has_tokens = settings.jwt_secret is not None or settings.jwks_url is not None
    return settings.fast_path and not has_tokens and is_supported()


def enable_fast_path(
    app: web.Application,
    settings: Settings,
    direct_write: DirectWrite | None,
    result_cache: ResultCache | None,
) -> None:
    """The way of requests that came before, where `falproxy serve` has its doors. short_cut: None
    where somebody else has a say about calls."""
    if direct_write is None or not fast_path_enabled(settings):
        return

    def is_claimed(request_id: str) -> bool:
        return (
            result_cache is not None and result_cache.virtual_requests.peek(request_id) is not None
        )

    passes = app[ROUTE_CACHE] = RouteCache(
        app[METRICS], direct_write, settings.max_body, is_claimed
    )
    app.cleanup_ctx.append(passes.cleanup_context)


def open_ledger_writer(app: web.Application, settings: Settings) -> LedgerWriter:
    """Where calls are written down; it is closed after all that may have something to write."""
    book = LedgerWriter(choose_ledger(settings.database_url, settings.data_dir))
    app.cleanup_ctx.append(ledger_context(book, LEDGER_SHUTDOWN_TIMEOUT))
    return book


def open_rehosting(
    app: web.Application, settings: Settings, fetcher: Fetcher, prefix: str
) -> "RehostConfig | None":
    """Where outputs are kept. None where they are left with fal. It is closed after all that may
    still have something to keep."""
    if settings.rehost_to == "off":
        return None
    from falproxy.middleware.rehost import RehostConfig
    from falproxy.stores.files.rehosting import Rehoster, rehoster_context
    from falproxy.stores.files.serve import PATH, file_handler

    here: Callable[[web.Request], str] = public_origin
    storage = create_storage(settings)
    if storage.local_files is not None:
        handler = compose([handle_errors(default_error)], file_handler(storage.local_files))
        here = files_base_url(app.router.add_get(prefix + PATH, handler), settings.public_url)
    outputs = Rehoster(storage, fetcher, rehosted_prefixes=rehosted_prefixes(settings))
    app.cleanup_ctx.append(rehoster_context(outputs, settings.drain / 2))

    async def hurry_up(app: web.Application) -> None:
        outputs.start_draining(settings.drain / 4)

    app.on_shutdown.append(hurry_up)
    return RehostConfig(outputs, here, is_strict=settings.rehost_on_error == "error")


def open_result_cache(app: web.Application, settings: Settings) -> ResultCache | None:
    """What the proxies of several machines share, and the results of one. None where nothing is
    kept. It is closed before the way to fal, which a call that ends last still needs."""
    if not settings.cache and settings.redis_url is None:
        return None
    shelf = ResultCache(create_store(settings))
    app.cleanup_ctx.append(result_cache_context(shelf, settings.drain / 2))
    return shelf
