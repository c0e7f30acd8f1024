"""The CDN: serves files to any origin, and accepts the uploads of fal's clients."""

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import IO
from urllib.parse import parse_qs

from aiohttp import web

from falproxy.sandbox.authentication import check_cdn_token, secrets_equal
from falproxy.sandbox.files import FileStore
from falproxy.sandbox.input_validation import parse_body
from falproxy.sandbox.request import FalRequest
from falproxy.sandbox.responses import FalResponse, detail_error
from falproxy.sandbox.rest import DEFAULT_CONTENT_TYPE
from falproxy.sandbox.state import PendingUpload

UPLOAD_MAX = 200 * 2**20  # bytes
TOO_LARGE = f"File is larger than {UPLOAD_MAX} bytes"
SPOOL_MEMORY = 4 * 2**20  # bytes of an upload held in memory before it is spooled to disk
CHUNK = 2**18


async def serve_file(request: FalRequest) -> web.StreamResponse:
    """GET and HEAD /files/b/<prefix>/<name>, with range support."""
    file = request.sandbox.files.get(request.path_params["key"])
    if file is None:
        raise detail_error(404, "File not found")
    headers = {
        "Content-Type": file.content_type,
        "Cache-Control": "public, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
        # Any client can upload HTML. It must not run in an origin that the CDN shares with a page.
        # The media are those of the document that a browser makes of a video.
        "Content-Security-Policy": "sandbox; default-src 'none'; media-src 'self'",
    }
    return web.FileResponse(file.path, headers=headers)


@asynccontextmanager
async def spooled_body(request: web.Request) -> AsyncIterator[IO[bytes]]:
    """Receive the body into memory, or to disk if it is large.

    Raises:
        FalError: 413 if it is larger than UPLOAD_MAX.
    """
    with tempfile.SpooledTemporaryFile(SPOOL_MEMORY) as spool:
        async for chunk in request.content.iter_chunked(CHUNK):
            if spool.tell() + len(chunk) > UPLOAD_MAX:
                raise detail_error(413, TOO_LARGE)
            spool.write(chunk)
        spool.seek(0)
        yield spool


async def store_body(request: FalRequest, key: str, content_type: str) -> str:
    """Store the request's body as a file and return its URL."""
    files = request.sandbox.files
    async with spooled_body(request.http_request) as content:
        await asyncio.to_thread(files.put, key, content, content_type)
    return request.sandbox.file_url(key)


def find_upload(request: FalRequest) -> PendingUpload:
    """Return the upload in the path.

    Raises:
        FalError: 404 if there is none; 403 if the URL's signature is wrong; 401 if the URL has
            none and the upload token is bad.
    """
    upload = request.sandbox.uploads.get(request.path_params["upload"])
    if upload is None:
        raise detail_error(404, "Upload not found")
    if "key" in request.path_params:
        check_cdn_token(request)
        return upload
    signature = parse_qs(request.target.query).get("signature", [""])[0]
    if not secrets_equal(signature, upload.secret):
        raise detail_error(403, "The signature of the upload URL is wrong")
    return upload


async def put_upload(request: FalRequest) -> web.StreamResponse:
    """PUT of an `upload_url`: the complete file."""
    upload = find_upload(request)
    headers = request.http_request.headers
    await store_body(request, upload.key, headers.get("Content-Type", upload.content_type))
    return web.Response()


async def put_part(request: FalRequest) -> web.StreamResponse:
    """PUT of one part, by the signed URL (JavaScript) or with a token (Python)."""
    find_upload(request)
    number = int(request.path_params["number"])
    async with spooled_body(request.http_request) as content:
        put = request.sandbox.files.put_part
        etag = await asyncio.to_thread(put, request.path_params["upload"], number, content)
    headers = {"ETag": f'"{etag}"'}
    return FalResponse(200, {"partNumber": number, "etag": etag}, headers).to_web_response()


async def complete_upload(request: FalRequest) -> web.StreamResponse:
    """POST {"parts": [{"partNumber", "etag"}]}: join the parts to one file."""
    sandbox = request.sandbox
    upload = find_upload(request)
    body = parse_body(await request.http_request.read())
    parts = body.get("parts") if isinstance(body, dict) else None
    try:
        numbers = [int(part["partNumber"]) for part in parts or ()]
    except (KeyError, TypeError, ValueError):
        raise detail_error(400, "Parts must have a partNumber and an etag") from None
    name = request.path_params["upload"]
    try:
        await asyncio.to_thread(join_parts, sandbox.files, name, numbers, upload)
    except OSError:
        raise detail_error(400, "A part was never uploaded") from None
    del sandbox.uploads[name]
    return FalResponse(200, {"access_url": sandbox.file_url(upload.key)}).to_web_response()


def join_parts(files: FileStore, name: str, numbers: list[int], upload: PendingUpload) -> None:
    """Create the upload's file from its parts. Blocks: call it in a thread.

    Raises:
        FalError: 413 if the parts together are larger than UPLOAD_MAX.
        OSError: a part is missing.
    """
    if files.parts_size(name, numbers) > UPLOAD_MAX:
        raise detail_error(413, TOO_LARGE)
    files.join_parts(name, numbers, upload.key, upload.content_type)


async def upload_file(request: FalRequest) -> web.StreamResponse:
    """POST /files/upload with a token: `{"access_url"}` (fal_client)."""
    check_cdn_token(request)
    headers = request.http_request.headers
    key = request.sandbox.files.new_key(headers.get("X-Fal-File-Name", "file"))
    url = await store_body(request, key, headers.get("Content-Type", DEFAULT_CONTENT_TYPE))
    return FalResponse(200, {"access_url": url}).to_web_response()


async def start_multipart_upload(request: FalRequest) -> web.StreamResponse:
    """POST /files/upload/multipart with a token: `{"access_url", "uploadId"}` (fal_client)."""
    check_cdn_token(request)
    sandbox, headers = request.sandbox, request.http_request.headers
    key = sandbox.files.new_key(headers.get("X-Fal-File-Name", "file"))
    name = secrets.token_hex(16)
    content_type = headers.get("Content-Type", DEFAULT_CONTENT_TYPE)
    sandbox.uploads[name] = PendingUpload(key, content_type, secrets.token_hex(16))
    document = {"access_url": sandbox.file_url(key), "uploadId": name}
    return FalResponse(200, document).to_web_response()
