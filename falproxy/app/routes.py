"""Paths of the proxy and their handlers.

The Kontext, OpenAI and generate APIs, the usage reports and the API description are imported with
the first request for one of them: together they take as long to import as all the rest, and many
proxies never serve them.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar
from uuid import uuid4

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.app.components import serves_files
from falproxy.app.pipeline import compose, log_pipeline
from falproxy.background import Background
from falproxy.dialects import (
    DialectRoute,
    ErrorResponder,
    default_error,
    dialect_route,
    handle_errors,
)
from falproxy.dialects.base_url import BASE_URL_HOSTS, base_url_dialect
from falproxy.dialects.transparent import BodyLimits, transparent_dialect
from falproxy.dialects.transparent import refuse as refuse_transparent
from falproxy.fal.endpoint import DEFAULT_MODELS, NamedEndpoint
from falproxy.fal.policy import Globs
from falproxy.limit_settings import format_budget
from falproxy.media.fetch import Fetcher
from falproxy.metrics import METRICS
from falproxy.middleware.access_log import identify_requests
from falproxy.proxy.prices import PriceBook
from falproxy.settings import Settings
from falproxy.stores.keys.known_keys import KNOWN_KEYS, KnownKeys
from falproxy.stores.ledger import Jobs, Lease, Ledger
from falproxy.web import docs, estimate, page
from falproxy.web.estimate import estimate_route
from falproxy.web.health import Drain

if TYPE_CHECKING:
    from falproxy.dialects.openai.media_files import MediaFiles
    from falproxy.dialects.openai.media_models import MediaModels
    from falproxy.dialects.queue_client import WaitPolicy
    from falproxy.fal.registry import Kind, Registry
    from falproxy.middleware.rehost import RehostConfig
    from falproxy.web.calls import CallHandlers
    from falproxy.web.keys import KeyHandlers
    from falproxy.web.usage import UsageHandlers, Visibility

T = TypeVar("T")
Routes = Mapping[str, DialectRoute]
HandlerFactory = Callable[[DialectRoute], Handler]

# Paths of the APIs whose errors have a shape of their own.
OPENAI_PATHS, FAL_PATHS = "/v1/", "/api/fal/"
JOB_LEASE_SECONDS = 30.0  # seconds after which another process may take over a job


class Lazy(Generic[T]):
    """A value that is created in a thread on first use.

    Concurrent callers share one creation and its exception; after a failure the next caller tries
    again.
    """

    def __init__(self, factory: Callable[[], T]) -> None:
        self._factory = factory
        self._future: asyncio.Future[T] | None = None

    async def get(self) -> T:
        future = self._future
        if future is None or (future.done() and (future.cancelled() or future.exception())):
            future = self._future = asyncio.ensure_future(asyncio.to_thread(self._factory))
        return await asyncio.shield(future)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependencies:
    """Resources of an application that the dialects use.

    load_registry: returns the models, read on first use.
    """

    body_limits: BodyLimits
    fetcher: Fetcher
    rehosting: "RehostConfig | None"
    background: Background
    load_registry: "Callable[[], Registry]"
    jobs: Jobs
    prices: PriceBook


def add_call_routes(
    app: web.Application,
    settings: Settings,
    dependencies: Dependencies,
    prefix: str,
    create_handler: HandlerFactory,
    outermost: Sequence[Middleware],
) -> None:
    """Add the paths of all dialects.

    create_handler: returns the handler of a dialect's route.
    outermost: the middleware around each of these handlers.
    """
    routes = proxy_routes(settings, dependencies.body_limits)
    handlers = {path: create_handler(route) for path, route in routes.items()}
    handlers |= dialect_handlers(settings, dependencies, create_handler)
    for path, handler in handlers.items():
        handler = compose(outermost, handler)
        log_pipeline(prefix + path, handler)
        app.router.add_route("*", prefix + path, handler)


def error_responder(path: str) -> ErrorResponder:
    """Return the function that renders errors in the shape of a path's API."""
    if path.startswith(OPENAI_PATHS):
        from falproxy.dialects.openai.errors import refuse

        return refuse
    return refuse_transparent if path.startswith(FAL_PATHS) else default_error


def proxy_routes(settings: Settings, body_limits: BodyLimits) -> Routes:
    """Return the routes that forward calls unchanged."""
    listed = frozenset(Globs(settings.auth.allowed_targets).globs)
    routes = {"/api/fal/proxy": dialect_route(transparent_dialect(body_limits, listed))}
    for name in BASE_URL_HOSTS:
        dialect = base_url_dialect(name, body_limits, settings.server.public_url, listed)
        routes[f"/api/fal/{name}/{{path:.+}}"] = dialect_route(dialect)
    return routes


