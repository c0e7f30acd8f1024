"""Access control: authentication of callers, the endpoint policy, and limits for fal's tokens."""

import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from functools import lru_cache

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.policy import Policy, normalized_path
from falproxy.fal.target import CACHE_SIZE, CACHED_LENGTH_MAX, Target
from falproxy.json_object import parse_object
from falproxy.middleware.guess_limit import GuessLimit
from falproxy.proxy.call import CALL, OWNER, PRINCIPAL, REQUEST_ID, Call
from falproxy.proxy.head_only import head_only

logger = logging.getLogger(__name__)

# Returns the principal of a request, None if it cannot be authenticated.
Authenticator = Callable[[web.Request], Awaitable[str | None]]

ACCESS_KEY = "x-falproxy-key"
ACCESS_KEY_METHOD = "key"  # name of the authentication method
BEARER = "Authorization: Bearer"
SCHEMES = ("bearer ", "key ")
TOKEN_BODY_MAX = 64 * 1024
# Seconds that a token may live; the value that fal's own client requests.
TOKEN_LIFETIME = 120
LIFETIME_FIELDS = ("token_expiration", "duration")  # of /tokens/ and of /tokens/realtime
APP_FIELDS = ("allowed_apps", "app")


def authenticate(
    authenticators: Mapping[str, Authenticator], guess_limit: GuessLimit | None = None
) -> Middleware:
    """Middleware: refuse an unauthenticated call with 401, before its target is parsed.

    authenticators: by the name of the method. The owner includes the method, so equal names from
        two methods differ.
    guess_limit: for access keys; too many refused ones are a 429.
    """
    limit = guess_limit or GuessLimit()

    message = credentials_message(authenticators)

    @head_only
    @web.middleware
    async def authenticate_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        seconds = 0
        for method, identify in authenticators.items():
            principal = await identify(request)
            if method == ACCESS_KEY_METHOD:
                seconds = limit.seconds_to_wait(request.remote or "")
                principal = admit_key(limit, request.remote or "", principal, seconds)
            if principal:
                request[PRINCIPAL] = principal
                request[OWNER] = f"{method}:{principal}"
                return await handler(request)
        if credential(request):
            refuse_credential(request, limit, seconds, is_guess=is_guess(request, authenticators))
        # RFC 6750, section 3.1: the error code is for requests with a token only.
        is_invalid = "jwt" in authenticators and credential(request)
        challenge = 'Bearer error="invalid_token"' if is_invalid else "Bearer"
        raise ProxyError(401, "unauthenticated", message, {hdrs.WWW_AUTHENTICATE: challenge})

    return authenticate_middleware


def admit_key(limit: GuessLimit, address: str, principal: str | None, seconds: int) -> str | None:
    """Return the principal of an access key; None if there is none, or if the address has to wait
    `seconds` and the caller has not used the key from there before."""
    if principal is None or (seconds and not limit.is_known(address, principal)):
        return None
    limit.record_success(address, principal)
    return principal


def is_guess(request: web.Request, authenticators: Mapping[str, Authenticator]) -> bool:
    """Return whether a credential is counted as an access key. Where tokens are accepted, a token
    is not: it cannot be guessed, and clients repeat an expired one."""
    is_token = "jwt" in authenticators and (credential(request) or "").count(".") == 2
    return ACCESS_KEY_METHOD in authenticators and not is_token


def refuse_credential(
    request: web.Request, limit: GuessLimit, seconds: int, *, is_guess: bool
) -> None:
    """Log a refused credential with the address of its caller, and count it if it is a guess.

    Raises: ProxyError 429, the address has to wait `seconds`.
    """
    address = request.remote or ""
    fields = {"request_id": request.get(REQUEST_ID), "client": address}
    if not is_guess or not seconds:
        logger.warning("A key or token was refused", extra={"fields": fields})
    if not is_guess:
        return
    if seconds:
        logger.info("Too many refused keys: not checked", extra={"fields": fields})
        raise ProxyError(
            429,
            "too_many_attempts",
            f"Too many wrong access keys came from this address: try again in {seconds} s.",
            {hdrs.RETRY_AFTER: str(seconds)},
        )
    limit.record_refusal(address)


