"""Responses in fal's format that this proxy makes itself."""

import json
import time
from collections.abc import AsyncIterable, Mapping

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

from falproxy.proxy.forward import Rewrite, apply_rewrites
from falproxy.stores.cache import CachedResult, SharedFailure

CACHE_STATUS = "Cache-Status"
OCTET_STREAM = "application/octet-stream"
# Headers of a failed response that all clients of a shared call get.
FAILURE_HEADERS = (
    "retry-after", "x-fal-error-type", "x-fal-needs-retry", "x-fal-request-id",
    "x-fal-request-timeout-type", "x-fal-retryable",
)  # fmt: skip
FAL_REQUEST_ID = "x-fal-request-id"
# The result of a cancelled request, and of one whose process ended during the call.
CANCELLED_FAILURE = SharedFailure(
    499,
    "application/json",
    b'{"detail": "Request was cancelled by the client.", "error_type": "client_cancelled"}',
)
LOST_CALL_FAILURE = SharedFailure(
    503,
    "application/json",
    b'{"detail": "The call that this request waited for is lost.", '
    b'"error_type": "runner_disconnected"}',
)


def local_document(
    document: Mapping[str, object], request_id: str, status: int = 200
) -> "LocalDocument":
    body = json.dumps(document).encode()
    return LocalDocument(
        body=body,
        status=status,
        content_type="application/json",
        headers={FAL_REQUEST_ID: request_id},
    )


def queue_urls(app: str, request_id: str) -> dict[str, str]:
    """Return the URLs of a queued request, by their names in fal's documents (fal-api.md, 2.1)."""
    root = f"https://queue.fal.run/{app}/requests/{request_id}"
    return {"response_url": root, "status_url": f"{root}/status", "cancel_url": f"{root}/cancel"}


def submit_response(app: str, request_id: str) -> "LocalDocument":
    """Return the response to a submit (fal-api.md, 2.1)."""
    document = {"status": "IN_QUEUE", "request_id": request_id, "queue_position": 0}
    return local_document(document | queue_urls(app, request_id), request_id)


class LocalDocument(web.Response):
    """A JSON document with the same methods for middleware as `RelayedResponse`."""

    async def document(self) -> bytes | None:
        return bytes(self.body) if isinstance(self.body, bytes) else None

    def replace_document(self, body: bytes) -> None:
        self.body = body


class ReplayedResponse(LocalDocument):
    """The stored response of an earlier call with the same Idempotency-Key.

    key_mark: fingerprint of the fal key that the call was sent with; empty for the default one.
    """

    key_mark = ""


class LocalEventStream(web.StreamResponse):
    """An event stream, such as a status stream. Each event is sent as soon as it is made."""

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
            self.force_close()  # the end of the connection marks the end of the stream
        writer = await super().prepare(request)
        async for event in self._events:
            rewritten = [piece async for piece in apply_rewrites(event, self._rewrites)]
            await self.write(b"data: " + b"".join(rewritten) + b"\n\n")
        await self.write_eof()
        return writer


def result_response(result: CachedResult, request_id: str) -> LocalDocument:
    headers = {hdrs.CONTENT_TYPE: result.content_type, FAL_REQUEST_ID: request_id}
    return LocalDocument(body=result.body, headers=headers)


def shared_failure(status: int, headers: Mapping[str, str], body: bytes) -> SharedFailure:
    """Return a response of fal that is not cached, for the clients that share its call."""
    content_type = headers.get(hdrs.CONTENT_TYPE, OCTET_STREAM)
    shared_headers = tuple(
        (name, headers[name]) for name in FAILURE_HEADERS if is_storable_value(headers.get(name))
    )
    return SharedFailure(
        status,
        content_type if is_storable_value(content_type) else OCTET_STREAM,
        body,
        shared_headers,
    )


def is_storable_value(value: str | None) -> bool:
    """Return whether stores accept a header value: fal's may have bytes that are not UTF-8."""
    return value is not None and value.isascii()


def failure_response(failure: SharedFailure, request_id: str) -> LocalDocument:
    """Return the failure of a shared call to one of its clients. Only a failure that came from fal
    itself has a request id: fal's clients distinguish the two by it."""
    headers = CIMultiDict(failure.headers)
    headers[hdrs.CONTENT_TYPE] = failure.content_type
    if FAL_REQUEST_ID in headers:
        headers[FAL_REQUEST_ID] = request_id
    return LocalDocument(body=failure.body, status=failure.status, headers=headers)


def set_cache_hit(response: web.StreamResponse, result: CachedResult) -> web.StreamResponse:
    """Add the headers of a cache hit: `Cache-Status` (RFC 9211) and `Age` (RFC 9111 §5.1)."""
    now = time.time()
    ttl, age = result.expires_at - now, now - result.stored_at
    response.headers[CACHE_STATUS] = f"falproxy; hit; ttl={int(ttl)}"
    response.headers[hdrs.AGE] = str(max(0, int(age)))
    return response
