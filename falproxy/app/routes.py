"""The paths of the facades: whose clients wait for results, and name models by other names.

Most proxies are never asked for one of them, and all that they need takes as long to import as
everything else together: it is imported with the first request for one.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Handler

from falproxy.app.components import serves_files
from falproxy.background import Background
from falproxy.dialects import DialectRoute, default_error, handle_errors
from falproxy.dialects.transparent import BodyLimits
from falproxy.fal.policy import Globs
from falproxy.fal.pricing import Price, Unit
from falproxy.media.fetch import Fetcher
from falproxy.metrics import Metrics
from falproxy.settings import Settings
from falproxy.stores.ledger import Jobs, Lease, Ledger
from falproxy.web import docs, page

if TYPE_CHECKING:
    from falproxy.dialects.queue_client import WaitPolicy
    from falproxy.fal.registry import Registry
    from falproxy.middleware.rehost import RehostConfig
    from falproxy.web.usage import UsageHandlers

T = TypeVar("T")
Routes = Mapping[str, DialectRoute]
Prices = Mapping[str, Price]

UNITS: Mapping[str, Unit] = {"image": "images", "megapixel": "megapixels"}
# importlib.resources would find it too, and imports all that reads archives for it.
BUILTIN_MODELS_FILE = Path(__file__).parent.parent / "fal" / "registry" / "models.toml"
JOB_LEASE_SECONDS = 30.0  # seconds that a process sees to its jobs without a word


class Lazy(Generic[T]):
    """Something that is made when it is first asked for: in a thread, since it takes a while, and
    calls go on meanwhile. Who asks for it then waits for the same. When it fails they all hear
    why, and who asks next has it tried again."""

    def __init__(self, factory: Callable[[], T]) -> None:
        self._factory = factory
        self._future: asyncio.Future[T] | None = None

    async def get(self) -> T:
        making = self._future
        if making is None or (making.done() and (making.cancelled() or making.exception())):
            making = self._future = asyncio.ensure_future(asyncio.to_thread(self._factory))
        return await asyncio.shield(making)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependencies:
    """What the facades share with the rest of an application. registered: the models, which are
    read when they are first asked for."""

    body_limits: BodyLimits
    fetcher: Fetcher
    rehosting: "RehostConfig | None"
    background: Background
    load_registry: "Callable[[], Registry]"
    jobs: Jobs


def kontext_routes(settings: Settings, dependencies: Dependencies) -> Routes:
    from falproxy.dialects.blocking import blocking_route
    from falproxy.dialects.kontext import KontextDeps, kontext_dialect
    from falproxy.dialects.kontext.requests import VARIANTS

    rehosting = dependencies.rehosting
    rules = KontextDeps(
        max_body=settings.max_body,
        background=dependencies.background,
        store_input=rehosting.rehoster.store if rehosting else None,
    )
    patience = wait_policy(settings, dependencies)
    return {f"/{name}": blocking_route(kontext_dialect(name, rules), patience) for name in VARIANTS}


def openai_routes(settings: Settings, dependencies: Dependencies) -> Routes:
    from falproxy.dialects.openai import ImagesDeps, images_routes, local_file_reader
    from falproxy.dialects.openai.result_images import no_local_files

    rehosting = dependencies.rehosting
    local_files = None if rehosting is None else rehosting.rehoster.storage.local_files
    rules = ImagesDeps(
        body_limits=dependencies.body_limits,
        models=settings.models,
        endpoints=Globs(settings.allowed_endpoints),
        read_local=local_file_reader(local_files, rehosting.base_url)
        if rehosting is not None and local_files is not None
        else no_local_files,
    )
    return images_routes(rules, dependencies.fetcher, wait_policy(settings, dependencies))


def generate_api_routes(settings: Settings, dependencies: Dependencies) -> Routes:
    from falproxy.dialects.generate import GenerateDeps, generate_routes

    rules = GenerateDeps(
        registry=dependencies.load_registry(),
        jobs=dependencies.jobs,
        lease=Lease(uuid4().hex, JOB_LEASE_SECONDS),
        wait_policy=wait_policy(settings, dependencies),
        max_body=settings.max_body,
        endpoints=Globs(settings.allowed_endpoints),
        fresh_urls=dependencies.rehosting.rehoster.fresh_urls if dependencies.rehosting else None,
    )
    return generate_routes(rules)


def wait_policy(settings: Settings, dependencies: Dependencies) -> "WaitPolicy":
    from falproxy.dialects.queue_client import WaitPolicy

    return WaitPolicy(total=settings.wait, background=dependencies.background)


# How each facade is made, by its paths.
DIALECT_ROUTES: Mapping[tuple[str, ...], Callable[[Settings, Dependencies], Routes]] = {
    ("/kontext", "/kontext/max", "/kontext/dev"): kontext_routes,
    (
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/models",
        "/v1/models/{model:(?s:.+)}",
    ): openai_routes,
    (
        "/api/images/generate",
        "/api/templates/{name}",
        "/api/images/jobs/{id}",
        "/api/images/models",
    ): generate_api_routes,
}


def dialect_handlers(
    settings: Settings, dependencies: Dependencies, route_handler: Callable[[DialectRoute], Handler]
) -> dict[str, Handler]:
    """What answers at each path of the facades. serve: what a way is answered by."""
    handlers: dict[str, Handler] = {}
    for paths, ways_of in DIALECT_ROUTES.items():
        later = Lazy(partial(ways_of, settings, dependencies))
        handlers |= {path: lazy_handler(later, path, route_handler) for path in paths}
    return handlers


def lazy_handler(
    lazy_routes: Lazy[Routes], path: str, route_handler: Callable[[DialectRoute], Handler]
) -> Handler:
    handler: Handler | None = None

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal handler
        if handler is None:
            handler = route_handler((await lazy_routes.get())[path])
        return await handler(request)

    return partial(handle_errors(default_error), handler=handle)


def price_list(settings: Settings, load_registry: "Callable[[], Registry]") -> Callable[[], Prices]:
    """What the models cost whose price is known, by endpoint id, for who asks first."""
    if settings.models_file is None:
        return cache(builtin_prices)
    rates = {model.endpoint: model.rate for model in load_registry().models.values()}
    prices = {endpoint: rate for endpoint, rate in rates.items() if rate is not None}
    return lambda: prices


def builtin_prices() -> Prices:
    """Read without the registry, which imports all that checks a user's file."""
    import tomllib

    text = BUILTIN_MODELS_FILE.read_text("utf-8")
    models = tomllib.loads(text, parse_float=Decimal)["models"].values()
    return {
        model["endpoint"]: Price(Decimal(model["price"]), UNITS[model.get("unit", "image")])
        for model in models
        if "price" in model
    }


