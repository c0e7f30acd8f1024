"""Outputs re-hosted: what a result names at fal is stored, and the result names it there."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.answers import OwnDocument
from falproxy.call import CALL, IS_KEPT, REHOST
from falproxy.errors import ProxyError
from falproxy.outputs import Fate, Outputs, told
from falproxy.proxy import JSON_TYPE, UpstreamResponse
from falproxy.target import Operation
from falproxy.upstream import NO_RETRY

REHOST_HEADER = "x-falproxy-rehost"
WITH_OUTPUTS = (Operation.RUN, Operation.RESULT, Operation.STREAM)
UNSTORED = (Fate.FAILED, Fate.PENDING)
EVENTS = "text/event-stream"
RETRY = {hdrs.RETRY_AFTER: "5"}


@dataclass(frozen=True, slots=True)
class Rehosting:
    """What is done with results. here: the proxy's own address, as a request's client sees it.
    is_strict: whether a result is refused rather than given out with an address of fal's."""

    outputs: Outputs
    here: Callable[[web.Request], str]
    is_strict: bool


def rehost_outputs(rehosting: Rehosting) -> Middleware:
    """Middleware: results name their files where we keep them. It sees all answers, those that
    the proxy gives by itself too: what could not be stored when they were made may be now."""

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


async def rehost(request: web.Request, response: web.StreamResponse, rehosting: Rehosting) -> None:
    """Raises: ProxyError 502, 504."""
    if not isinstance(response, UpstreamResponse | OwnDocument):
        return
    is_stream = response.content_type == EVENTS
    if not is_stream and not JSON_TYPE.match(response.content_type):
        return
    if hdrs.CONTENT_ENCODING in response.headers:  # though we asked for none
        say(request, response, Counter([Fate.FAILED]), rehosting)
        return
    if is_stream and isinstance(response, UpstreamResponse):
        rewrite_events(request, response, rehosting)
        return
    document = await response.document()
    if document is None:
        say(request, response, Counter([Fate.TOO_LARGE]), rehosting)
        return
    rewritten, fates = await rehosting.outputs.rewrite(document)
    if fates:
        say(request, response, fates, rehosting)
    shown = await rehosting.outputs.present(rewritten, rehosting.here(request))
    if shown != document:
        response.replace_document(shown)


def rewrite_events(request: web.Request, response: UpstreamResponse, rehosting: Rehosting) -> None:
    """A stream's events are rewritten as they pass. Its headers are out by then: with the strict
    policy the client's stream breaks off where fal's address would stand."""
    here = rehosting.here(request)

    async def rewrite(lines: bytes) -> bytes:
        rewritten, fates = await rehosting.outputs.rewrite(lines)
        if rehosting.is_strict:
            refuse_unstored(request, fates)
        return await rehosting.outputs.present(rewritten, here)

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
