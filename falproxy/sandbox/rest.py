"""rest.fal.ai: tokens, announced uploads, the public key of webhooks."""

import secrets
from datetime import UTC, datetime, timedelta

from aiohttp import web

from falproxy.sandbox.authentication import CDN_APP
from falproxy.sandbox.input_validation import parse_body
from falproxy.sandbox.request import Visit
from falproxy.sandbox.responses import Answer, field_error, model_error
from falproxy.sandbox.state import Upload

TOKEN_SECONDS = 120
CDN_TOKEN_SECONDS = 3600
OCTETS = "application/octet-stream"


async def read_object(visit: Visit) -> dict[str, object]:
    """The JSON object of the body; an empty body is an empty one. Raises FalError: 422."""
    body = parse_body(await visit.request.read() or b"{}")
    if not isinstance(body, dict):
        msg = "Input should be a valid dictionary"
        raise model_error([field_error("dict_type", msg)])
    return body


async def mint(visit: Visit, seconds_key: str) -> str:
    """A token for the apps of the body. Raises FalError: 422, it names none."""
    body = await read_object(visit)
    apps = body.get("allowed_apps") or [body.get("app")]
    if not isinstance(apps, list) or not all(isinstance(app, str) and app for app in apps):
        raise model_error([field_error("missing", "Field required", ("body", "allowed_apps"))])
    seconds = body.get(seconds_key, TOKEN_SECONDS)
    if not isinstance(seconds, int | float) or seconds <= 0:
        msg = "Input should be greater than 0"
        raise model_error([field_error("greater_than", msg, ("body", seconds_key), {"gt": 0})])
    return visit.sandbox.tokens.mint(visit.account, apps, seconds)


async def tokens(visit: Visit) -> web.StreamResponse:
    """POST /tokens/ {"allowed_apps", "token_expiration"}: the token as a bare JSON string."""
    return Answer(200, await mint(visit, "token_expiration")).response()


async def realtime_tokens(visit: Visit) -> web.StreamResponse:
    """POST /tokens/realtime {"allowed_apps", "duration"}: `{"token"}`."""
    return Answer(200, {"token": await mint(visit, "duration")}).response()


async def cdn_token(visit: Visit) -> web.StreamResponse:
    """POST /storage/auth/token: what the Python client needs to upload."""
    sandbox = visit.sandbox
    expires = datetime.now(UTC) + timedelta(seconds=CDN_TOKEN_SECONDS)
    document = {
        "token": sandbox.tokens.mint(visit.account, [CDN_APP], CDN_TOKEN_SECONDS),
        "token_type": "Bearer",
        "base_url": sandbox.public_url.rstrip("/"),
        "expires_at": expires.isoformat(),
    }
    return Answer(200, document).response()


async def initiate(visit: Visit) -> web.StreamResponse:
    """POST /storage/upload/initiate (and -multipart) {"content_type", "file_name"}: where to put
    the file, and where it can be read afterwards."""
    body = await read_object(visit)
    sandbox = visit.sandbox
    key = sandbox.files.new_key(str(body.get("file_name") or "file"))
    upload = Upload(key, str(body.get("content_type") or OCTETS), secrets.token_hex(16))
    name = secrets.token_hex(16)
    sandbox.uploads[name] = upload
    upload_url = f"{sandbox.public_url.rstrip('/')}/upload/{name}?signature={upload.secret}"
    return Answer(200, {"upload_url": upload_url, "file_url": sandbox.file_url(key)}).response()


async def jwks(visit: Visit) -> web.StreamResponse:
    return Answer(200, visit.sandbox.signer.jwks()).response()
