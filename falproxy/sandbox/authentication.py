"""Authentication: fal keys and tokens, and the 401 of each host."""

import hmac
from urllib.parse import parse_qs

from aiohttp import web

from falproxy.sandbox.faults import (
    BAD_CREDENTIALS,
    CANNOT_ACCESS,
    MALFORMED_KEY,
    NO_HEADER,
    NO_USER,
)
from falproxy.sandbox.models import app_id
from falproxy.sandbox.request import LIVE, PLATFORM, REST, FalRequest
from falproxy.sandbox.responses import FalError, FalResponse, detail_error

CDN_APP = "cdn"  # the allowed app of an upload token


def authenticate(request: FalRequest) -> str:
    """Return the account of the request's key or token.

    Raises:
        FalError: 401 in the wording of the addressed host.
    """
    account = find_account(request)
    if account is None:
        raise unauthorized_error(request)
    return account


def find_account(request: FalRequest) -> str | None:
    """Return the account of the request's key or token. None if it is missing or wrong."""
    sandbox = request.sandbox
    token = parse_qs(request.target.query).get("fal_jwt_token", [""])[0]
    if token:
        return sandbox.tokens.verify(token, request.path_params.get("endpoint", ""))
    scheme, credential = parse_authorization(request.http_request)
    if scheme != "key" or not credential:
        return None
    if sandbox.key is not None and not secrets_equal(credential, sandbox.key):
        return None
    return credential.partition(":")[0]


def parse_authorization(request: web.Request) -> tuple[str, str]:
    """Return the lower-case scheme and the credential of Authorization. Empty if it is missing."""
    scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower(), credential.strip()


def secrets_equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def unauthorized_error(request: FalRequest) -> FalError:
    """Return fal's 401. Its wording differs between hosts."""
    scheme, credential = parse_authorization(request.http_request)
    service = request.target.service
    if service == PLATFORM:
        error = {"type": "authorization_error", "message": NO_HEADER if not scheme else NO_USER}
        return FalError(FalResponse(401, {"error": error}))
    if service == LIVE:
        return FalError(FalResponse(401, {"error": "missing Authorization header"}))
    if scheme == "key" and ":" not in credential:
        return detail_error(401, MALFORMED_KEY)
    if service == REST:
        return detail_error(401, NO_USER if scheme else NO_HEADER)
    if "id" in request.path_params:
        return detail_error(401, BAD_CREDENTIALS)
    app = app_id(request.path_params.get("endpoint", ""))
    return detail_error(401, CANNOT_ACCESS.format(app))


def check_cdn_token(request: FalRequest) -> None:
    """Check the upload token, which `storage/auth/token` issues.

    Raises:
        FalError: 401 if the token is missing, forged or expired.
    """
    _, credential = parse_authorization(request.http_request)
    if request.sandbox.tokens.verify(credential, CDN_APP) is None:
        raise detail_error(401, "Invalid or expired upload token")
