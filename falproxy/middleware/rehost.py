"""Middleware that re-hosts outputs: stores the files that a result names, and rewrites its URLs."""

import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError, TemporaryError
from falproxy.fal.file_urls import URL_KEY
from falproxy.fal.target import Operation
from falproxy.proxy.call import CALL, REHOST_STATUS, REPEAT_IS_FREE, STORED_SECONDS
from falproxy.proxy.forward import DOCUMENT_MAX, JSON_TYPE, RelayedResponse
from falproxy.proxy.head_only import NEEDS_EVERY_REQUEST, any_request_id
from falproxy.proxy.local_responses import LocalDocument
from falproxy.proxy.upstream import NO_RETRY_HEADERS
from falproxy.spool import SpoolQuota
from falproxy.stores.files.inputs import InputStore
from falproxy.stores.files.rehosting import Rehoster, RehostStatus, status_header

REHOST_HEADER = "x-falproxy-rehost"
RESULT_OPERATIONS = (Operation.RUN, Operation.RESULT, Operation.STREAM)
DIRECT_OPERATIONS = (Operation.RUN, Operation.STREAM)
UNSTORED_STATUSES = (RehostStatus.FAILED, RehostStatus.PENDING)
EVENT_STREAM = "text/event-stream"
SMALL_DOCUMENT_MAX = 256 * 2**10  # bytes of a document that is held without the quota
LARGE_DOCUMENTS_MAX = 32 * DOCUMENT_MAX
RETRY_AFTER = {"Retry-After": "5"}


@dataclass(frozen=True, slots=True)
class RehostConfig:
    """How results are re-hosted.

    base_url: Returns the URL of the proxy as the client of a request sees it.
    is_strict: refuse a result instead of sending it with fal's URLs.
    inputs: stores the inputs of calls; None if they are not stored.
    quota: for all large documents together.
    """

    rehoster: Rehoster
    base_url: Callable[[web.Request], str]
    is_strict: bool
    inputs: InputStore | None = None
    quota: SpoolQuota = field(default_factory=partial(SpoolQuota, LARGE_DOCUMENTS_MAX))


# Large documents that the quota counts already; several layers read them.
RESERVED: weakref.WeakSet[RelayedResponse] = weakref.WeakSet()


def rehost_outputs(rehosting: RehostConfig) -> Middleware:
    """Return the middleware that rewrites results. It handles cached results as well, whose files
    may have failed to be stored before."""

    @any_request_id
    @web.middleware
    async def rehost_outputs_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        call = request[CALL]
        if call.target.operation not in RESULT_OPERATIONS:
            return await handler(request)
        request[CALL] = replace(call, needs_identity=True)
        request[NEEDS_EVERY_REQUEST] = "rehost_outputs"
        response = await handler(request)
        if response.status == web.HTTPOk.status_code:
            try:
                await rehost(request, response, rehosting)
            except BaseException:
                if isinstance(response, RelayedResponse):
                    response.discard()
                raise
        return response

    return rehost_outputs_middleware


def refuse_unstorable(rehosting: RehostConfig) -> Middleware:
    """Return the innermost middleware of the strict policy. While the storage is down it refuses
    direct calls, whose results would be paid for but could neither be sent nor be fetched later."""

    @any_request_id
    @web.middleware
    async def refuse_unstorable_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        if request[CALL].target.operation in DIRECT_OPERATIONS and not rehosting.rehoster.try_now():
            message = "The result's files could not be stored now."
            raise TemporaryError(503, "storage_unavailable", message, RETRY_AFTER)
        return await handler(request)

    return refuse_unstorable_middleware


async def rehost(
    request: web.Request, response: web.StreamResponse, rehosting: RehostConfig
) -> None:
    """Raises: ProxyError 502, 504."""
    if isinstance(response, LocalDocument):
        await rehost_document(request, response, rehosting)
        return
    if not isinstance(response, RelayedResponse):
        return
    is_stream = response.content_type == EVENT_STREAM
    if not is_stream and not JSON_TYPE.match(response.content_type):
        return
    if response.is_encoded:  # although the request was for `identity`
        report_statuses(request, response, Counter([RehostStatus.FAILED]), rehosting)
    elif is_stream:
        rewrite_events(request, response, rehosting)
    else:
        await rehost_document(request, response, rehosting)


