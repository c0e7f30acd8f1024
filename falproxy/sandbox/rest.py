"""rest.fal.ai: tokens, initiated uploads, and the public key of webhooks."""

import secrets
from datetime import UTC, datetime, timedelta

from aiohttp import web

from falproxy.sandbox.authentication import CDN_APP
from falproxy.sandbox.input_validation import parse_body
from falproxy.sandbox.request import FalRequest
from falproxy.sandbox.responses import FalResponse, error_detail, model_error
from falproxy.sandbox.state import PendingUpload

TOKEN_SECONDS = 120  # default lifetime
CDN_TOKEN_SECONDS = 3600
DEFAULT_CONTENT_TYPE = "application/octet-stream"


async def read_object(request: FalRequest) -> dict[str, object]:
    """Return the JSON object in the body, an empty one for an empty body.

    Raises:
        FalError: 422 if the body is not a JSON object.
    """
    body = parse_body(await request.http_request.read() or b"{}")
    if not isinstance(body, dict):
        msg = "Input should be a valid dictionary"
        raise model_error([error_detail("dict_type", msg)])
    return body


async def issue_token(request: FalRequest, seconds_key: str) -> str:
    """Return a new token for the apps in the body.

    seconds_key: name of the body's field with the lifetime.

    Raises:
        FalError: 422 if the body has no app or a bad lifetime.
    """
    body = await read_object(request)
    apps = body.get("allowed_apps") or [body.get("app")]
    if not isinstance(apps, list) or not all(isinstance(app, str) and app for app in apps):
        raise model_error([error_detail("missing", "Field required", ("body", "allowed_apps"))])
    seconds = body.get(seconds_key, TOKEN_SECONDS)
    if not isinstance(seconds, int | float) or seconds <= 0:
        msg = "Input should be greater than 0"
        raise model_error([error_detail("greater_than", msg, ("body", seconds_key), {"gt": 0})])
    return request.sandbox.tokens.issue(request.account, apps, seconds)


async def create_token(request: FalRequest) -> web.StreamResponse:
    """POST /tokens/ {"allowed_apps", "token_expiration"}: the token as a bare JSON string."""
    token = await issue_token(request, "token_expiration")
    return FalResponse(200, token).to_web_response()


async def create_realtime_token(request: FalRequest) -> web.StreamResponse:
    """POST /tokens/realtime {"allowed_apps", "duration"}: `{"token"}`."""
    token = await issue_token(request, "duration")
    return FalResponse(200, {"token": token}).to_web_response()


async def create_cdn_token(request: FalRequest) -> web.StreamResponse:
    """POST /storage/auth/token: the upload token of the Python client."""
    sandbox = request.sandbox
    expires_at = datetime.now(UTC) + timedelta(seconds=CDN_TOKEN_SECONDS)
    document = {
        "token": sandbox.tokens.issue(request.account, [CDN_APP], CDN_TOKEN_SECONDS),
        "token_type": "Bearer",
        "base_url": sandbox.public_url.rstrip("/"),
        "expires_at": expires_at.isoformat(),
    }
    return FalResponse(200, document).to_web_response()


async def initiate_upload(request: FalRequest) -> web.StreamResponse:
    """POST /storage/upload/initiate (and -multipart) {"content_type", "file_name"}.

    The response has the URL to upload to and the URL of the future file.
    """
    body = await read_object(request)
    sandbox = request.sandbox
    key = sandbox.files.new_key(str(body.get("file_name") or "file"))
    content_type = str(body.get("content_type") or DEFAULT_CONTENT_TYPE)
    upload = PendingUpload(key, content_type, secrets.token_hex(16))
    name = secrets.token_hex(16)
    sandbox.uploads[name] = upload
    upload_url = f"{sandbox.public_url.rstrip('/')}/upload/{name}?signature={upload.secret}"
    document = {"upload_url": upload_url, "file_url": sandbox.file_url(key)}
    return FalResponse(200, document).to_web_response()


async def get_jwks(request: FalRequest) -> web.StreamResponse:
    return FalResponse(200, request.sandbox.signer.jwks()).to_web_response()
