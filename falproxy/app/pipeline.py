"""The middleware of every call, outermost first: who is let in, what may be called, what is done
around the formula."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.app.components import terms_of
from falproxy.dialects import Way, answer_errors, refuse_methods
from falproxy.errors import SettingsError
from falproxy.fal.keys import KeyRing
from falproxy.fal.policy import Globs, Policy
from falproxy.fal.target import Operation
from falproxy.media.fetch import Fetcher
from falproxy.media.image_rules import ImageRules
from falproxy.middleware.access import Authenticate, authenticate, authorize, by_access_key
from falproxy.middleware.caching import reuse_results
from falproxy.middleware.cors import refuse_foreign_pages
from falproxy.middleware.image_inputs import check_images
from falproxy.middleware.virtual_requests import answer_claims
from falproxy.proxy.call import CALL
from falproxy.proxy.forward import forward
from falproxy.proxy.head_only import for_every_request
from falproxy.settings import Settings
from falproxy.stores.cache.eligibility import Reuse
from falproxy.stores.cache.result_cache import Shelf

if TYPE_CHECKING:
    from falproxy.middleware.rehost import Rehosting

POLLS = (Operation.STATUS, Operation.STATUS_STREAM)


def ways_in(settings: Settings, hook: Authenticate | None) -> list[Middleware]:
    """Who is let in: the holders of keys and tokens, and whom the hook knows. Without any of
    these, everybody."""
    ways: dict[str, Authenticate] = {}
    if names := settings.names_by_secret:
        ways["key"] = by_access_key(names)
    if settings.jwt_secret or settings.jwks_url:
        by_token = import_tokens()
        ways["jwt"] = by_token(settings.jwt_secret, settings.jwks_url, settings.jwt_audience)
    if hook is not None:
        ways["hook"] = hook
    return [authenticate(ways)] if ways else []


def import_tokens() -> Callable[[str | None, str | None, str], Authenticate]:
    """Raises: SettingsError, PyJWT is not installed. Only those who ask for it need it."""
    try:
        from falproxy.middleware.tokens import by_token
    except ModuleNotFoundError as error:
        raise SettingsError(f"Tokens need {error.name}: pip install 'falproxy[jwt]'.") from error
    return by_token


def what_may_be_called(
    app: web.Application,
    settings: Settings,
    ring: KeyRing,
    shelf: Shelf | None,
    *,
    is_locked: bool,
) -> list[Middleware]:
    """What callers may do. Requests are only kept track of where it matters whose they are or
    which key they belong to."""
    endpoints = Globs(settings.allowed_endpoints)
    order = [authorize(Policy(endpoints, Globs(settings.allowed_targets), settings.uploads))]
    is_strict = is_locked or bool(endpoints)
    if is_strict or len(ring) > 1:
        order += keep_track(app, settings, ring, shelf, is_strict=is_strict)
    return order


def keep_track(
    app: web.Application,
    settings: Settings,
    ring: KeyRing,
    shelf: Shelf | None,
    *,
    is_strict: bool,
) -> Iterator[Middleware]:
    """Whose requests are whose. An open proxy with one key never imports this."""
    from falproxy.middleware.request_owner import bind_requests, take_turns
    from falproxy.stores.ownership import SharedSubmissions, Submissions, keep_submissions

    if shelf is not None and settings.redis_url is not None:
        yield bind_requests(SharedSubmissions(shelf.guard), ring, strict=is_strict)
    else:
        submissions = Submissions(settings.data_dir / "submissions.sqlite")
        app.cleanup_ctx.append(keep_submissions(submissions))
        yield bind_requests(submissions, ring, strict=is_strict)
    if len(ring) > 1:
        yield take_turns(ring)


def what_goes_around(
    settings: Settings,
    ring: KeyRing,
    shelf: Shelf | None,
    fetcher: Fetcher,
    rehosting: "Rehosting | None",
    books: Sequence[Middleware] = (),
) -> Handler:
    """The formula, with what is done around it: books are kept, and outputs, images checked,
    results reused. A poll meets nothing of what is for jobs and results."""
    kept, last = [*books], list[Middleware]()
    if rehosting is not None:
        from falproxy.middleware.rehost import refuse_unstorable, rehost_outputs

        kept.append(rehost_outputs(rehosting))
        last += [refuse_unstorable(rehosting)] if rehosting.is_strict else []
    rules = ImageRules(settings.image_formats)
    check_remote = settings.check_remote_images
    if not settings.cache or shelf is None:
        order = [*kept, check_images(rules, fetcher, None, check_remote=check_remote), *last]
        return by_kind(
            post=pass_through(order, forward), poll=forward, other=pass_through(kept, forward)
        )
    reuse = Reuse(settings.cache_endpoints)
    terms = replace(terms_of(settings), outputs=rehosting.outputs if rehosting else None)
    claims = answer_claims(reuse, shelf, ring, terms)
    order = [
        *kept,
        claims,
        check_images(rules, fetcher, reuse, check_remote=check_remote),
        reuse_results(reuse, shelf, ring, terms),
        *last,
    ]
    return by_kind(
        post=pass_through(order, forward),
        poll=pass_through([claims], forward),
        other=pass_through([*kept, claims], forward),
    )


def what_answers(
    settings: Settings,
    known: Sequence[Middleware],
    allowed: Sequence[Middleware],
    around: Handler,
) -> Callable[[Way], Handler]:
    """What a path is answered by, once it is known how it is served."""
    at_home = refuse_foreign_pages(settings.allowed_origins)

    def answer(way: Way) -> Handler:
        first = (answer_errors(way.refuse), refuse_methods(way.check), at_home)
        return pass_through([*first, *known, way.speak, *allowed], around)

    return answer


def by_kind(*, post: Handler, poll: Handler, other: Handler) -> Handler:
    def handle(request: web.Request) -> Awaitable[web.StreamResponse]:
        call = request[CALL]
        if call.method == hdrs.METH_POST:
            return post(request)
        return (poll if call.target.operation in POLLS else other)(request)

    return handle


def pass_through(order: Sequence[Middleware], handler: Handler) -> Handler:
    """A handler behind middleware, outermost first.

    The order belongs to a route, where an application's own `middlewares` would belong to all
    of them: those of somebody's application that took the proxy in are none of our business.
    """
    for middleware in reversed(order):
        handler = partial(for_every_request(middleware), handler=handler)
    return handler