async def rehost_document(
    request: web.Request, response: RelayedResponse | LocalDocument, rehosting: RehostConfig
) -> None:
    """Raises: ProxyError 502, 504."""
    document = await read_document(response, rehosting.quota)
    if document is None:
        report_statuses(request, response, Counter([RehostStatus.TOO_LARGE]), rehosting)
        return
    started = time.perf_counter()
    rewritten, statuses = await rehosting.rehoster.rewrite(document)
    if statuses:
        request[STORED_SECONDS] = time.perf_counter() - started
        report_statuses(request, response, statuses, rehosting)
    localized = await rehosting.rehoster.localize(rewritten, rehosting.base_url(request))
    if localized != document:
        response.replace_document(localized)


async def read_document(
    response: RelayedResponse | LocalDocument, quota: SpoolQuota
) -> bytes | None:
    """Return the document, or None if it is too large or the quota for large ones is used up."""
    if isinstance(response, LocalDocument):
        return await response.document()
    document = await response.document(SMALL_DOCUMENT_MAX)
    if document is None:
        if response not in RESERVED:
            try:
                quota.reserve(DOCUMENT_MAX)
            except ProxyError:
                return None
            weakref.finalize(response, quota.release, [DOCUMENT_MAX])
            RESERVED.add(response)
        document = await response.document()
    return document


def rewrite_events(
    request: web.Request, response: RelayedResponse, rehosting: RehostConfig
) -> None:
    """Rewrite the events of a stream as they arrive. The status line has been sent by then: with
    the strict policy the connection is closed in place of an event with fal's URL."""
    rehoster, base_url = rehosting.rehoster, rehosting.base_url(request)

    async def rewrite_event_lines(lines: bytes) -> AsyncIterator[bytes]:
        """Yield lines without files at once, and those with files when these are stored."""
        offset = 0
        while (key := lines.find(URL_KEY, offset)) >= 0:
            start = lines.rfind(b"\n", offset, key) + 1 or offset
            stop = lines.find(b"\n", key) + 1 or len(lines)
            if start > offset:
                yield lines[offset:start]
            rewritten, statuses = await rehoster.rewrite(lines[start:stop])
            if rehosting.is_strict:
                refuse_unstored(request, statuses)
            yield await rehoster.localize(rewritten, base_url)
            offset = stop
        yield lines[offset:]

    response.rewrite_lines(rewrite_event_lines)


def report_statuses(
    request: web.Request,
    response: web.StreamResponse,
    statuses: Counter[RehostStatus],
    rehosting: RehostConfig,
) -> None:
    """Set the status header of a response, and the field of the log. Raises: ProxyError."""
    request[REHOST_STATUS] = status_header(statuses)
    if rehosting.is_strict:
        refuse_unstored(request, statuses)
    response.headers[REHOST_HEADER] = request[REHOST_STATUS]


def refuse_unstored(request: web.Request, statuses: Counter[RehostStatus]) -> None:
    """Raise an error if a file was not stored.

    Raises: ProxyError 502, the client may repeat the request; 504, for a direct call whose result
        is not cached: a repetition would be paid for again, and fal's clients do not repeat this
        response.
    """
    if not any(statuses[status] for status in UNSTORED_STATUSES):
        return
    message = "The result's files could not be stored."
    headers = {REHOST_HEADER: status_header(statuses)}
    if request[CALL].target.operation is Operation.RESULT or REPEAT_IS_FREE in request:
        raise TemporaryError(502, "rehost_failed", message, headers | RETRY_AFTER)
    raise ProxyError(504, "rehost_failed", message, headers | NO_RETRY_HEADERS)
