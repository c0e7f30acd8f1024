"""Outputs re-hosted: what a result names at fal is stored, and the result names it there."""

import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.file_urls import URL_KEY
from falproxy.fal.target import Operation
from falproxy.proxy.call import CALL, REHOST_STATUS, RESULT_CACHED
from falproxy.proxy.forward import DOCUMENT_MAX, JSON_TYPE, RelayedResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.local_responses import LocalDocument
from falproxy.proxy.upstream import NO_RETRY_HEADERS
from falproxy.spool import SpoolQuota
from falproxy.stores.files.rehosting import Rehoster, RehostStatus, status_header

REHOST_HEADER = "x-falproxy-rehost"
RESULT_OPERATIONS = (Operation.RUN, Operation.RESULT, Operation.STREAM)
DIRECT_OPERATIONS = (Operation.RUN, Operation.STREAM)
UNSTORED_STATUSES = (RehostStatus.FAILED, RehostStatus.PENDING)
EVENT_STREAM = "text/event-stream"
SMALL_DOCUMENT_MAX = 256 * 2**10  # bytes of a document that is held without asking
LARGE_DOCUMENTS_MAX = 32 * DOCUMENT_MAX
RETRY_AFTER = {"Retry-After": "5"}


@dataclass(frozen=True, slots=True)
class RehostConfig:
    """What is done with results. here: the proxy's own address, as a request's client sees it.
    is_strict: whether a result is refused rather than given out with an address of fal's. room:
    for large documents, all together."""

    rehoster: Rehoster
    base_url: Callable[[web.Request], str]
    is_strict: bool
    quota: SpoolQuota = field(default_factory=partial(SpoolQuota, LARGE_DOCUMENTS_MAX))


def rehost_outputs(rehosting: RehostConfig) -> Middleware:
    """Middleware: results name their files where we keep them. It sees all answers, those that
    the proxy gives by itself too: what could not be stored when they were made may be now."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if call.target.operation not in RESULT_OPERATIONS:
            return await handler(request)
        request[CALL] = replace(call, needs_identity=True)
        response = await handler(request)
        if response.status == web.HTTPOk.status_code:
            try:
                await rehost(request, response, rehosting)
            except BaseException:
                if isinstance(response, RelayedResponse):
                    response.discard()
                raise
        return response

    return middleware


def refuse_unstorable(rehosting: RehostConfig) -> Middleware:
    """Middleware, next to fal: while nothing can be stored, the strict policy buys no result that
    it could give to nobody, and that nobody could ask for again."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request[CALL].target.operation in DIRECT_OPERATIONS and not rehosting.rehoster.try_now():
            message = "The result's files could not be stored now."
            raise ProxyError(503, "storage_unavailable", message, RETRY_AFTER)
        return await handler(request)

    return middleware


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
    if response.is_encoded:  # though we asked for no coding
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
    rewritten, fates = await rehosting.rehoster.rewrite(document)
    if fates:
        report_statuses(request, response, fates, rehosting)
    shown = await rehosting.rehoster.localize(rewritten, rehosting.base_url(request))
    if shown != document:
        response.replace_document(shown)


async def read_document(
    response: RelayedResponse | LocalDocument, quota: SpoolQuota
) -> bytes | None:
    """The document. None: it is too large, or there are too many large ones, whose clients are
    slow to take them."""
    if isinstance(response, LocalDocument):
        return await response.document()
    document = await response.document(SMALL_DOCUMENT_MAX)
    if document is None:
        try:
            quota.reserve(DOCUMENT_MAX)
        except ProxyError:
            return None
        weakref.finalize(response, quota.release, [DOCUMENT_MAX])
        document = await response.document()
    return document


def rewrite_events(
    request: web.Request, response: RelayedResponse, rehosting: RehostConfig
) -> None:
    """A stream's events are rewritten as they pass. Its headers are out by then: with the strict
    policy the client's stream breaks off where fal's address would stand."""
    outputs, here = rehosting.rehoster, rehosting.base_url(request)

    async def rewrite(lines: bytes) -> AsyncIterator[bytes]:
        """Lines that name no files do not wait for those that do."""
        begin = 0
        while (key := lines.find(URL_KEY, begin)) >= 0:
            start = lines.rfind(b"\n", begin, key) + 1 or begin
            stop = lines.find(b"\n", key) + 1 or len(lines)
            if start > begin:
                yield lines[begin:start]
            rewritten, fates = await outputs.rewrite(lines[start:stop])
            if rehosting.is_strict:
                refuse_unstored(request, fates)
            yield await outputs.localize(rewritten, here)
            begin = stop
        yield lines[begin:]

    response.rewrite_lines(rewrite)


def report_statuses(
    request: web.Request,
    response: web.StreamResponse,
    statuses: Counter[RehostStatus],
    rehosting: RehostConfig,
) -> None:
    """Puts what became of the files on the answer, and into the log. Raises: ProxyError."""
    request[REHOST_STATUS] = status_header(statuses)
    if rehosting.is_strict:
        refuse_unstored(request, statuses)
    response.headers[REHOST_HEADER] = request[REHOST_STATUS]


def refuse_unstored(request: web.Request, statuses: Counter[RehostStatus]) -> None:
    """502, to be asked again. A direct call whose result nobody keeps is lost, and asking again
    would buy another: it gets the one answer that fal's clients do not repeat.

    Raises: ProxyError 502, 504.
    """
    if not any(statuses[fate] for fate in UNSTORED_STATUSES):
        return
    message = "The result's files could not be stored."
    headers = {REHOST_HEADER: status_header(statuses)}
    if request[CALL].target.operation is Operation.RESULT or RESULT_CACHED in request:
        raise ProxyError(502, "rehost_failed", message, headers | RETRY_AFTER)
    raise ProxyError(504, "rehost_failed", message, headers | NO_RETRY_HEADERS)
