"""Outputs re-hosted: what a result names at fal is stored, and the result names it there."""

import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.file_urls import KEY
from falproxy.fal.target import Operation
from falproxy.proxy.call import CALL, IS_KEPT, REHOST
from falproxy.proxy.forward import DOCUMENT_MAX, JSON_TYPE, UpstreamResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.local_responses import OwnDocument
from falproxy.proxy.upstream import NO_RETRY
from falproxy.spool import Room
from falproxy.stores.files.rehosting import Fate, Outputs, told

REHOST_HEADER = "x-falproxy-rehost"
WITH_OUTPUTS = (Operation.RUN, Operation.RESULT, Operation.STREAM)
DIRECT = (Operation.RUN, Operation.STREAM)
UNSTORED = (Fate.FAILED, Fate.PENDING)
EVENTS = "text/event-stream"
SMALL = 256 * 2**10  # bytes of a document that is held without asking
LARGE_MAX = 32 * DOCUMENT_MAX
RETRY = {"Retry-After": "5"}


@dataclass(frozen=True, slots=True)
class Rehosting:
    """What is done with results. here: the proxy's own address, as a request's client sees it.
    is_strict: whether a result is refused rather than given out with an address of fal's. room:
    for large documents, all together."""

    outputs: Outputs
    here: Callable[[web.Request], str]
    is_strict: bool
    room: Room = field(default_factory=partial(Room, LARGE_MAX))


def rehost_outputs(rehosting: Rehosting) -> Middleware:
    """Middleware: results name their files where we keep them. It sees all answers, those that
    the proxy gives by itself too: what could not be stored when they were made may be now."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if call.target.operation not in WITH_OUTPUTS:
            return await handler(request)
        request[CALL] = replace(call, is_document=True)
        response = await handler(request)
        if response.status == web.HTTPOk.status_code:
            try:
                await rehost(request, response, rehosting)
            except BaseException:
                if isinstance(response, UpstreamResponse):
                    response.drop()
                raise
        return response

    return middleware


def refuse_unstorable(rehosting: Rehosting) -> Middleware:
    """Middleware, next to fal: while nothing can be stored, the strict policy buys no result that
    it could give to nobody, and that nobody could ask for again."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request[CALL].target.operation in DIRECT and not rehosting.outputs.try_now():
            message = "The result's files could not be stored now."
            raise ProxyError(503, "storage_unavailable", message, RETRY)
        return await handler(request)

    return middleware


async def rehost(request: web.Request, response: web.StreamResponse, rehosting: Rehosting) -> None:
    """Raises: ProxyError 502, 504."""
    if isinstance(response, OwnDocument):
        await rehost_document(request, response, rehosting)
        return
    if not isinstance(response, UpstreamResponse):
        return
    is_stream = response.content_type == EVENTS
    if not is_stream and not JSON_TYPE.match(response.content_type):
        return
    if response.is_coded:  # though we asked for no coding
        say(request, response, Counter([Fate.FAILED]), rehosting)
    elif is_stream:
        rewrite_events(request, response, rehosting)
    else:
        await rehost_document(request, response, rehosting)


async def rehost_document(
    request: web.Request, response: UpstreamResponse | OwnDocument, rehosting: Rehosting
) -> None:
    """Raises: ProxyError 502, 504."""
    document = await held(response, rehosting.room)
    if document is None:
        say(request, response, Counter([Fate.TOO_LARGE]), rehosting)
        return
    rewritten, fates = await rehosting.outputs.rewrite(document)
    if fates:
        say(request, response, fates, rehosting)
    shown = await rehosting.outputs.present(rewritten, rehosting.here(request))
    if shown != document:
        response.replace_document(shown)


async def held(response: UpstreamResponse | OwnDocument, room: Room) -> bytes | None:
    """The document. None: it is too large, or there are too many large ones, whose clients are
    slow to take them."""
    if isinstance(response, OwnDocument):
        return await response.document()
    document = await response.document(SMALL)
    if document is None:
        try:
            room.take(DOCUMENT_MAX)
        except ProxyError:
            return None
        weakref.finalize(response, room.give_back, [DOCUMENT_MAX])
        document = await response.document()
    return document


def rewrite_events(request: web.Request, response: UpstreamResponse, rehosting: Rehosting) -> None:
    """A stream's events are rewritten as they pass. Its headers are out by then: with the strict
    policy the client's stream breaks off where fal's address would stand."""
    outputs, here = rehosting.outputs, rehosting.here(request)

    async def rewrite(lines: bytes) -> AsyncIterator[bytes]:
        """Lines that name no files do not wait for those that do."""
        begin = 0
        while (key := lines.find(KEY, begin)) >= 0:
            start = lines.rfind(b"\n", begin, key) + 1 or begin
            stop = lines.find(b"\n", key) + 1 or len(lines)
            if start > begin:
                yield lines[begin:start]
            rewritten, fates = await outputs.rewrite(lines[start:stop])
            if rehosting.is_strict:
                refuse_unstored(request, fates)
            yield await outputs.present(rewritten, here)
            begin = stop
        yield lines[begin:]

    response.rewrite_lines(rewrite)


def say(
    request: web.Request,
    response: web.StreamResponse,
    fates: Counter[Fate],
    rehosting: Rehosting,
) -> None:
    """Puts what became of the files on the answer, and into the log. Raises: ProxyError."""
    request[REHOST] = told(fates)
    if rehosting.is_strict:
        refuse_unstored(request, fates)
    response.headers[REHOST_HEADER] = request[REHOST]


def refuse_unstored(request: web.Request, fates: Counter[Fate]) -> None:
    """502, to be asked again. A direct call whose result nobody keeps is lost, and asking again
    would buy another: it gets the one answer that fal's clients do not repeat.

    Raises: ProxyError 502, 504.
    """
    if not any(fates[fate] for fate in UNSTORED):
        return
    message = "The result's files could not be stored."
    headers = {REHOST_HEADER: told(fates)}
    if request[CALL].target.operation is Operation.RESULT or IS_KEPT in request:
        raise ProxyError(502, "rehost_failed", message, headers | RETRY)
    raise ProxyError(504, "rehost_failed", message, headers | NO_RETRY)
