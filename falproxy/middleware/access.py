"""Access control: authentication of callers, the endpoint policy, and limits for fal's tokens."""

import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.policy import Policy, normalized_path
from falproxy.fal.target import CACHE_SIZE, CACHED_LENGTH_MAX, Target
from falproxy.json_object import parse_object
from falproxy.middleware.guess_limit import GuessLimit
from falproxy.middleware.managed_keys import (
    bind_grant,
    check_key_endpoints,
    find_grant,
    key_policy,
    owner_of,
)
from falproxy.proxy.call import (
    CALL,
    CONNECTION_BOUND,
    GRANT,
    KEY_GRANT,
    OWNER,
    PRINCIPAL,
    REQUEST_ID,
    Call,
)
from falproxy.proxy.client_address import client_address
from falproxy.proxy.head_only import (
    ADDRESS_CHECK,
    NEEDS_EVERY_ID,
    NEEDS_EVERY_REQUEST,
    AddressCheck,
    any_request_id,
)
from falproxy.stores.keys import is_secret
from falproxy.stores.keys.known_keys import MANAGED_KEY_METHOD, KnownKeys

logger = logging.getLogger(__name__)

# Returns the principal of a request, None if it cannot be authenticated.
Authenticator = Callable[[web.Request], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller, as a hook may return it instead of the name alone.

    valid_for: seconds for which requests with the same head on the same connection come from the
        same caller: the hook may be skipped for them. With 0 it is called for every request.
    """

    name: str
    valid_for: float = 0.0


# Authenticates callers in the application's own way: returns None for a request without a caller.
AuthHook = Callable[[web.Request], Awaitable[str | Identity | None]]

ACCESS_KEY = "x-falproxy-key"
ACCESS_KEY_METHOD = "key"  # name of the authentication method
BEARER = "Authorization: Bearer"
SCHEMES = ("bearer ", "key ")
NOT_VALID = "The credential of this request is not valid here."
TOKEN_BODY_MAX = 64 * 1024
# Seconds that a token may live; the value that fal's own client requests.
TOKEN_LIFETIME = 120
LIFETIME_FIELDS = ("token_expiration", "duration")  # of /tokens/ and of /tokens/realtime
APP_FIELDS = ("allowed_apps", "app")


def authenticate(
    authenticators: Mapping[str, Authenticator],
    guess_limit: GuessLimit | None = None,
    known_keys: KnownKeys | None = None,
) -> Middleware:
    """Middleware: refuse an unauthenticated call with 401, before its target is parsed.

    authenticators: by the name of the method. The owner includes the method, so equal names from
        two methods differ.
    guess_limit: for access keys; too many refused ones are a 429.
    known_keys: made at run time; they are tried after the access keys of the settings.
    """
    others = {**authenticators}
    keys = KeyCheck(others.pop(ACCESS_KEY_METHOD, None), known_keys, guess_limit or GuessLimit())
    methods = [*authenticators, *([] if known_keys is None else [MANAGED_KEY_METHOD])]
    message = credentials_message(methods)

    @any_request_id
    @web.middleware
    async def authenticate_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        seconds = keys.seconds_to_wait(request)
        if await keys.identify(request, seconds):
            return await handler(request)
        for method, identify in others.items():
            if principal := await identify(request):
                request[PRINCIPAL] = principal
                request[OWNER] = f"{method}:{principal}"
                return await handler(request)
        if credential(request):
            is_counted = is_guess(request, methods)
            refuse_credential(request, keys.limit, seconds, is_guess=is_counted)
        # RFC 6750, section 3.1: the error code is for requests with a token only.
        is_invalid = "jwt" in authenticators and credential(request)
        challenge = 'Bearer error="invalid_token"' if is_invalid else "Bearer"
        text = f"{NOT_VALID} {message}" if credential(request) else message
        raise ProxyError(401, "unauthenticated", text, {hdrs.WWW_AUTHENTICATE: challenge})

    return authenticate_middleware


@dataclass(frozen=True, slots=True)
class KeyCheck:
    """The check of access keys: those of the settings, and those that are made at run time.

    static_keys, known_keys: None if there are none.
    """

    static_keys: Authenticator | None
    known_keys: KnownKeys | None
    limit: GuessLimit

    def seconds_to_wait(self, request: web.Request) -> int:
        """Return the seconds until a key from the address of the request is checked again."""
        if self.static_keys is None and self.known_keys is None:
            return 0
        return self.limit.seconds_to_wait(client_address(request))

    async def identify(self, request: web.Request, seconds: int) -> bool:
        """Set the caller of a request with a key that is let in. Return False for other requests.

        seconds: that the address has to wait.
        """
        grant = None
        principal = await self.static_keys(request) if self.static_keys is not None else None
        owner = f"{ACCESS_KEY_METHOD}:{principal}"
        if principal is None and self.known_keys is not None:
            grant = await find_grant(
                request, credential(request), self.known_keys, may_ask_store=not seconds
            )
            if grant is not None:
                principal, owner = grant.key.name, owner_of(grant)
        if principal is None or not admit_key(self.limit, client_address(request), owner, seconds):
            return False
        request[PRINCIPAL], request[OWNER] = principal, owner
        may_use: AddressCheck = partial(may_use_key, self.limit, owner)
        request[ADDRESS_CHECK] = may_use
        if grant is not None:
            bind_grant(request, grant)
        return True


def admit_key(limit: GuessLimit, address: str, owner: str, seconds: int) -> bool:
    """Return whether the owner of an access key is let in: not if the address has to wait
    `seconds` and the owner has not used a key from there before."""
    if seconds and not limit.is_known(address, owner):
        return False
    limit.record_success(address, owner)
    return True


def may_use_key(limit: GuessLimit, owner: str, address: str) -> bool:
    """Return whether the owner of an access key may use it from an address."""
    return admit_key(limit, address, owner, limit.seconds_to_wait(address))


def is_guess(request: web.Request, methods: Collection[str]) -> bool:
    """Return whether a credential is counted as an access key. Where tokens are accepted, a token
    is not: it cannot be guessed, and clients repeat an expired one."""
    presented = credential(request) or ""
    if ACCESS_KEY_METHOD in methods:
        return not ("jwt" in methods and presented.count(".") == 2)
    return MANAGED_KEY_METHOD in methods and is_secret(presented)


def refuse_credential(
    request: web.Request, limit: GuessLimit, seconds: int, *, is_guess: bool
) -> None:
    """Log a refused credential with the address of its caller, and count it if it is a guess.

    Raises: ProxyError 429, the address has to wait `seconds`.
    """
    address = client_address(request)
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
    if ACCESS_KEY_METHOD in methods and "jwt" in methods:
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


class TimedGrant:
    """The validity of a hook's identity. deadline: by `time.monotonic`."""

    __slots__ = ("deadline",)

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def __repr__(self) -> str:
        return f"<TimedGrant, {self.deadline - time.monotonic():.1f} s>"

    def use(self) -> bool:
        return time.monotonic() < self.deadline


def hook_authenticator(hook: AuthHook) -> Authenticator:
    """Return an authenticator that calls the hook of an application.

    A hook may look at the connection too, so an identity with a time is reused for equal heads on
    the same connection only. All other requests are kept off the fast path.
    """

    async def authenticate_by_hook(request: web.Request) -> str | None:
        request[NEEDS_EVERY_ID] = True
        called_at = time.monotonic()
        identity = await hook(request)
        if isinstance(identity, Identity) and identity.valid_for > 0:
            request[GRANT] = TimedGrant(called_at + identity.valid_for)
            request[CONNECTION_BOUND] = True
        else:
            request[NEEDS_EVERY_REQUEST] = "authenticate"
        return identity.name if isinstance(identity, Identity) else identity

    return authenticate_by_hook


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

    @any_request_id
    @web.middleware
    async def authorize_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        method, target = call.method, call.target
        is_short = len(target.path) + len(target.query) <= CACHED_LENGTH_MAX
        is_token = check_cached(method, target) if is_short else check(method, target)
        grant = request.get(KEY_GRANT)
        if grant is not None and (own_policy := key_policy(grant)) is not None:
            is_token |= check_key_endpoints(own_policy, method, target)
            if is_token:
                call = await restrict_token(call, own_policy)
        if is_token:
            call = request[CALL] = await restrict_token(call, policy)
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
