"""Server-sent events, as fal writes them: one `data:` line of JSON each, no names, no end mark."""

import json

from aiohttp import web

from falproxy.sandbox.request import Visit


async def open_events(visit: Visit, request_id: str) -> web.StreamResponse:
    """A response on which events can be written; each is sent at once."""
    headers = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
        "x-fal-request-id": request_id,
    }
    response = web.StreamResponse(headers=headers)
    await response.prepare(visit.request)
    return response


def event(document: object) -> bytes:
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n".encode()
