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

from falproxy.background import Background
from falproxy.dialects import Way, answer_errors, refuse_plainly
from falproxy.dialects.transparent import BodyRules
from falproxy.fal.policy import Globs
from falproxy.fal.pricing import Price, Unit
from falproxy.media.fetch import Fetcher
from falproxy.metrics import Metrics
from falproxy.settings import Settings
from falproxy.stores.ledger import Jobs, Lease, Ledger
from falproxy.web import docs, page

if TYPE_CHECKING:
    from falproxy.dialects.queue_client import Patience
    from falproxy.fal.registry import Registry
    from falproxy.middleware.rehost import Rehosting
    from falproxy.web.usage import Usage

T = TypeVar("T")
Ways = Mapping[str, Way]
Prices = Mapping[str, Price]

UNITS: Mapping[str, Unit] = {"image": "images", "megapixel": "megapixels"}
# importlib.resources would find it too, and imports all that reads archives for it.
SHIPPED = Path(__file__).parent.parent / "fal" / "registry" / "models.toml"
LEASE = 30.0  # seconds that a process sees to its jobs without a word


class Later(Generic[T]):
    """Something that is made when it is first asked for: in a thread, since it takes a while, and
    calls go on meanwhile. Who asks for it then waits for the same. When it fails they all hear
    why, and who asks next has it tried again."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._making: asyncio.Future[T] | None = None

    async def get(self) -> T:
        making = self._making
        if making is None or (making.done() and (making.cancelled() or making.exception())):
            making = self._making = asyncio.ensure_future(asyncio.to_thread(self._make))
        return await asyncio.shield(making)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the facades share with the rest of an application. registered: the models, which are
    read when they are first asked for."""

    body: BodyRules
    fetcher: Fetcher
    rehosting: "Rehosting | None"
    background: Background
    registered: "Callable[[], Registry]"
    jobs: Jobs


def kontext_ways(settings: Settings, parts: Parts) -> Ways:
    from falproxy.dialects.blocking import waiting_way
    from falproxy.dialects.kontext import KontextRules, kontext
    from falproxy.dialects.kontext.requests import VARIANTS

    rehosting = parts.rehosting
    rules = KontextRules(
        max_body=settings.max_body,
        background=parts.background,
        keep=rehosting.outputs.keep if rehosting else None,
    )
    patience = patience_of(settings, parts)
    return {f"/{name}": waiting_way(kontext(name, rules), patience) for name in VARIANTS}


def openai_ways(settings: Settings, parts: Parts) -> Ways:
    from falproxy.dialects.openai import ImagesRules, files_of, images_ways
    from falproxy.dialects.openai.result_images import none_own
    from falproxy.stores.files.disk import DiskStorage

    rehosting = parts.rehosting
    rules = ImagesRules(
        body=parts.body,
        models=settings.models,
        endpoints=Globs(settings.allowed_endpoints),
        read_own=files_of(rehosting.outputs.storage, rehosting.here)
        if rehosting is not None and isinstance(rehosting.outputs.storage, DiskStorage)
        else none_own,
    )
    return images_ways(rules, parts.fetcher, patience_of(settings, parts))


def generated_ways(settings: Settings, parts: Parts) -> Ways:
    from falproxy.dialects.generate import GenerateRules, generate_ways

    rules = GenerateRules(
        registered=parts.registered(),
        jobs=parts.jobs,
        lease=Lease(uuid4().hex, LEASE),
        patience=patience_of(settings, parts),
        max_body=settings.max_body,
        endpoints=Globs(settings.allowed_endpoints),
        renew=parts.rehosting.outputs.renewed if parts.rehosting else None,
    )
    return generate_ways(rules)


def patience_of(settings: Settings, parts: Parts) -> "Patience":
    from falproxy.dialects.queue_client import Patience

    return Patience(total=settings.wait, goodbyes=parts.background)


