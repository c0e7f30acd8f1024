"""Answers in fal's terms that did not come from fal just now."""

import json
import time
from collections.abc import AsyncIterable, Mapping

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

from falproxy.proxy.line_rewriter import Rewrite, rewritten
from falproxy.stores.cache import Failure, Result

CACHE_STATUS = "Cache-Status"
# What a failure says beside its body, to all who wait for it.
SHARED_HEADERS = (
    "retry-after", "x-fal-error-type", "x-fal-needs-retry", "x-fal-request-id",
    "x-fal-request-timeout-type", "x-fal-retryable",
)  # fmt: skip
REQUEST_ID = "x-fal-request-id"
# How a request ended that is cancelled, and one whose call died with the process that made it.
CANCELLED = Failure(
    499,
    "application/json",
    b'{"detail": "Request was cancelled by the client.", "error_type": "client_cancelled"}',
)
LOST = Failure(
    503,
    "application/json",
    b'{"detail": "The call that this request waited for is lost.", '
    b'"error_type": "runner_disconnected"}',
)


def own_document(
    document: Mapping[str, object], request_id: str, status: int = 200
) -> "OwnDocument":
    body = json.dumps(document).encode()
    return OwnDocument(
        body=body,
        status=status,
        content_type="application/json",
        headers={REQUEST_ID: request_id},
    )


def addresses(app: str, request_id: str) -> dict[str, str]:
    """The URLs of a queued request, as fal's documents name them (fal-api.md, 2.1)."""
    root = f"https://queue.fal.run/{app}/requests/{request_id}"
    return {"response_url": root, "status_url": f"{root}/status", "cancel_url": f"{root}/cancel"}


def submitted(app: str, request_id: str) -> "OwnDocument":
    """As fal answers a submit (fal-api.md, 2.1)."""
    document = {"status": "IN_QUEUE", "request_id": request_id, "queue_position": 0}
    return own_document(document | addresses(app, request_id), request_id)


class OwnDocument(web.Response):
    """A JSON document. What middleware does with fal's documents it can do with this one."""

    async def document(self) -> bytes | None:
        return bytes(self.body) if isinstance(self.body, bytes) else None

    def replace_document(self, body: bytes) -> None:
        self.body = body


class OwnEvents(web.StreamResponse):
    """A stream of events, as a status stream's. They are made while they are sent."""

    def __init__(self, events: AsyncIterable[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        self.content_type = "text/event-stream"
        self._events = events
        self._rewrites: list[Rewrite] = []

    def rewrite_lines(self, rewrite: Rewrite) -> None:
        self._rewrites.append(rewrite)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if self.prepared:
            return await super().prepare(request)
        if request.version < HttpVersion11:
            self.force_close()  # such a client knows the end of the stream by this alone
        writer = await super().prepare(request)
        async for event in self._events:
            changed = [piece async for piece in rewritten(event, self._rewrites)]
            await self.write(b"data: " + b"".join(changed) + b"\n\n")
        await self.write_eof()
        return writer


def told(result: Result, request_id: str) -> OwnDocument:
    """A kept result as the model's answer."""
    headers = {hdrs.CONTENT_TYPE: result.content_type, REQUEST_ID: request_id}
    return OwnDocument(body=result.body, headers=headers)


def failure_of(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """An answer of fal's that is not kept, for those who wait for it."""
    content_type = headers.get(hdrs.CONTENT_TYPE, "application/octet-stream")
    said = tuple((name, headers[name]) for name in SHARED_HEADERS if name in headers)
    return Failure(status, content_type, body, said)


def retold(failure: Failure, request_id: str) -> OwnDocument:
    """A failure that others waited for as well. What was not fal's own word has no request id:
    fal's clients know it by that."""
    headers = CIMultiDict(failure.headers)
    headers[hdrs.CONTENT_TYPE] = failure.content_type
    if REQUEST_ID in headers:
        headers[REQUEST_ID] = request_id
    return OwnDocument(body=failure.body, status=failure.status, headers=headers)


def mark_hit(response: web.StreamResponse, result: Result) -> web.StreamResponse:
    """Says that an answer was kept, and for how long it will be (RFC 9211, RFC 9111 §5.1)."""
    now = time.time()
    ttl, age = result.expires_at - now, now - result.stored_at
    response.headers[CACHE_STATUS] = f"falproxy; hit; ttl={int(ttl)}"
    response.headers[hdrs.AGE] = str(max(0, int(age)))
    return response
