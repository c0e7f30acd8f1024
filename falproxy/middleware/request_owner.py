"""Rotation of the fal keys, and ownership of queued requests."""

import logging
from dataclasses import replace

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.error_body import parse_error_body
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import needs_key
from falproxy.fal.queue_documents import parse_submit_response
from falproxy.fal.target import Operation
from falproxy.json_object import parse_object
from falproxy.proxy.call import CALL, OWNER, USES_ROTATION
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.local_responses import FAL_REQUEST_ID
from falproxy.stores.cache import RequestOwner
from falproxy.stores.cache.virtual_requests import is_virtual_id
from falproxy.stores.ownership import RequestOwnership

logger = logging.getLogger(__name__)

ERROR_BODY_MAX = 64 * 1024  # bytes
ACCOUNT_LOCKED = "User is locked"
REJECTION_STATUSES = (web.HTTPUnauthorized.status_code, web.HTTPForbidden.status_code)


def rotate_keys(key_pool: KeyPool) -> Middleware:
    """Middleware: send each new call with the next key. A key that fal rejects is not used during a
    cooldown."""

    @head_only
    @web.middleware
    async def key_rotation_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request[CALL].key is None:
            request[CALL] = replace(request[CALL], key=key_pool.next_key())
            request[USES_ROTATION] = True
        response = await handler(request)
        key = request[CALL].key  # inner middleware may have set the key of a shared job
        if key is None or not needs_key(request[CALL].method, request[CALL].target):
            return response
        if await is_key_rejected(response) and key_pool.start_cooldown(key):
            logger.warning("fal rejects the key at position %d with %d: it is not used for now",
                           key.position, response.status)  # fmt: skip
        return response

    return key_rotation_middleware


async def is_key_rejected(response: web.StreamResponse) -> bool:
    """Return whether fal's gateway rejected the key as invalid, or because its account is locked.

    A model may respond with the same statuses for reasons of its own, and so does the result of a
    job that ended like this. Its responses have a request id, and other bodies than the gateway's
    (fal-api.md, 4.4).
    """
    if not isinstance(response, RelayedResponse) or response.status not in REJECTION_STATUSES:
        return False
    is_401 = response.status == web.HTTPUnauthorized.status_code
    if is_401 and FAL_REQUEST_ID in response.upstream_headers:
        return False
    body = await response.document(ERROR_BODY_MAX)
    if is_401:
        return body is None or is_gateway_error(body)
    return parse_error_body(body or b"").message.startswith(ACCOUNT_LOCKED)


def is_gateway_error(body: bytes) -> bool:
    """Return whether a body is an error in one of the formats of fal's hosts: a sentence in
    `detail` or `error`, or an object in `error`."""
    document = parse_object(body) or {}
    return isinstance(document.get("detail"), str) or isinstance(document.get("error"), str | dict)


def require_owner(ownership: RequestOwnership, key_pool: KeyPool, *, strict: bool) -> Middleware:
    """Middleware: record the submitter and the fal key of queued requests, and use that key for all
    further calls about them.

    strict: refuse, with 404, requests of other callers and requests that this proxy did not submit.
    """

    @head_only
    @web.middleware
    async def request_owner_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        call, owner = request[CALL], request.get(OWNER, "")
        request_id = call.target.request_id
        if request_id is not None and is_virtual_id(request_id):
            return await handler(request)  # `serve_virtual_requests` checks the owner
        if request_id is not None:
            stored = await ownership.get(request_id)
            if strict and (stored is None or stored.owner != owner):
                raise ProxyError(404, "request_not_found", "There is no such request.")
            if stored is not None and len(key_pool) > 1:
                request[CALL] = replace(call, key=key_pool.find(stored.key_mark))
        elif call.target.operation is Operation.SUBMIT:
            key = key_pool.next_key()
            request[CALL] = replace(call, key=key, needs_identity=True)
            response = await handler(request)
            if (request_id := await read_request_id(response)) is not None:
                await ownership.add(request_id, RequestOwner(owner, key.fingerprint))
            return response
        return await handler(request)

    return request_owner_middleware


async def read_request_id(response: web.StreamResponse) -> str | None:
    """Return the request id in fal's response to a submit."""
    if not isinstance(response, RelayedResponse) or response.status != web.HTTPOk.status_code:
        return None
    submitted = parse_submit_response(await response.document() or b"null")
    if submitted is not None:
        return submitted[0]
    logger.warning("fal's response to a submit has no request id: its result cannot be requested")
    return None
