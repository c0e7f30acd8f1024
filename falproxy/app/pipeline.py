"""Middleware of a call, outermost first.

1. `outermost_layers`: CORS headers and the access log, around the handler of each path.
2. `handler_factory`: error responses, checks of method, host and origin, `authentication`, the
   user, the dialect, and `authorization`, around the call pipeline.
3. `call_pipeline`: rates, idempotency, accounting, re-hosting, virtual requests, request tags,
   image check, result cache, concurrency and budgets, as the call's operation requires, around
   `forward`.

The order is written here and nowhere else. At debug level, each pipeline is logged when it is
created.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.app.components import create_cache_policy
from falproxy.dialects import DialectRoute, handle_errors, method_check_middleware
from falproxy.errors import SettingsError
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import Globs, Policy, app_globs, is_model_call, may_be_live_call
from falproxy.fal.target import Operation
from falproxy.media.fetch import Fetcher
from falproxy.media.image_rules import ImageLimits
from falproxy.metrics import METRICS, Metrics
from falproxy.middleware.access import (
    ACCESS_KEY_METHOD,
    Authenticator,
    AuthHook,
    access_key_authenticator,
    authenticate,
    authorize,
    hook_authenticator,
)
from falproxy.middleware.access_log import access_log, identify_requests
from falproxy.middleware.caching import cache_results
from falproxy.middleware.cors import check_host, check_origin, cors
from falproxy.middleware.idempotency import keep_idempotent, record_sending
from falproxy.middleware.image_inputs import check_images
from falproxy.middleware.limit_calls import (
    LimitPolicy,
    add_limit_fields,
    limit_rates,
    limit_tokens,
    reserve_costs,
    settle_job,
    settle_jobs,
)
from falproxy.middleware.tags import add_tags
from falproxy.middleware.users import identify_user
from falproxy.middleware.virtual_requests import serve_virtual_requests
from falproxy.parsers import ANY_ORIGIN
from falproxy.proxy.call import CALL
from falproxy.proxy.forward import DirectWrite, forward
from falproxy.proxy.head_only import keep_off_fast_path
from falproxy.settings import Settings
from falproxy.stores.cache.eligibility import CacheEligibility
from falproxy.stores.cache.result_cache import ResultCache
from falproxy.stores.idempotency.keyed_calls import KeyedCalls
from falproxy.stores.keys.known_keys import KnownKeys
from falproxy.web.not_found import html_not_found

if TYPE_CHECKING:
    from falproxy.middleware.rehost import RehostConfig
    from falproxy.middleware.tokens import JwtVerifier
    from falproxy.stores.live_sessions import LiveSessions

logger = logging.getLogger(__name__)

# Creates the pipeline of live video from the middleware of model calls, and the handler of those
# that turn out not to be live video.
CreateLivePipeline = Callable[[Sequence[Middleware], Handler], Handler]
POLL_OPERATIONS = (Operation.STATUS, Operation.STATUS_STREAM)


def outermost_layers(
    settings: Settings, metrics: Metrics, direct_write: DirectWrite | None
) -> list[Middleware]:
    """Return the middleware that refused requests pass as well: CORS headers, the access log."""
    return [*cors_layers(settings), access_log(metrics, direct_write)]


def unrouted_layers(settings: Settings) -> list[Middleware]:
    """Return the middleware of requests that no route serves, innermost first."""
    return [html_not_found, identify_requests(), *cors_layers(settings)]


def cors_layers(settings: Settings) -> list[Middleware]:
    """Return the middleware of CORS headers; none if no origin is allowed."""
    origins = settings.auth.allowed_origins
    return [cors(origins)] if origins else []


def authentication(
    settings: Settings,
    auth_hook: AuthHook | None,
    known_keys: KnownKeys | None = None,
    app: web.Application | None = None,
) -> list[Middleware]:
    """Return the authentication middleware; none if the proxy is open to all callers.

    app: its end stops the reads of public keys.
    """
    authenticators: dict[str, Authenticator] = {}
    if names := settings.auth.names_by_secret:
        authenticators[ACCESS_KEY_METHOD] = access_key_authenticator(names)
    if settings.auth.jwt_secret or settings.auth.jwks_url:
        verifier = import_jwt_verifier()(
            settings.auth.jwt_secret, settings.auth.jwks_url, settings.auth.jwt_audience
        )
        if app is not None:
            app.on_cleanup.append(verifier.close)
        authenticators["jwt"] = verifier.authenticate
    if auth_hook is not None:
        authenticators["hook"] = hook_authenticator(auth_hook)
    if not authenticators and known_keys is None:
        return []
    return [authenticate(authenticators, known_keys=known_keys)]


def host_middleware(settings: Settings, *, is_locked: bool) -> list[Middleware]:
    """Return the check of host names; none if callers have to authenticate themselves."""
    if is_locked:
        return []
    public_url = settings.server.public_url
    public_names = [ascii_name(urlsplit(public_url).hostname or "")] if public_url else []
    return [check_host([*settings.auth.allowed_hosts, *public_names])]


def ascii_name(name: str) -> str:
    """Return a host name as browsers send it (RFC 5891)."""
    try:
        return name.encode("idna").decode()
    except UnicodeError:
        return name


def check_any_origin(settings: Settings, *, is_locked: bool) -> None:
    """Raises: SettingsError, all web pages could use a proxy that is open to all callers."""
    if ANY_ORIGIN not in settings.auth.allowed_origins:
        return
    if not is_locked:
        raise SettingsError(
            "FALPROXY_ALLOWED_ORIGINS=* lets every web page call the proxy. List the origins, or "
            "require access keys or tokens (FALPROXY_ACCESS_KEYS, FALPROXY_JWT_SECRET)."
        )
    logger.warning("Pages of all origins may call the proxy: only keys and tokens protect it")


def import_jwt_verifier() -> "type[JwtVerifier]":
    """Import the verifier of tokens, which needs an optional package.

    Raises: SettingsError, PyJWT is not installed.
    """
    try:
        from falproxy.middleware.tokens import JwtVerifier
    except ModuleNotFoundError as error:
        raise SettingsError(f"Tokens need {error.name}: pip install 'falproxy[jwt]'.") from error
    return JwtVerifier


def authorization(
    app: web.Application,
    settings: Settings,
    key_pool: KeyPool,
    result_cache: ResultCache | None,
    *,
    is_locked: bool,
) -> list[Middleware]:
    """Return the middleware that checks permissions.

    The owner of a queued request is recorded only if callers or endpoints are restricted, or if
    there are several fal keys.
    """
    endpoints = Globs(settings.auth.allowed_endpoints)
    layers = [policy_middleware(settings)]
    if is_locked or endpoints or len(key_pool) > 1:
        layers += request_ownership(app, settings, key_pool, result_cache, is_locked=is_locked)
    return layers


def policy_middleware(settings: Settings) -> Middleware:
    """Return the middleware that refuses calls outside the policy."""
    return authorize(create_policy(settings))


def create_policy(settings: Settings) -> Policy:
    auth = settings.auth
    endpoints, targets = Globs(auth.allowed_endpoints), Globs(auth.allowed_targets)
    return Policy(endpoints, targets, auth.uploads, auth.live)


def request_ownership(
    app: web.Application,
    settings: Settings,
    key_pool: KeyPool,
    result_cache: ResultCache | None,
    *,
    is_locked: bool,
) -> Iterator[Middleware]:
    """Yield the middleware that binds queued requests to their caller and fal key."""
    from falproxy.middleware.request_owner import OwnerPolicy, require_owner, rotate_keys
    from falproxy.stores.ownership import create_ownership

    breaker = None if result_cache is None else result_cache.breaker
    ownership = create_ownership(app, breaker, settings.data_dir, settings.cache.owner_retention)
    app[METRICS].dependencies["owners"] = lambda: not ownership.unwritten_count
    apps = app_globs(Globs(settings.auth.allowed_endpoints))
    yield require_owner(ownership, key_pool, OwnerPolicy(is_locked, apps))
    if len(key_pool) > 1:
        yield rotate_keys(key_pool)


@dataclass(frozen=True, slots=True)
class CallResources:
    """The parts of the proxy that calls use.

    rehosting, result_cache: None if they are turned off.
    limits: None if nothing is limited.
    keyed_calls: None to ignore the header Idempotency-Key.
    """

    key_pool: KeyPool
    fetcher: Fetcher
    rehosting: "RehostConfig | None"
    result_cache: ResultCache | None
    limits: LimitPolicy | None = None
    keyed_calls: KeyedCalls | None = None


@dataclass(slots=True)
class LiveState:
    """The resources that the pipeline of live video opens with its first call.

    closing: closes that at the end of the application.
    """

    closing: AsyncExitStack = field(default_factory=AsyncExitStack)
    sessions: "LiveSessions | None" = None


LIVE_STATE = web.AppKey("falproxy.live_state", LiveState)


def call_pipeline(
    settings: Settings,
    resources: CallResources,
    accounting: Sequence[Middleware] = (),
    live: CreateLivePipeline | None = None,
    polls: Sequence[Middleware] = (),
) -> Handler:
    """Return the handler that forwards a call to fal, inside the middleware of its operation.

    polls: the middleware of status polls.
    live: creates the pipeline of live video, when the first call needs it.

    Status polls only pass the middleware of virtual requests: the rest acts on jobs and results.
    """
    rehosting, limits = resources.rehosting, resources.limits
    first: list[Middleware] = []
    outer = list(accounting)
    inner: list[Middleware] = []
    settlement: list[Middleware] = []
    if rehosting is not None:
        from falproxy.middleware.rehost import refuse_unstorable, rehost_outputs

        outer.append(rehost_outputs(rehosting))
        inner += [refuse_unstorable(rehosting)] if rehosting.is_strict else []
    if limits is not None:
        first.append(limit_rates(limits))
        settlement.append(limit_tokens(limits))
        inner.append(reserve_costs(limits))
        settlement.append(settle_jobs(limits.limiter))
    if resources.keyed_calls is not None:
        first.append(keep_idempotent(resources.keyed_calls, *accounting))
        inner.append(record_sending())
    if rehosting is not None and rehosting.inputs is not None:
        from falproxy.middleware.store_inputs import store_inputs

        inner.append(store_inputs(rehosting.inputs, rehosting.quota))
    tags = [add_tags(settings.upstream.tags)] if settings.upstream.tags else []
    eligibility, virtual, caching = cache_layers(settings, resources)
    image_check = check_images(
        ImageLimits(settings.images.formats),
        resources.fetcher,
        eligibility,
        check_remote=settings.images.check_remote,
    )
    post = [*first, *outer, *virtual, *tags, image_check, *caching, *inner]
    handlers = {
        "post": compose(post, forward),
        "poll": compose([*virtual, *polls], forward),
        "other": compose([*outer, *virtual, *settlement], forward),
    }
    for name, handler in handlers.items():
        log_pipeline(f"{name} calls", handler)
    if live is not None:
        layers = [*first, *accounting, *tags, *inner]
        handlers["live"] = create_on_first_use(partial(live, layers, handlers["post"]))
    return dispatch_by_operation(**handlers)


def create_on_first_use(create: Callable[[], Handler]) -> Handler:
    """Return a handler that is created with the first request."""
    handler: Handler | None = None

    async def create_and_handle(request: web.Request) -> web.StreamResponse:
        nonlocal handler
        if handler is None:
            handler = create()
        return await handler(request)

    return create_and_handle


def cache_layers(
    settings: Settings, resources: CallResources
) -> tuple[CacheEligibility | None, list[Middleware], list[Middleware]]:
    """Return which calls are cached, the middleware of virtual requests, and that of the result
    cache. None and empty lists if the cache is turned off."""
    result_cache, key_pool = resources.result_cache, resources.key_pool
    rehosting, limits = resources.rehosting, resources.limits
    if not settings.cache.enabled or result_cache is None:
        return None, [], []
    eligibility = CacheEligibility(settings.cache.endpoints)
    policy = replace(
        create_cache_policy(settings),
        rehoster=None if rehosting is None else rehosting.rehoster,
        settle_job=None if limits is None else partial(settle_job, limits.limiter),
    )
    virtual = serve_virtual_requests(eligibility, result_cache, key_pool, policy)
    caching = cache_results(eligibility, result_cache, key_pool, policy)
    return eligibility, [virtual], [caching]


def limit_fields(limits: LimitPolicy | None) -> list[Middleware]:
    """Return the middleware of `RateLimit` fields; none if nothing is limited."""
    return [] if limits is None else [add_limit_fields()]


def handler_factory(
    settings: Settings,
    host_check: Sequence[Middleware],
    auth_middleware: Sequence[Middleware],
    authorization_middleware: Sequence[Middleware],
    pipeline: Handler,
) -> Callable[[DialectRoute], Handler]:
    """Return a function that creates the handler of a dialect's route."""
    origin_check = check_origin(settings.auth.allowed_origins)

    def create_handler(route: DialectRoute) -> Handler:
        layers = [
            handle_errors(route.refuse),
            method_check_middleware(route.check),
            *host_check,
            origin_check,
            *auth_middleware,
            identify_user(),
            route.middleware,
            *authorization_middleware,
        ]
        return compose(layers, pipeline)

    return create_handler