def usage_handlers(
    settings: Settings, ledger: Ledger, metrics: Metrics, *, is_locked: bool
) -> dict[str, Handler]:
    """What answers at `/api/usage` and `/metrics`."""

    def make() -> "UsageHandlers":
        from falproxy.web.usage import UsageHandlers, Visibility

        holders = frozenset(settings.names_by_secret.values())
        return UsageHandlers(ledger, metrics, Visibility(is_locked, settings.admins, holders))

    usage = Lazy(make)

    async def tell(request: web.Request) -> web.StreamResponse:
        return await (await usage.get()).get_usage(request)

    async def show_metrics(request: web.Request) -> web.StreamResponse:
        return await (await usage.get()).get_metrics(request)

    return {"/api/usage": tell, "/metrics": show_metrics}


def add_docs(
    app: web.Application,
    settings: Settings,
    dependencies: Dependencies,
    prefix: str,
    *,
    is_locked: bool,
    has_root: bool,
) -> None:
    """`/openapi.json`, `/docs`, which shows it, and the pages. has_root: whether `/` is ours."""
    if has_root:
        add_pages(app, settings, prefix, is_locked=is_locked)

    def make() -> Handler:
        from falproxy.web import openapi

        api = openapi.ApiDescription(
            registry=dependencies.load_registry(),
            models=settings.models,
            is_locked=is_locked,
            has_files=serves_files(settings),
            public_url=settings.public_url,
        )
        return openapi.openapi_handler(api)

    description = Lazy(make)

    async def describe(request: web.Request) -> web.StreamResponse:
        return await (await description.get())(request)

    shown = docs.Docs()
    show, show_file = (
        partial(handle_errors(default_error), handler=handler)
        for handler in (describe, shown.show_file)
    )
    app.router.add_get(prefix + docs.OPENAPI_PATH, show)
    app.router.add_get(prefix + docs.PATH, shown.show_page)
    app.router.add_get(prefix + docs.FILES, show_file)


def add_pages(app: web.Application, settings: Settings, prefix: str, *, is_locked: bool) -> None:
    """The page at `/`, and its files."""
    pages = page.Pages(settings, is_locked=is_locked)
    handlers = {
        page.ROOT: pages.show_page,
        page.DASHBOARD: pages.show_dashboard,
        page.ABOUT: pages.show_about,
        page.FILES: pages.show_file,
    }
    for path, handler in handlers.items():
        answer = partial(handle_errors(default_error), handler=handler)
        app.router.add_get(prefix + path, answer)
    if prefix:
        app.router.add_get(prefix, page.redirect_to_page)
