"""Requests in fal's queue: whose they are, and which fal key they belong to."""

import logging
from dataclasses import replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyRing
from falproxy.fal.target import Operation
from falproxy.proxy.call import CALL, IN_TURN, OWNER
from falproxy.proxy.forward import UpstreamResponse
from falproxy.proxy.head_only import head_only
from falproxy.stores.cache.eligibility import submitted_request
from falproxy.stores.cache.virtual_ids import is_own
from falproxy.stores.ownership import SharedSubmissions, Submission, Submissions

logger = logging.getLogger(__name__)

REFUSAL_MAX = 64 * 1024  # bytes of fal's answer that may say why
LOCKED = b"User is locked"


def take_turns(ring: KeyRing) -> Middleware:
    """Middleware: every new call is sent with the next key; one that fal refuses is left alone."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request[CALL].key is None:
            request[CALL] = replace(request[CALL], key=ring.next())
            request[IN_TURN] = True
        response = await handler(request)
        key = request[CALL].key  # a request that shares a job is asked about with the job's
        if key is not None and await is_refused(response) and ring.leave_alone(key):
            logger.warning("fal refuses the key at position %d with %d: it is left alone for now",
                           key.position, response.status)  # fmt: skip
        return response

    return middleware


async def is_refused(response: web.StreamResponse) -> bool:
    """Whether fal's answer says that the key is wrong, or that its account is locked."""
    if not isinstance(response, UpstreamResponse):
        return False
    if response.status == web.HTTPForbidden.status_code:
        return LOCKED in (await response.document(REFUSAL_MAX) or b"")
    return response.status == web.HTTPUnauthorized.status_code


def bind_requests(
    submissions: Submissions | SharedSubmissions, ring: KeyRing, *, strict: bool
) -> Middleware:
    """Middleware: a queued request stays with whoever submitted it and with the key it went out
    with. strict: a request that somebody else submitted, or that did not come through here, is a
    404, as one that does not exist.
    """

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call, owner = request[CALL], request.get(OWNER, "")
        request_id = call.target.request_id
        if request_id is not None and is_own(request_id):
            return await handler(request)  # the cache knows whose it is
        if request_id is not None:
            submission = await submissions.get(request_id)
            if strict and (submission is None or submission.owner != owner):
                raise ProxyError(404, "request_not_found", "There is no such request.")
            if submission is not None and len(ring) > 1:
                request[CALL] = replace(call, key=ring.find(submission.key_mark))
        elif call.method == hdrs.METH_POST and call.target.operation is Operation.SUBMIT:
            key = ring.next()
            request[CALL] = replace(call, key=key, is_document=True)
            response = await handler(request)
            if (request_id := await submitted(response)) is not None:
                await submissions.add(request_id, Submission(owner, key.mark))
            return response
        return await handler(request)

    return middleware


async def submitted(response: web.StreamResponse) -> str | None:
    """The id of the request that an answer to a submit speaks of."""
    if not isinstance(response, UpstreamResponse) or response.status != web.HTTPOk.status_code:
        return None
    request = submitted_request(await response.document() or b"null")
    if request is not None:
        return request[0]
    logger.warning("fal's answer to a submit names no request: nobody can ask for its result")
    return None
