"""The middleware of every call, outermost first: who is let in, what may be called, what is done
around the formula."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.app.components import cache_policy
from falproxy.dialects import DialectRoute, handle_errors, method_check_middleware
from falproxy.errors import SettingsError
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import Globs, Policy
from falproxy.fal.target import Operation
from falproxy.media.fetch import Fetcher
from falproxy.media.image_rules import ImageLimits
from falproxy.middleware.access import (
    Authenticator,
    access_key_authenticator,
    authenticate,
    authorize,
)
from falproxy.middleware.caching import cache_results
from falproxy.middleware.cors import check_origin
from falproxy.middleware.image_inputs import check_images
from falproxy.middleware.virtual_requests import serve_virtual_requests
from falproxy.proxy.call import CALL
from falproxy.proxy.forward import forward
from falproxy.proxy.head_only import for_every_request
from falproxy.settings import Settings
from falproxy.stores.cache.eligibility import CacheEligibility
from falproxy.stores.cache.result_cache import ResultCache

if TYPE_CHECKING:
    from falproxy.middleware.rehost import RehostConfig

POLL_OPERATIONS = (Operation.STATUS, Operation.STATUS_STREAM)


def authentication(settings: Settings, auth_hook: Authenticator | None) -> list[Middleware]:
    """Who is let in: the holders of keys and tokens, and whom the hook knows. Without any of
    these, everybody."""
    ways: dict[str, Authenticator] = {}
    if names := settings.names_by_secret:
        ways["key"] = access_key_authenticator(names)
    if settings.jwt_secret or settings.jwks_url:
        by_token = import_token_authenticator()
        ways["jwt"] = by_token(settings.jwt_secret, settings.jwks_url, settings.jwt_audience)
    if auth_hook is not None:
        ways["hook"] = auth_hook
    return [authenticate(ways)] if ways else []


def import_token_authenticator() -> Callable[[str | None, str | None, str], Authenticator]:
    """Raises: SettingsError, PyJWT is not installed. Only those who ask for it need it."""
    try:
        from falproxy.middleware.tokens import jwt_authenticator
    except ModuleNotFoundError as error:
        raise SettingsError(f"Tokens need {error.name}: pip install 'falproxy[jwt]'.") from error
    return jwt_authenticator


def authorization(
    app: web.Application,
    settings: Settings,
    key_pool: KeyPool,
    result_cache: ResultCache | None,
    *,
    is_locked: bool,
) -> list[Middleware]:
    """What callers may do. Requests are only kept track of where it matters whose they are or
    which key they belong to."""
    endpoints = Globs(settings.allowed_endpoints)
    order = [authorize(Policy(endpoints, Globs(settings.allowed_targets), settings.uploads))]
    is_strict = is_locked or bool(endpoints)
    if is_strict or len(key_pool) > 1:
        order += request_ownership(app, settings, key_pool, result_cache, is_strict=is_strict)
    return order


def request_ownership(
    app: web.Application,
    settings: Settings,
    key_pool: KeyPool,
    result_cache: ResultCache | None,
    *,
    is_strict: bool,
) -> Iterator[Middleware]:
    """Whose requests are whose. An open proxy with one key never imports this."""
    from falproxy.middleware.request_owner import require_owner, rotate_keys
    from falproxy.stores.ownership import create_ownership

    breaker = None if result_cache is None else result_cache.breaker
    ownership = create_ownership(app, breaker, settings.data_dir)
    yield require_owner(ownership, key_pool, strict=is_strict)
    if len(key_pool) > 1:
        yield rotate_keys(key_pool)


def call_pipeline(
    settings: Settings,
    key_pool: KeyPool,
    result_cache: ResultCache | None,
    fetcher: Fetcher,
    rehosting: "RehostConfig | None",
    accounting: Sequence[Middleware] = (),
) -> Handler:
    """The formula, with what is done around it: books are kept, and outputs, images checked,
    results reused. A poll meets nothing of what is for jobs and results."""
    kept, last = [*accounting], list[Middleware]()
    if rehosting is not None:
        from falproxy.middleware.rehost import refuse_unstorable, rehost_outputs

        kept.append(rehost_outputs(rehosting))
        last += [refuse_unstorable(rehosting)] if rehosting.is_strict else []
    rules = ImageLimits(settings.image_formats)
    check_remote = settings.check_remote_images
    if not settings.cache or result_cache is None:
        order = [*kept, check_images(rules, fetcher, None, check_remote=check_remote), *last]
        return dispatch_by_operation(
            post=compose(order, forward), poll=forward, other=compose(kept, forward)
        )
    reuse = CacheEligibility(settings.cache_endpoints)
    terms = replace(cache_policy(settings), rehoster=rehosting.rehoster if rehosting else None)
    claims = serve_virtual_requests(reuse, result_cache, key_pool, terms)
    order = [
        *kept,
        claims,
        check_images(rules, fetcher, reuse, check_remote=check_remote),
        cache_results(reuse, result_cache, key_pool, terms),
        *last,
    ]
    return dispatch_by_operation(
        post=compose(order, forward),
        poll=compose([claims], forward),
        other=compose([*kept, claims], forward),
    )


def route_handler(
    settings: Settings,
    auth_middleware: Sequence[Middleware],
    authorization_middleware: Sequence[Middleware],
    pipeline: Handler,
) -> Callable[[DialectRoute], Handler]:
    """What a path is answered by, once it is known how it is served."""
    at_home = check_origin(settings.allowed_origins)

    def answer(way: DialectRoute) -> Handler:
        first = (handle_errors(way.refuse), method_check_middleware(way.check), at_home)
        return compose(
            [*first, *auth_middleware, way.middleware, *authorization_middleware], pipeline
        )

    return answer


def dispatch_by_operation(*, post: Handler, poll: Handler, other: Handler) -> Handler:
    def handle(request: web.Request) -> Awaitable[web.StreamResponse]:
        call = request[CALL]
        if call.method == hdrs.METH_POST:
            return post(request)
        return (poll if call.target.operation in POLL_OPERATIONS else other)(request)

    return handle


def compose(layers: Sequence[Middleware], handler: Handler) -> Handler:
    """A handler behind middleware, outermost first.

    The order belongs to a route, where an application's own `middlewares` would belong to all
    of them: those of somebody's application that took the proxy in are none of our business.
    """
    for middleware in reversed(layers):
        handler = partial(for_every_request(middleware), handler=handler)
    return handler