def kontext_routes(settings: Settings, dependencies: Dependencies) -> Routes:
    from falproxy.dialects.blocking import blocking_route
    from falproxy.dialects.kontext import KontextDeps, kontext_dialect
    from falproxy.dialects.kontext.requests import VARIANTS

    rehosting = dependencies.rehosting
    deps = KontextDeps(
        max_body=settings.server.max_body,
        background=dependencies.background,
        # With FALPROXY_REHOST_INPUTS, the middleware of all calls stores its inputs.
        store_input=rehosting.rehoster.store if rehosting and not rehosting.inputs else None,
    )
    wait = wait_policy(settings, dependencies)
    return {f"/{name}": blocking_route(kontext_dialect(name, deps), wait) for name in VARIANTS}


def openai_routes(settings: Settings, dependencies: Dependencies) -> Routes:
    from falproxy.dialects.openai import ImagesDeps, images_routes, local_file_reader
    from falproxy.dialects.openai.result_images import no_local_files

    rehosting = dependencies.rehosting
    local_files = None if rehosting is None else rehosting.rehoster.storage.local_files
    deps = ImagesDeps(
        body_limits=dependencies.body_limits,
        models=settings.dialects.models,
        media_models=listed_media_models(settings, dependencies),
        endpoints=Globs(settings.auth.allowed_endpoints),
        read_local=local_file_reader(local_files, rehosting.base_url)
        if rehosting is not None and local_files is not None
        else no_local_files,
        schemas=dependencies.prices.schemas,
    )
    return images_routes(deps, dependencies.fetcher, wait_policy(settings, dependencies))


def video_api_routes(settings: Settings, dependencies: Dependencies) -> Routes:
    from falproxy.dialects.openai.bodies import FormLimits
    from falproxy.dialects.videos import VideoDeps, video_routes
    from falproxy.dialects.videos.requests import VideoReader

    deps = VideoDeps(
        jobs=dependencies.jobs,
        lease=Lease(uuid4().hex, JOB_LEASE_SECONDS, "videos"),
        wait_policy=wait_policy(settings, dependencies),
        reader=VideoReader(
            media_models("video", settings, dependencies),
            dependencies.body_limits,
            FormLimits(dependencies.body_limits.max_body),
        ),
        files=media_files(dependencies),
        fresh_urls=dependencies.rehosting.rehoster.fresh_urls if dependencies.rehosting else None,
        prices=dependencies.prices,
    )
    return video_routes(deps)


def speech_api_routes(settings: Settings, dependencies: Dependencies) -> Routes:
    from falproxy.dialects.openai.bodies import FormLimits
    from falproxy.dialects.speech import SpeechDeps, speech_routes

    deps = SpeechDeps(
        models=media_models("audio", settings, dependencies),
        files=media_files(dependencies),
        wait_policy=wait_policy(settings, dependencies),
        json_limits=dependencies.body_limits,
        form_limits=FormLimits(dependencies.body_limits.max_body),
    )
    return speech_routes(deps)


def media_models(kind: "Kind", settings: Settings, dependencies: Dependencies) -> "MediaModels":
    from falproxy.dialects.openai import is_allowed_endpoint
    from falproxy.dialects.openai.media_models import MediaModels

    is_allowed = partial(is_allowed_endpoint, Globs(settings.auth.allowed_endpoints))
    registry, schemas = dependencies.load_registry(), dependencies.prices.schemas
    return MediaModels(kind, settings.dialects.models, registry, schemas, is_allowed)


def listed_media_models(settings: Settings, dependencies: Dependencies) -> Sequence[NamedEndpoint]:
    """Return the registry's models of videos and sound, unless the operator lists other models."""
    from falproxy.dialects.openai import is_allowed_endpoint
    from falproxy.dialects.openai.media_models import registry_names

    if settings.dialects.models != DEFAULT_MODELS:
        return ()
    is_allowed = partial(is_allowed_endpoint, Globs(settings.auth.allowed_endpoints))
    return registry_names(dependencies.load_registry(), ("video", "audio"), is_allowed)


def media_files(dependencies: Dependencies) -> "MediaFiles":
    from falproxy.dialects.openai.media_files import MediaFiles

    rehosting = dependencies.rehosting
    local_files = None if rehosting is None else rehosting.rehoster.storage.local_files
    return MediaFiles(dependencies.fetcher, local_files)