# How each facade is made, by its paths.
FACADES: Mapping[tuple[str, ...], Callable[[Settings, Parts], Ways]] = {
    ("/kontext", "/kontext/max", "/kontext/dev"): kontext_ways,
    (
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/models",
        "/v1/models/{model:(?s:.+)}",
    ): openai_ways,
    (
        "/api/images/generate",
        "/api/templates/{name}",
        "/api/images/jobs/{id}",
        "/api/images/models",
    ): generated_ways,
}


def facade_handlers(
    settings: Settings, parts: Parts, serve: Callable[[Way], Handler]
) -> dict[str, Handler]:
    """What answers at each path of the facades. serve: what a way is answered by."""
    handlers: dict[str, Handler] = {}
    for paths, ways_of in FACADES.items():
        later = Later(partial(ways_of, settings, parts))
        handlers |= {path: serve_later(later, path, serve) for path in paths}
    return handlers


def serve_later(later: Later[Ways], path: str, serve: Callable[[Way], Handler]) -> Handler:
    handler: Handler | None = None

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal handler
        if handler is None:
            handler = serve((await later.get())[path])
        return await handler(request)

    return partial(answer_errors(refuse_plainly), handler=handle)


def price_list(settings: Settings, registered: "Callable[[], Registry]") -> Callable[[], Prices]:
    """What the models cost whose price is known, by endpoint id, for who asks first."""
    if settings.models_file is None:
        return cache(shipped_prices)
    rates = {model.endpoint: model.rate for model in registered().models.values()}
    prices = {endpoint: rate for endpoint, rate in rates.items() if rate is not None}
    return lambda: prices


def shipped_prices() -> Prices:
    """Read without the registry, which imports all that checks a user's file."""
    import tomllib

    text = SHIPPED.read_text("utf-8")
    models = tomllib.loads(text, parse_float=Decimal)["models"].values()
    return {
        model["endpoint"]: Price(Decimal(model["price"]), UNITS[model.get("unit", "image")])
        for model in models
        if "price" in model
    }


def number_handlers(
    settings: Settings, ledger: Ledger, metrics: Metrics, *, is_locked: bool
) -> dict[str, Handler]:
    """What answers at `/api/usage` and `/metrics`."""

    def make() -> "Usage":
        from falproxy.web.usage import Audience, Usage

        holders = frozenset(settings.names_by_secret.values())
        return Usage(ledger, metrics, Audience(is_locked, settings.admins, holders))

    usage = Later(make)

    async def tell(request: web.Request) -> web.StreamResponse:
        return await (await usage.get()).tell(request)

    async def show_metrics(request: web.Request) -> web.StreamResponse:
        return await (await usage.get()).show_metrics(request)

    return {"/api/usage": tell, "/metrics": show_metrics}


def add_documents(
    app: web.Application,
    settings: Settings,
    parts: Parts,
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
            registry=parts.registered(),
            models=settings.models,
            is_locked=is_locked,
            has_files=settings.rehost_to == "disk",
            public_url=settings.public_url,
        )
        return openapi.openapi_handler(api)

    description = Later(make)

    async def describe(request: web.Request) -> web.StreamResponse:
        return await (await description.get())(request)

    shown = docs.Docs()
    show, show_file = (
        partial(answer_errors(refuse_plainly), handler=handler)
        for handler in (describe, shown.show_file)
    )
    app.router.add_get(prefix + docs.DOCUMENT, show)
    app.router.add_get(prefix + docs.PATH, shown.show_page)
    app.router.add_get(prefix + docs.FILES, show_file)


def add_pages(app: web.Application, settings: Settings, prefix: str, *, is_locked: bool) -> None:
    """The page at `/`, and its files."""
    pages = page.Pages(settings, is_locked=is_locked)
    handlers = {
        page.ROOT: pages.show_page,
        page.DASHBOARD: pages.show_dashboard,
        page.ABOUT: pages.tell_about,
        page.FILES: pages.show_file,
    }
    for path, handler in handlers.items():
        answer = partial(answer_errors(refuse_plainly), handler=handler)
        app.router.add_get(prefix + path, answer)
    if prefix:
        app.router.add_get(prefix, page.lead_to_page)
