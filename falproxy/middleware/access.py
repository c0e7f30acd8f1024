"""Who may call, and what: the access keys, the endpoint list, and the tokens that fal makes."""

import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from functools import lru_cache

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.policy import Policy, normalized_path
from falproxy.fal.target import CACHE_SIZE, CACHED_LENGTH_MAX, Target
from falproxy.proxy.call import CALL, OWNER, PRINCIPAL, Call
from falproxy.proxy.head_only import head_only

# Names who is calling; None when that is nobody this proxy knows.
Authenticator = Callable[[web.Request], Awaitable[str | None]]

ACCESS_KEY = "x-falproxy-key"
SCHEMES = ("bearer ", "key ")
TOKEN_BODY_MAX = 64 * 1024
# Seconds that a token may live. fal's own client asks for so many.
TOKEN_LIFETIME = 120
LIFETIME_FIELDS = ("token_expiration", "duration")  # of /tokens/ and of /tokens/realtime
APP_FIELDS = ("allowed_apps", "app")


def authenticate(authenticators: Mapping[str, Authenticator]) -> Middleware:
    """Middleware: a call of nobody known is a 401, before its target is even looked at.

    ways: of knowing callers, by a word for each. The same name known by two ways is two callers.
    """

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        for way, identify in authenticators.items():
            if principal := await identify(request):
                request[PRINCIPAL] = principal
                request[OWNER] = f"{way}:{principal}"
                return await handler(request)
        raise ProxyError(
            401,
            "unauthenticated",
            f"Send an access key of this proxy as {ACCESS_KEY} or Authorization: Bearer.",
            {hdrs.WWW_AUTHENTICATE: "Bearer"},
        )

    return middleware


def access_key_authenticator(names_by_secret: Mapping[str, str]) -> Authenticator:
    """Knows the holders of access keys. names: secret → name."""
    known = [(secret.encode(), name) for secret, name in names_by_secret.items()]

    async def identify(request: web.Request) -> str | None:
        given = (credential(request) or "").encode("utf-8", "surrogateescape")
        found = None
        for secret, name in known:  # all of them: the time taken tells nothing
            if hmac.compare_digest(secret, given):
                found = name
        return found if given else None

    return identify


def credential(request: web.Request) -> str | None:
    """What a client shows: `x-falproxy-key`, else what follows Bearer or Key in Authorization."""
    if (given := request.headers.get(ACCESS_KEY)) is not None:
        return given
    authorization = request.headers.get(hdrs.AUTHORIZATION, "")
    for scheme in SCHEMES:
        if authorization[: len(scheme)].lower() == scheme:
            return authorization[len(scheme) :].strip()
    return None


def authorize(policy: Policy) -> Middleware:
    """Middleware: a call outside the policy is a 403. The body of a call that makes a token is
    read, and its life shortened."""

    def look(method: str, target: Target) -> bool:
        """Whether the call makes a token. Raises: ProxyError 403."""
        policy.check(method, target)
        return policy.is_token_request(method, target)

    look_again = lru_cache(CACHE_SIZE)(look)  # a poll is allowed as long as it was before

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        method, target = call.method, call.target
        is_short = len(target.path) + len(target.query) <= CACHED_LENGTH_MAX
        if look_again(method, target) if is_short else look(method, target):
            request[CALL] = await restrict_token(call, policy)
        return await handler(request)

    return middleware


async def restrict_token(call: Call, policy: Policy) -> Call:
    """The call for a token of allowed apps that lives two minutes at most, and for nothing else:
    only fields that are known go up.

    Raises: ProxyError 400 `token_unreadable`, 403 `target_forbidden`.
    """
    wish = await read_token_request(call)
    for app in requested_apps(wish):
        policy.check_app(app)
    life = LIFETIME_FIELDS[normalized_path(call.target).endswith("/realtime")]
    asked = next((wish[name] for name in LIFETIME_FIELDS if name in wish), None)
    sent = {name: wish[name] for name in APP_FIELDS if name in wish} | {life: cap_lifetime(asked)}
    body = json.dumps(sent).encode()
    return replace(call, body=single_chunk(body), length=len(body))


async def read_token_request(call: Call) -> dict[str, object]:
    """The JSON object in a call for a token."""
    body = b""
    if call.body is not None and hdrs.CONTENT_ENCODING not in call.headers:
        async for chunk in call.body:
            body += chunk
            if len(body) > TOKEN_BODY_MAX:
                break
    try:
        wish = json.loads(body) if len(body) <= TOKEN_BODY_MAX else None
    except (ValueError, RecursionError):
        wish = None
    if not isinstance(wish, dict):
        raise ProxyError(400, "token_unreadable", "Ask for a token with a JSON object of apps.")
    return wish


def requested_apps(token_request: dict[str, object]) -> list[str]:
    """Every app that a token would be for, by either of fal's names for the field. One that is
    no text stands as an empty one, which no policy allows."""
    apps: list[object] = []
    for name in APP_FIELDS:
        value = token_request.get(name, [])
        apps += value if isinstance(value, list) else [value]
    return [app if isinstance(app, str) else "" for app in apps or [""]]


def cap_lifetime(lifetime: object) -> float:
    if (
        isinstance(lifetime, int | float)
        and not isinstance(lifetime, bool)
        and 0 < lifetime <= TOKEN_LIFETIME
    ):
        return lifetime
    return TOKEN_LIFETIME


async def single_chunk(body: bytes) -> AsyncIterator[bytes]:
    yield body