def generate_api_routes(settings: Settings, dependencies: Dependencies) -> Routes:
    from falproxy.dialects.generate import GenerateDeps, generate_routes

    deps = GenerateDeps(
        registry=dependencies.load_registry(),
        jobs=dependencies.jobs,
        lease=Lease(uuid4().hex, JOB_LEASE_SECONDS),
        wait_policy=wait_policy(settings, dependencies),
        max_body=settings.server.max_body,
        endpoints=Globs(settings.auth.allowed_endpoints),
        fresh_urls=dependencies.rehosting.rehoster.fresh_urls if dependencies.rehosting else None,
        prices=dependencies.prices,
    )
    return generate_routes(deps)


def wait_policy(settings: Settings, dependencies: Dependencies) -> "WaitPolicy":
    from falproxy.dialects.queue_client import WaitPolicy

    return WaitPolicy(total=settings.dialects.wait, background=dependencies.background)


# Paths of the dialects that are imported on first use → the function that creates their routes.
DIALECT_ROUTES: Mapping[tuple[str, ...], Callable[[Settings, Dependencies], Routes]] = {
    ("/kontext", "/kontext/max", "/kontext/dev"): kontext_routes,
    (
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/models",
        "/v1/models/{model:(?s:.+)}",
    ): openai_routes,
    ("/v1/videos", "/v1/videos/{id}", "/v1/videos/{id}/content"): video_api_routes,
    ("/v1/audio/speech",): speech_api_routes,
    (
        "/api/images/generate",
        "/api/images/jobs",
        "/api/images/jobs/{id}",
        "/api/images/models",
        "/api/templates",
        "/api/templates/{name}",
    ): generate_api_routes,
}


def dialect_handlers(
    settings: Settings, dependencies: Dependencies, create_handler: HandlerFactory
) -> dict[str, Handler]:
    """Return the handlers of DIALECT_ROUTES by path; each dialect is imported on first use."""
    handlers: dict[str, Handler] = {}
    for paths, create_routes in DIALECT_ROUTES.items():
        lazy_routes = Lazy(partial(create_routes, settings, dependencies))
        handlers |= {path: lazy_handler(lazy_routes, path, create_handler) for path in paths}
    return handlers


def lazy_handler(lazy_routes: Lazy[Routes], path: str, create_handler: HandlerFactory) -> Handler:
    """Return a handler that creates the path's pipeline with the first request."""
    handler: Handler | None = None

    async def load_and_handle(request: web.Request) -> web.StreamResponse:
        nonlocal handler
        if handler is None:
            handler = create_handler((await lazy_routes.get())[path])
            log_pipeline(path, handler)
        return await handler(request)

    return partial(handle_errors(default_error), handler=load_and_handle)


def add_estimate(
    app: web.Application,
    settings: Settings,
    prefix: str,
    create_handler: HandlerFactory,
    outermost: Sequence[Middleware],
) -> None:
    """Add `/api/estimate`. create_handler, outermost: as for `add_call_routes`."""
    handler = create_handler(estimate_route(settings.server.max_body))
    app.router.add_route("*", prefix + estimate.PATH, compose(outermost, handler))


def add_usage(
    app: web.Application,
    settings: Settings,
    prefix: str,
    plain_layers: Sequence[Middleware],
    auth_middleware: Sequence[Middleware],
    ledger: Ledger,
) -> None:
    """Add `/api/usage` and `/metrics`, with the same authentication as calls.

    plain_layers: the middleware of paths that are no calls: error responses, and the host check.
    """
    handlers = usage_handlers(app, settings, ledger, is_locked=bool(auth_middleware))
    for path, handler in handlers.items():
        app.router.add_get(prefix + path, compose([*plain_layers, *auth_middleware], handler))


def usage_handlers(
    app: web.Application, settings: Settings, ledger: Ledger, *, is_locked: bool
) -> dict[str, Handler]:
    """Return the handlers of `/api/usage`, the paths below it and `/metrics`, which are imported on
    first use."""

    def create_visibility() -> "Visibility":
        from falproxy.web.usage import Visibility

        callers = frozenset(settings.auth.names_by_secret.values())
        return Visibility(is_locked, settings.auth.admins, callers, app.get(KNOWN_KEYS))

    def create_handlers() -> "UsageHandlers":
        from falproxy.web.usage import UsageHandlers

        return UsageHandlers(ledger, app[METRICS], create_visibility())

    def create_call_handlers() -> "CallHandlers":
        from falproxy.web.calls import CallHandlers

        limits = settings.limits
        budgets = {
            "principal": limits.budget, "user": limits.user_budget, "total": limits.total_budget,
        }  # fmt: skip
        shown = {name: budget and format_budget(budget) for name, budget in budgets.items()}
        return CallHandlers(ledger, app[METRICS], create_visibility(), shown)

    usage, calls = Lazy(create_handlers), Lazy(create_call_handlers)
    return {
        "/api/usage": lazy_method(usage, "get_usage"),
        "/api/usage/calls": lazy_method(calls, "get_calls"),
        "/api/usage/performance": lazy_method(calls, "get_performance"),
        "/api/usage/state": lazy_method(calls, "get_state"),
        "/metrics": lazy_method(usage, "get_metrics"),
    }


