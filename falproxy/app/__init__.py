"""create_app and setup: the table of dialects, and the cleanup contexts."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Middleware

from falproxy.app.components import (
    make_fetcher,
    make_registry,
    make_storage,
    make_store,
    own_prefixes,
)
from falproxy.app.pipeline import (
    pass_through,
    ways_in,
    what_answers,
    what_goes_around,
    what_may_be_called,
)
from falproxy.app.routes import Parts, add_documents, facade_handlers, number_handlers, price_list
from falproxy.background import Background, keep_working
from falproxy.dialects import answer_errors, refuse_plainly, way_of
from falproxy.dialects.base_url import MOUNTS, mount
from falproxy.dialects.public_url import seen_above, seen_origin
from falproxy.dialects.transparent import BodyRules, transparent
from falproxy.fal.keys import KeyRing
from falproxy.media.fetch import Fetcher, open_fetcher
from falproxy.metrics import METRICS, Metrics
from falproxy.middleware.access import Authenticate
from falproxy.middleware.access_log import observe, sign_answer, signature
from falproxy.middleware.accounting import keep_books
from falproxy.middleware.cors import share
from falproxy.proxy.direct_write import ShortCut
from falproxy.proxy.head_only import is_head_only
from falproxy.proxy.transport import MAX_HEADER_FIELD
from falproxy.proxy.upstream import connect_upstream
from falproxy.server.fast_path.protocol import PASSES, is_usable
from falproxy.server.fast_path.route_cache import Passes
from falproxy.settings import Settings
from falproxy.stores.cache.result_cache import Shelf, keep_results
from falproxy.stores.ledger import Ledger
from falproxy.stores.ledger.writer import Book, choose_ledger, keep_ledger
from falproxy.web.health import Drain

if TYPE_CHECKING:
    from falproxy.middleware.rehost import Rehosting

logger = logging.getLogger(__name__)

LAST_WORDS = 5.0  # seconds that the ledger has at the end
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
    authenticate: Authenticate | None = None,
    fetcher: Fetcher | None = None,
) -> web.Application:
    """The proxy as an application of its own, for `falproxy serve`, `web.run_app` or gunicorn.

    authenticate: names the caller of a request, None for nobody known; beside the settings' keys.
    fetcher: reads the addresses that users name, by other rules than ours.
    """
    app = web.Application(handler_args=HANDLER_ARGS, middlewares=[answer_errors(refuse_plainly)])
    add_proxy(app, settings, prefix="", are_encoded=True, hook=authenticate, fetcher=fetcher)
    return app


def setup(
    app: web.Application,
    settings: Settings,
    *,
    prefix: str = "",
    authenticate: Authenticate | None = None,
) -> None:
    """Puts the proxy into an application, all its paths below `prefix` (like `/ai`).

    The application's own routes, middleware and errors stay as they are. Make it with
    `handler_args={"handler_cancellation": True}`, so that a client that leaves takes its call to
    fal with it.
    """
    if authenticate is None and not settings.is_locked:
        logger.warning("The proxy is open: whoever reaches this application spends your balance")
    add_proxy(app, settings, prefix=prefix.rstrip("/"), are_encoded=False, hook=authenticate)


def add_proxy(
    app: web.Application,
    settings: Settings,
    *,
    prefix: str,
    are_encoded: bool,
    hook: Authenticate | None,
    fetcher: Fetcher | None = None,
) -> None:
    rules = BodyRules(settings.max_body, are_encoded)
    ways = {"/api/fal/proxy": way_of(transparent(rules))}
    for name in MOUNTS:
        dialect = mount(name, rules, settings.public_url)
        ways[f"/api/fal/{name}/{{path:.+}}"] = way_of(dialect)

    book = open_book(app, settings)
    metrics = app[METRICS] = Metrics()
    registered = cache(partial(make_registry, settings))
    ring = KeyRing(settings.fal_keys, time.monotonic)
    app.cleanup_ctx.append(
        connect_upstream(
            ring.next(),
            origin=settings.upstream_origin,
            timeouts=(settings.connect_timeout, settings.upstream_timeout),
            fast=settings.fast_path,
        )
    )
    fetcher = fetcher or make_fetcher(settings)
    app.cleanup_ctx.append(open_fetcher(fetcher))
    rehosting = open_storage(app, settings, fetcher, prefix)
    shelf = open_shelf(app, settings)
    background = Background()
    app.cleanup_ctx.append(keep_working(background, settings.drain / 2))
    parts = Parts(
        body=rules,
        fetcher=fetcher,
        rehosting=rehosting,
        background=background,
        registered=registered,
        jobs=book.ledger,
    )
    seen = [share(settings.allowed_origins)] if settings.allowed_origins else []
    known = ways_in(settings, hook)
    allowed = what_may_be_called(app, settings, ring, shelf, is_locked=bool(known))
    books = [keep_books(book, price_list(settings, registered), metrics)]
    around = what_goes_around(settings, ring, shelf, fetcher, rehosting, books)
    answer = what_answers(settings, known, allowed, around)
    short_cut = open_short_cut(app) if are_encoded else None
    open_lane(app, settings, short_cut if hook is None else None, shelf)
    seen.append(observe(metrics, short_cut))
    handlers = {path: answer(way) for path, way in ways.items()}
    for path, handler in (handlers | facade_handlers(settings, parts, answer)).items():
        app.router.add_route("*", prefix + path, pass_through(seen, handler))

    add_documents(
        app,
        settings,
        parts,
        prefix,
        is_locked=bool(known),
        has_root=bool(prefix) or are_encoded,  # somebody's own application may have its own /
    )
    add_numbers(app, settings, prefix, known, book.ledger)
    add_health(app, prefix, short_cut)


def add_numbers(
    app: web.Application,
    settings: Settings,
    prefix: str,
    known: Sequence[Middleware],
    ledger: Ledger,
) -> None:
    """`/api/usage` and `/metrics`, for those who may call as well."""
    handlers = number_handlers(settings, ledger, app[METRICS], is_locked=bool(known))
    for path, handler in handlers.items():
        answer = pass_through([answer_errors(refuse_plainly), *known], handler)
        app.router.add_get(prefix + path, answer)


def add_health(app: web.Application, prefix: str, short_cut: ShortCut | None) -> None:
    """`/health` and what is below it. From the beginning of the end, answers say so."""
    drain = Drain(short_cut)
    app.router.add_get(f"{prefix}/health/live", drain.live)
    app.router.add_get(f"{prefix}/health/ready", drain.ready)
    app.router.add_get(f"{prefix}/health", drain.ready)
    app.on_shutdown.append(drain.begin)
    app.on_response_prepare.extend((sign_answer, drain.sign))


def open_short_cut(app: web.Application) -> ShortCut:
    """The proxy's own application has nobody else in it, who would have a say about answers,
    unless somebody put it there."""
    short_cut = ShortCut(signature, enabled=False)

    async def look(app: web.Application) -> None:
        signals = app.on_response_prepare
        short_cut.enabled = all(is_head_only(middleware) for middleware in app.middlewares) and all(
            signal.__module__.startswith("falproxy.") for signal in signals
        )

    app.on_startup.append(look)
    return short_cut


def has_lane(settings: Settings) -> bool:
    """Whether what may be called hangs on a request's bytes alone. A token's time runs out."""
    has_tokens = settings.jwt_secret is not None or settings.jwks_url is not None
    return settings.fast_path and not has_tokens and is_usable()


def open_lane(
    app: web.Application, settings: Settings, short_cut: ShortCut | None, shelf: Shelf | None
) -> None:
    """The way of requests that came before, where `falproxy serve` has its doors. short_cut: None
    where somebody else has a say about calls."""
    if short_cut is None or not has_lane(settings):
        return

    def is_claimed(request_id: str) -> bool:
        return shelf is not None and shelf.claims.peek(request_id) is not None

    passes = app[PASSES] = Passes(app[METRICS], short_cut, settings.max_body, is_claimed)
    app.cleanup_ctx.append(passes.context)


def open_book(app: web.Application, settings: Settings) -> Book:
    """Where calls are written down; it is closed after all that may have something to write."""
    book = Book(choose_ledger(settings.database_url, settings.data_dir))
    app.cleanup_ctx.append(keep_ledger(book, LAST_WORDS))
    return book


def open_storage(
    app: web.Application, settings: Settings, fetcher: Fetcher, prefix: str
) -> "Rehosting | None":
    """Where outputs are kept. None where they are left with fal. It is closed after all that may
    still have something to keep."""
    if settings.rehost_to == "off":
        return None
    from falproxy.middleware.rehost import Rehosting
    from falproxy.stores.files.disk import DiskStorage
    from falproxy.stores.files.rehosting import Outputs, keep_outputs
    from falproxy.stores.files.serve import PATH, serve

    here: Callable[[web.Request], str] = seen_origin
    storage = make_storage(settings)
    if isinstance(storage, DiskStorage):
        handler = pass_through([answer_errors(refuse_plainly)], serve(storage))
        here = seen_above(app.router.add_get(prefix + PATH, handler), settings.public_url)
    outputs = Outputs(storage, fetcher, own=own_prefixes(settings))
    app.cleanup_ctx.append(keep_outputs(outputs, settings.drain / 2))

    async def hurry_up(app: web.Application) -> None:
        outputs.hurry_up(settings.drain / 4)

    app.on_shutdown.append(hurry_up)
    return Rehosting(outputs, here, is_strict=settings.rehost_on_error == "error")


def open_shelf(app: web.Application, settings: Settings) -> Shelf | None:
    """What the proxies of several machines share, and the results of one. None where nothing is
    kept. It is closed before the way to fal, which a call that ends last still needs."""
    if not settings.cache and settings.redis_url is None:
        return None
    shelf = Shelf(make_store(settings))
    app.cleanup_ctx.append(keep_results(shelf, settings.drain / 2))
    return shelf
