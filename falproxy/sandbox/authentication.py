"""Who is calling: fal's keys and tokens, and how each host refuses a bad one."""

import hmac
from collections.abc import Mapping
from urllib.parse import parse_qs

from aiohttp import web

from falproxy.sandbox.faults import (
    BAD_CREDENTIALS,
    CANNOT_ACCESS,
    MALFORMED,
    NO_HEADER,
    NO_USER,
)
from falproxy.sandbox.models import app_of
from falproxy.sandbox.request import PLATFORM, REST, Address, Visit
from falproxy.sandbox.responses import Answer, FalError, plain
from falproxy.sandbox.state import Sandbox

CDN_APP = "cdn"  # what an upload token is for


def authenticate(visit: Visit) -> str:
    """The account of the request's key (its id) or token.

    Raises:
        FalError: 401, in the words of the host that was asked.
    """
    named = account_of(visit.sandbox, visit.request, visit.address, visit.named)
    if named is None:
        raise refusal(visit)
    return named


def account_of(
    sandbox: Sandbox, request: web.Request, address: Address, named: Mapping[str, str]
) -> str | None:
    """Whose key or token this is; None when it is missing or wrong."""
    endpoint = named.get("endpoint", "")
    token = parse_qs(address.query).get("fal_jwt_token", [""])[0]
    if token:
        return sandbox.tokens.account(token, endpoint)
    scheme, credential = authorization(request)
    if scheme != "key" or not credential:
        return None
    if sandbox.key is not None and not is_same(credential, sandbox.key):
        return None
    return credential.partition(":")[0]


def authorization(request: web.Request) -> tuple[str, str]:
    """Scheme, in lower case, and credential of the Authorization header; empty without one."""
    scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower(), credential.strip()


def is_same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def refusal(visit: Visit) -> FalError:
    """fal's 401: each of its hosts has a wording of its own."""
    scheme, credential = authorization(visit.request)
    if visit.address.service == PLATFORM:
        error = {"type": "authorization_error", "message": NO_HEADER if not scheme else NO_USER}
        return FalError(Answer(401, {"error": error}))
    if scheme == "key" and ":" not in credential:
        return plain(401, MALFORMED)
    if visit.address.service == REST:
        return plain(401, NO_USER if scheme else NO_HEADER)
    if "id" in visit.named:
        return plain(401, BAD_CREDENTIALS)
    return plain(401, CANNOT_ACCESS.format(app_of(visit.named.get("endpoint", ""))))


def check_cdn_token(visit: Visit) -> None:
    """Uploads bring the token of `storage/auth/token`.

    Raises:
        FalError: 401, the token is missing, forged or too old.
    """
    _, credential = authorization(visit.request)
    if visit.sandbox.tokens.account(credential, CDN_APP) is None:
        raise plain(401, "Invalid or expired upload token")