def lazy_method(handlers: Lazy[T], name: str) -> Handler:
    """Return a handler that calls a method of an object, which is created on first use."""

    async def call_method(request: web.Request) -> web.StreamResponse:
        handler: Handler = getattr(await handlers.get(), name)
        return await handler(request)

    return call_method


def add_keys(
    app: web.Application,
    settings: Settings,
    prefix: str,
    layers: Sequence[Middleware],
    known_keys: KnownKeys,
) -> None:
    """Add `/api/keys`, imported on first use."""

    def create_handlers() -> "KeyHandlers":
        from falproxy.web.keys import KeyHandlers
        from falproxy.web.usage import Visibility

        callers = frozenset(settings.auth.names_by_secret.values())
        admins = settings.auth.admins
        return KeyHandlers(known_keys, Visibility(True, admins, callers), {*callers, *admins})

    handlers = Lazy(create_handlers)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await (await handlers.get()).handle(request)

    handler = no_store(compose(layers, handle))
    for path in ("/api/keys", "/api/keys/{key}", "/api/keys/{key}/rotate"):
        app.router.add_route("*", prefix + path, handler)


def no_store(handler: Handler) -> Handler:
    """Return a handler whose responses, with those of errors, must not be stored."""

    async def handle_without_store(request: web.Request) -> web.StreamResponse:
        response = await handler(request)
        response.headers[hdrs.CACHE_CONTROL] = "no-store"
        return response

    return handle_without_store


def add_docs(
    app: web.Application,
    settings: Settings,
    dependencies: Dependencies,
    prefix: str,
    plain_layers: Sequence[Middleware],
    *,
    is_locked: bool,
    has_root: bool,
) -> None:
    """Add `/openapi.json`, `/docs` and, if `/` belongs to the proxy (has_root), the web pages."""
    if has_root:
        add_pages(app, settings, prefix, plain_layers, is_locked=is_locked)

    def create_openapi_handler() -> Handler:
        from falproxy.web import openapi

        api = openapi.ApiDescription(
            registry=dependencies.load_registry(),
            models=settings.dialects.models,
            is_locked=is_locked,
            has_files=serves_files(settings),
            public_url=settings.server.public_url,
            has_keys=settings.auth.keys == "on",
        )
        return openapi.openapi_handler(api)

    openapi_handler = Lazy(create_openapi_handler)

    async def get_openapi(request: web.Request) -> web.StreamResponse:
        return await (await openapi_handler.get())(request)

    docs_page = docs.Docs(has_pages=has_root)
    handlers = {
        docs.OPENAPI_PATH: get_openapi,
        docs.PATH: docs_page.show_page,
        docs.FILES: docs_page.show_file,
    }
    for path, handler in handlers.items():
        app.router.add_get(prefix + path, compose(plain_layers, handler))


def add_pages(
    app: web.Application,
    settings: Settings,
    prefix: str,
    plain_layers: Sequence[Middleware],
    *,
    is_locked: bool,
) -> None:
    """Add the page at `/`, the dashboard, their files, the icon and `robots.txt`."""
    pages = page.Pages(settings, is_locked=is_locked)
    handlers = {
        page.ROOT: pages.show_page,
        page.DASHBOARD: pages.show_dashboard,
        page.ABOUT: pages.show_about,
        page.FILES: pages.show_file,
        **{f"/{name}": pages.show_well_known_file for name in page.WELL_KNOWN_FILES},
    }
    for path, handler in handlers.items():
        app.router.add_get(prefix + path, compose(plain_layers, handler))
    if prefix:
        app.router.add_get(prefix, with_errors(page.redirect_to_page))


def with_errors(handler: Handler) -> Handler:
    """Return the handler of a path that is not a call, with request ids and error responses."""
    return compose([identify_requests(), handle_errors(default_error)], handler)


def add_health(app: web.Application, prefix: str, drain: Drain) -> None:
    """Add `/health` and the paths below it."""
    app.router.add_get(f"{prefix}/health/live", with_errors(drain.live))
    app.router.add_get(f"{prefix}/health/ready", with_errors(drain.ready))
    app.router.add_get(f"{prefix}/health", with_errors(drain.status))
