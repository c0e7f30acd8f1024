"""Authentication by keys that are made at run time, and the endpoints that such a key may call."""

import logging

from aiohttp import hdrs, web

from falproxy.errors import ProxyError, TemporaryError
from falproxy.fal.policy import (
    QUEUE_METHODS,
    REST_HOSTS,
    TOKEN_PATHS,
    Globs,
    Policy,
    check_live_request,
    forbidden,
    is_model_call,
    normalized_path,
)
from falproxy.fal.target import LIVE_HOST, LIVE_PATHS, Target
from falproxy.limit_settings import NO_CALLER_LIMITS
from falproxy.proxy.call import CALLER_LIMITS, GRANT, KEY_GRANT, REQUEST_ID
from falproxy.proxy.client_address import client_address
from falproxy.stores.keys import KeyStoreError, is_secret
from falproxy.stores.keys.known_keys import MANAGED_KEY_METHOD, KeyGrant, KnownKeys

logger = logging.getLogger(__name__)

RETRY_AFTER = "2"  # seconds
MODEL_DOMAIN = "fal.run"


async def find_grant(
    request: web.Request, secret: str | None, known_keys: KnownKeys, *, may_ask_store: bool
) -> KeyGrant | None:
    """Return the valid grant of a request's credential; None if it is no such key, or if it is not
    known and the store may not be asked.

    Raises: ProxyError 401, the key has ended; 503, it cannot be checked now.
    """
    if secret is None or not is_secret(secret):
        return None
    grant = known_keys.get(secret)
    if grant is None or not (grant.has_ended or grant.is_valid()):
        if not may_ask_store:
            return None
        try:
            grant = await known_keys.find(secret)
        except KeyStoreError as error:
            raise TemporaryError(
                503, "access_unavailable", "Keys cannot be checked now.",
                {hdrs.RETRY_AFTER: RETRY_AFTER},
            ) from error  # fmt: skip
    if grant is None or grant.use():
        return grant
    log_ended_key(request, grant)
    raise key_ended(grant)


def key_ended(grant: KeyGrant) -> ProxyError:
    """Return the error for a key that was valid. It is no guess, and clients may repeat it for
    long: it does not count as one."""
    key = grant.key
    if key.revoked_at is not None:
        reason = "was revoked"
    elif grant.is_key_expired:
        reason = "has expired"
    else:
        reason = "was replaced by another secret"
    return ProxyError(
        401,
        "unauthenticated",
        f"This access key {reason}. Ask for a new one.",
        {hdrs.WWW_AUTHENTICATE: 'Bearer error="invalid_token"'},
    )


def log_ended_key(request: web.Request, grant: KeyGrant) -> None:
    if grant.should_log():
        fields = {
            "request_id": request.get(REQUEST_ID),
            "client": client_address(request),
            "principal": grant.key.name,
        }
        logger.warning("A key that has ended is still used", extra={"fields": fields})


def bind_grant(request: web.Request, grant: KeyGrant) -> None:
    """Attach the rights of a key to a request."""
    request[KEY_GRANT] = request[GRANT] = grant
    if grant.key.limits != NO_CALLER_LIMITS:
        request[CALLER_LIMITS] = grant.key.limits


def owner_of(grant: KeyGrant) -> str:
    """Return the owner of the jobs of a key. A later key of the same name is another owner."""
    return f"{MANAGED_KEY_METHOD}:{grant.key.id}"


def key_policy(grant: KeyGrant) -> Policy | None:
    """Return the policy for the endpoints of a key; None if it may call all that the proxy
    allows."""
    return None if grant.endpoints is None else Policy(grant.endpoints, NO_TARGETS)


NO_TARGETS = Globs(())


def check_key_endpoints(policy: Policy, method: str, target: Target) -> bool:
    """Check a call by the endpoints of a key, whatever FALPROXY_ALLOWED_TARGETS lists. Return
    whether it requests a token, whose apps are checked as well.

    Raises: ProxyError 403 `target_forbidden`.
    """
    if target.host in REST_HOSTS and normalized_path(target) in TOKEN_PATHS:
        if target.is_ambiguous or method != hdrs.METH_POST:
            raise forbidden("a token is requested with POST")
        return policy.is_token_request(method, target)
    if not target.host.endswith(MODEL_DOMAIN):
        return False
    if target.host == LIVE_HOST and target.operation in LIVE_PATHS.values():
        check_live_request(method, target)
        return False  # the body names the endpoint, or a session whose opening was checked
    if not is_model_call(method, target):
        if QUEUE_METHODS.get(target.operation) == method and not target.is_ambiguous:
            return False  # the submit was checked
        raise forbidden("the key is restricted to endpoints")
    if target.is_ambiguous:
        raise forbidden("its path is not in plain form")
    policy.check_path(normalized_path(target).strip("/"))
    return False
