"""The CDN: files for any origin, and the ways in which fal's clients put them there."""

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import IO
from urllib.parse import parse_qs

from aiohttp import web

from falproxy.sandbox.authentication import check_cdn_token, is_same
from falproxy.sandbox.files import FileStore
from falproxy.sandbox.input_validation import parse_body
from falproxy.sandbox.request import Visit
from falproxy.sandbox.responses import Answer, plain
from falproxy.sandbox.rest import OCTETS
from falproxy.sandbox.state import Upload

UPLOAD_MAX = 200 * 2**20  # bytes
TOO_LARGE = f"File is larger than {UPLOAD_MAX} bytes"
SPOOL = 4 * 2**20  # bytes of an upload that are held in memory
CHUNK = 2**18


async def serve_file(visit: Visit) -> web.StreamResponse:
    """GET and HEAD /files/b/<prefix>/<name>, ranges included."""
    file = visit.sandbox.files.get(visit.named["key"])
    if file is None:
        raise plain(404, "File not found")
    headers = {
        "Content-Type": file.content_type,
        "Cache-Control": "public, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
        # Anybody may upload HTML: it must not run where the CDN shares an origin with a page.
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }
    return web.FileResponse(file.path, headers=headers)


@asynccontextmanager
async def received(request: web.Request) -> AsyncIterator[IO[bytes]]:
    """The body, on disk when it is large. Raises FalError: 413."""
    with tempfile.SpooledTemporaryFile(SPOOL) as spool:
        async for chunk in request.content.iter_chunked(CHUNK):
            if spool.tell() + len(chunk) > UPLOAD_MAX:
                raise plain(413, TOO_LARGE)
            spool.write(chunk)
        spool.seek(0)
        yield spool


async def store(visit: Visit, key: str, content_type: str) -> str:
    """Keep the request's body as a file and return its URL."""
    async with received(visit.request) as content:
        await asyncio.to_thread(visit.sandbox.files.put, key, content, content_type)
    return visit.sandbox.file_url(key)


def content_type_of(visit: Visit) -> str:
    return visit.request.headers.get("Content-Type", OCTETS)


def announced(visit: Visit) -> Upload:
    """The upload that the path names. Raises FalError: 404; 403, its URL is not the signed one
    or the token is missing."""
    upload = visit.sandbox.uploads.get(visit.named["upload"])
    if upload is None:
        raise plain(404, "Upload not found")
    if "key" in visit.named:
        check_cdn_token(visit)
        return upload
    signature = parse_qs(visit.address.query).get("signature", [""])[0]
    if not is_same(signature, upload.secret):
        raise plain(403, "The signature of the upload URL is wrong")
    return upload


async def put_announced(visit: Visit) -> web.StreamResponse:
    """PUT of an `upload_url`: the whole file."""
    upload = announced(visit)
    await store(visit, upload.key, visit.request.headers.get("Content-Type", upload.content_type))
    return web.Response()


async def put_part(visit: Visit) -> web.StreamResponse:
    """PUT of one part, by the signed URL (JavaScript) or with a token (Python)."""
    announced(visit)
    number = int(visit.named["number"])
    async with received(visit.request) as content:
        files = visit.sandbox.files
        etag = await asyncio.to_thread(files.put_part, visit.named["upload"], number, content)
    return Answer(200, {"partNumber": number, "etag": etag}, {"ETag": f'"{etag}"'}).response()


async def complete(visit: Visit) -> web.StreamResponse:
    """POST {"parts": [{"partNumber", "etag"}]}: the parts become one file."""
    upload = announced(visit)
    body = parse_body(await visit.request.read())
    parts = body.get("parts") if isinstance(body, dict) else None
    try:
        numbers = [int(part["partNumber"]) for part in parts or ()]
    except (KeyError, TypeError, ValueError):
        raise plain(400, "Parts must have a partNumber and an etag") from None
    name = visit.named["upload"]
    try:
        await asyncio.to_thread(join, visit.sandbox.files, name, numbers, upload)
    except OSError:
        raise plain(400, "A part was never uploaded") from None
    del visit.sandbox.uploads[name]
    return Answer(200, {"access_url": visit.sandbox.file_url(upload.key)}).response()


def join(files: FileStore, name: str, numbers: list[int], upload: Upload) -> None:
    """Make the announced file of its parts. Raises FalError: 413; OSError: a part is missing."""
    if files.parts_size(name, numbers) > UPLOAD_MAX:
        raise plain(413, TOO_LARGE)
    files.join(name, numbers, upload.key, upload.content_type)


async def upload(visit: Visit) -> web.StreamResponse:
    """POST /files/upload with a token: `{"access_url"}` (fal_client)."""
    check_cdn_token(visit)
    key = visit.sandbox.files.new_key(visit.request.headers.get("X-Fal-File-Name", "file"))
    return Answer(200, {"access_url": await store(visit, key, content_type_of(visit))}).response()


async def upload_parts(visit: Visit) -> web.StreamResponse:
    """POST /files/upload/multipart with a token: `{"access_url", "uploadId"}` (fal_client)."""
    check_cdn_token(visit)
    sandbox = visit.sandbox
    key = sandbox.files.new_key(visit.request.headers.get("X-Fal-File-Name", "file"))
    name = secrets.token_hex(16)
    sandbox.uploads[name] = Upload(key, content_type_of(visit), secrets.token_hex(16))
    return Answer(200, {"access_url": sandbox.file_url(key), "uploadId": name}).response()