def dispatch_by_operation(
    *, post: Handler, poll: Handler, other: Handler, live: Handler | None = None
) -> Handler:
    """Return a handler that calls the one for calls of models, which are mostly POST, for status
    polls, for live video, or for other operations."""

    def by_operation(request: web.Request) -> Awaitable[web.StreamResponse]:
        call = request[CALL]
        if live is not None and may_be_live_call(call.target):
            return live(request)
        if is_model_call(call.method, call.target):
            return post(request)
        return (poll if call.target.operation in POLL_OPERATIONS else other)(request)

    return by_operation


def compose(layers: Sequence[Middleware], handler: Handler) -> Handler:
    """Return a handler inside middleware, outermost first.

    The middleware applies to one route. `Application.middlewares` would apply to all routes,
    including those of an application that embeds the proxy.
    """
    for middleware in reversed(layers):
        # Unless the middleware is declared `head_only`.
        handler = partial(keep_off_fast_path(middleware), handler=handler)
    return handler


def log_pipeline(name: str, handler: Handler) -> None:
    """Log the layers of a composed handler at debug level, outermost first."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("Pipeline of %s: %s", name, " > ".join(layer_names(handler)))


def layer_names(handler: Handler) -> Iterator[str]:
    """Yield the names of a composed handler's middleware, and of the innermost handler."""
    while isinstance(handler, partial):
        yield layer_name(handler.func)
        handler = handler.keywords["handler"]
    yield layer_name(handler)


def layer_name(layer: object) -> str:
    """Return the name of a middleware's factory, or of a function that is no closure."""
    name = str(getattr(layer, "__qualname__", type(layer).__qualname__))
    return name.partition(".<locals>")[0]