def credentials_message(methods: Collection[str]) -> str:
    """Return the sentence of a 401 with the credentials that the methods accept."""
    if "key" in methods and "jwt" in methods:
        return f"Send an access key of this proxy as {ACCESS_KEY}, or it or a token as {BEARER}."
    if "jwt" in methods:
        return f"Send a valid token (JWT) as {BEARER}. A token that has expired is not valid."
    return f"Send an access key of this proxy as {ACCESS_KEY} or {BEARER}."


def access_key_authenticator(names_by_secret: Mapping[str, str]) -> Authenticator:
    """Return an authenticator for access keys, whose principal is the name of the key."""
    keys = [(secret.encode(), name) for secret, name in names_by_secret.items()]

    async def authenticate_access_key(request: web.Request) -> str | None:
        presented = (credential(request) or "").encode("utf-8", "surrogateescape")
        principal = None
        for secret, name in keys:  # no early exit: the duration must not depend on the match
            if hmac.compare_digest(secret, presented):
                principal = name
        return principal if presented else None

    return authenticate_access_key


def credential(request: web.Request) -> str | None:
    """Return the value of `x-falproxy-key`, else of Authorization with the scheme Bearer or Key."""
    if (access_key := request.headers.get(ACCESS_KEY)) is not None:
        return access_key
    authorization = request.headers.get(hdrs.AUTHORIZATION, "")
    for scheme in SCHEMES:
        if authorization[: len(scheme)].lower() == scheme:
            return authorization[len(scheme) :].strip()
    return None


def authorize(policy: Policy) -> Middleware:
    """Middleware: refuse a call outside the policy with 403, and restrict a request for a token."""

    def check(method: str, target: Target) -> bool:
        """Return whether the call requests a token. Raises: ProxyError 403."""
        policy.check(method, target)
        return policy.is_token_request(method, target)

    check_cached = lru_cache(CACHE_SIZE)(check)  # for repeated polls: the policy never changes

    @head_only
    @web.middleware
    async def authorize_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        method, target = call.method, call.target
        is_short = len(target.path) + len(target.query) <= CACHED_LENGTH_MAX
        if check_cached(method, target) if is_short else check(method, target):
            request[CALL] = await restrict_token(call, policy)
        return await handler(request)

    return authorize_middleware


async def restrict_token(call: Call, policy: Policy) -> Call:
    """Return the call with a body of the known fields only: allowed apps, and a lifetime of at most
    `TOKEN_LIFETIME`.

    Raises: ProxyError 400 `token_unreadable`, 403 `target_forbidden`.
    """
    requested = await read_token_request(call)
    for app in requested_apps(requested):
        policy.check_app(app)
    lifetime_field = LIFETIME_FIELDS[normalized_path(call.target).endswith("/realtime")]
    lifetime = next((requested[name] for name in LIFETIME_FIELDS if name in requested), None)
    restricted = {name: requested[name] for name in APP_FIELDS if name in requested}
    restricted[lifetime_field] = cap_lifetime(lifetime)
    body = json.dumps(restricted).encode()
    return replace(call, body=single_chunk(body), length=len(body))


async def read_token_request(call: Call) -> dict[str, object]:
    """Return the JSON object in a request for a token. Raises: ProxyError 400
    `token_unreadable`."""
    body = b""
    if call.body is not None and hdrs.CONTENT_ENCODING not in call.headers:
        async for chunk in call.body:
            body += chunk
            if len(body) > TOKEN_BODY_MAX:
                break
    requested = parse_object(body) if len(body) <= TOKEN_BODY_MAX else None
    if requested is None:
        raise ProxyError(400, "token_unreadable", "Ask for a token with a JSON object of apps.")
    return requested


def requested_apps(token_request: dict[str, object]) -> list[str]:
    """Return the apps of both fields. A value that is no string becomes an empty name, which no
    policy allows."""
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
