"""Responses with objects: conditions, ranges and headers."""

import re
from email.utils import format_datetime
from urllib.parse import quote

from aiohttp import web

from tests.support.fake_supabase.errors import NO_RANGE, Refusal
from tests.support.fake_supabase.store import Object

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def serve(request: web.Request, found: Object, *, is_signed: bool = False) -> web.Response:
    """Raises: Refusal."""
    headers = {
        "ETag": found.etag,
        "Last-Modified": format_datetime(found.updated, usegmt=True),
        "Accept-Ranges": "bytes",
        "X-Robots-Tag": "none",
    }
    if not is_signed:
        headers["Cache-Control"] = found.cache_control
    if request.headers.get("If-None-Match") == found.etag:
        return web.Response(status=304, headers=headers)
    if "download" in request.query:
        headers["Content-Disposition"] = disposition(request.query["download"])
    start, stop = part_of(request.headers.get("Range"), len(found.content))
    is_whole = "Range" not in request.headers
    if not is_whole:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(found.content)}"
    headers["Content-Type"] = shown_type(found.content_type)
    body = found.content[start:stop]
    if request.method == "HEAD":
        headers["Content-Length"] = str(len(body))
        body = b""
    return web.Response(status=200 if is_whole else 206, headers=headers, body=body)


def shown_type(content_type: str) -> str:
    """Return the content type; HTML becomes plain text."""
    return content_type.replace("text/html", "text/plain")


def disposition(name: str) -> str:
    if not name:
        return "attachment;"
    return f"attachment; filename={quote(name)}; filename*=UTF-8''{quote(name)};"


def part_of(given: str | None, size: int) -> tuple[int, int]:
    """Return the start and the end of the requested range. Raises: Refusal."""
    match = RANGE.fullmatch(given or "bytes=0-")
    if match is None:
        return 0, size
    first, last = match.groups()
    if not first:
        return max(0, size - int(last or 0)), size
    start, stop = int(first), min(size, int(last) + 1 if last else size)
    if given is not None and start >= size:
        raise Refusal(NO_RANGE)
    return start, stop
