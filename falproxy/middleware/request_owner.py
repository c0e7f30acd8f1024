"""Requests in fal's queue: whose they are, and which fal key they belong to."""

import logging
from dataclasses import replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyPool
from falproxy.fal.target import Operation
from falproxy.proxy.call import CALL, OWNER, USES_ROTATION
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import head_only
from falproxy.stores.cache.eligibility import parse_submit_response
from falproxy.stores.cache.virtual_ids import is_virtual_id
from falproxy.stores.ownership import LocalOwnership, RequestOwner, SharedOwnership

logger = logging.getLogger(__name__)

ERROR_BODY_MAX = 64 * 1024  # bytes of fal's answer that may say why
ACCOUNT_LOCKED = b"User is locked"


def rotate_keys(key_pool: KeyPool) -> Middleware:
    """Middleware: every new call is sent with the next key; one that fal refuses is left alone."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request[CALL].key is None:
            request[CALL] = replace(request[CALL], key=key_pool.next_key())
            request[USES_ROTATION] = True
        response = await handler(request)
        key = request[CALL].key  # a request that shares a job is asked about with the job's
        if key is not None and await is_key_rejected(response) and key_pool.start_cooldown(key):
            logger.warning("fal refuses the key at position %d with %d: it is left alone for now",
                           key.position, response.status)  # fmt: skip
        return response

    return middleware


async def is_key_rejected(response: web.StreamResponse) -> bool:
    """Whether fal's answer says that the key is wrong, or that its account is locked."""
    if not isinstance(response, RelayedResponse):
        return False
    if response.status == web.HTTPForbidden.status_code:
        return ACCOUNT_LOCKED in (await response.document(ERROR_BODY_MAX) or b"")
    return response.status == web.HTTPUnauthorized.status_code


def require_owner(
    ownership: LocalOwnership | SharedOwnership, key_pool: KeyPool, *, strict: bool
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
        if request_id is not None and is_virtual_id(request_id):
            return await handler(request)  # the cache knows whose it is
        if request_id is not None:
            submission = await ownership.get(request_id)
            if strict and (submission is None or submission.owner != owner):
                raise ProxyError(404, "request_not_found", "There is no such request.")
            if submission is not None and len(key_pool) > 1:
                request[CALL] = replace(call, key=key_pool.find(submission.key_mark))
        elif call.method == hdrs.METH_POST and call.target.operation is Operation.SUBMIT:
            key = key_pool.next_key()
            request[CALL] = replace(call, key=key, needs_identity=True)
            response = await handler(request)
            if (request_id := await read_request_id(response)) is not None:
                await ownership.add(request_id, RequestOwner(owner, key.fingerprint))
            return response
        return await handler(request)

    return middleware


async def read_request_id(response: web.StreamResponse) -> str | None:
    """The id of the request that an answer to a submit speaks of."""
    if not isinstance(response, RelayedResponse) or response.status != web.HTTPOk.status_code:
        return None
    request = parse_submit_response(await response.document() or b"null")
    if request is not None:
        return request[0]
    logger.warning("fal's answer to a submit names no request: nobody can ask for its result")
    return None
