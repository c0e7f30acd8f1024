"""Rotation of the fal keys, and ownership of queued requests."""

import logging
from dataclasses import dataclass, replace

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError, TemporaryError
from falproxy.fal.error_body import parse_error_body
from falproxy.fal.keys import FalKey, KeyPool
from falproxy.fal.policy import QUEUE_METHODS, Globs, app_of, needs_key, normalized_path
from falproxy.fal.queue_documents import parse_submit_response
from falproxy.fal.target import Operation, Target
from falproxy.json_object import parse_object
from falproxy.proxy.call import CALL, OWNER, USES_ROTATION
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import NEEDS_EVERY_ID, IdCheck, add_id_check, any_request_id
from falproxy.proxy.local_responses import FAL_REQUEST_ID, ReplayedResponse
from falproxy.stores.cache import RequestOwner
from falproxy.stores.cache.virtual_requests import is_virtual_id
from falproxy.stores.ownership import RequestOwnership

logger = logging.getLogger(__name__)

ERROR_BODY_MAX = 64 * 1024  # bytes
ACCOUNT_LOCKED = "User is locked"
REJECTION_STATUSES = (web.HTTPUnauthorized.status_code, web.HTTPForbidden.status_code)
# fal's responses about a job of another account.
UNKNOWN_JOB_STATUSES = (401, 403, 404)


def rotate_keys(key_pool: KeyPool) -> Middleware:
    """Middleware: send each new call with the next key. A key that fal rejects is not used during a
    cooldown."""

    @any_request_id
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


@dataclass(frozen=True, slots=True)
class OwnerPolicy:
    """Which requests about queued jobs are let through.

    is_locked: callers are authenticated: a job belongs to the caller that submitted it.
    apps: of the allowed endpoints; empty if all are allowed. Otherwise only jobs that this proxy
        submitted are let through; while that cannot be looked up, without a lock, those of these
        apps.
    """

    is_locked: bool
    apps: Globs

    @property
    def is_strict(self) -> bool:
        return self.is_locked or bool(self.apps)

    def allows_unknown_owner(self, target: Target) -> bool:
        """Return whether a job is let through whose owner cannot be looked up."""
        app = normalized_path(target).strip("/").partition("/requests/")[0]
        return not self.is_locked and self.apps.match(app_of(app))


def require_owner(
    ownership: RequestOwnership, key_pool: KeyPool, policy: OwnerPolicy
) -> Middleware:
    """Middleware: record the submitter and the fal key of queued requests, and use that key for all
    further calls about them. A request that the policy does not let through is a 404."""

    @any_request_id
    @web.middleware
    async def request_owner_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        call = request[CALL]
        request_id = call.target.request_id
        if request_id is not None and is_virtual_id(request_id):
            return await handler(request)  # `serve_virtual_requests` checks the owner
        if request_id is not None:
            return await OwnedRequest(request, handler, ownership, key_pool, policy).respond()
        if call.target.operation is Operation.SUBMIT:
            key = key_pool.next_key()
            request[CALL] = replace(call, key=key, needs_identity=True)
            response = await handler(request)
            if (request_id := await read_request_id(response)) is not None:
                key_mark = key.fingerprint
                if isinstance(response, ReplayedResponse):  # its process may have died meanwhile
                    key_mark = response.key_mark or key_mark
                owner = RequestOwner(request.get(OWNER, ""), key_mark)
                await ownership.add(request_id, owner)
            return response
        return await handler(request)

    return request_owner_middleware


@dataclass(frozen=True, slots=True)
class OwnedRequest:
    """A request about a job in fal's queue."""

    request: web.Request
    handler: Handler
    ownership: RequestOwnership
    key_pool: KeyPool
    policy: OwnerPolicy

    async def respond(self) -> web.StreamResponse:
        """Raises: ProxyError 404, 503."""
        request_id = self.request[CALL].target.request_id or ""
        if not self.policy.is_strict:
            stored = await self.ownership.peek(request_id)
            return await self._send(stored)
        try:
            stored = await self.ownership.get(request_id, wait_for_store=self.policy.is_locked)
        except TemporaryError:
            if not self.policy.allows_unknown_owner(self.request[CALL].target):
                raise
            return await self._send(None)
        if stored is None or stored.owner != self.request.get(OWNER, ""):
            raise ProxyError(404, "request_not_found", "There is no such request.")
        return await self._send(stored)

    async def _send(self, stored: RequestOwner | None) -> web.StreamResponse:
        """Send the request with the key of the job. If that is unknown, with each key in turn,
        until fal knows the job."""
        if stored is None:
            self.request[NEEDS_EVERY_ID] = True
        else:
            add_id_check(self.request, has_owner(self.ownership, stored))
        call = self.request[CALL]
        is_repeatable = QUEUE_METHODS.get(call.target.operation) == call.method
        key = None if stored is None else self.key_pool.find(stored.key_mark)
        if len(self.key_pool) == 1 or key is not None or not is_repeatable:
            self.request[CALL] = replace(call, key=key) if len(self.key_pool) > 1 else call
            return await self.handler(self.request)
        response: web.StreamResponse | None = None
        for key in self.key_pool:
            self.request[CALL] = replace(call, key=key)
            previous, response = response, await self.handler(self.request)
            if response.status not in UNKNOWN_JOB_STATUSES:
                discard(previous)
                await self._record_key(key)
                return response
            if previous is not None and previous.status == web.HTTPNotFound.status_code:
                previous, response = response, previous  # the clearest response is a 404
            discard(previous)
        assert response is not None
        return response

    async def _record_key(self, key: FalKey) -> None:
        if not self.policy.is_strict:
            request_id = self.request[CALL].target.request_id or ""
            await self.ownership.add(request_id, RequestOwner("", key.fingerprint))


def has_owner(ownership: RequestOwnership, owner: RequestOwner) -> IdCheck:
    """Return a function that returns whether a job is known to have this owner and fal key."""
    return lambda request_id: ownership.recent(request_id) == owner


def discard(response: web.StreamResponse | None) -> None:
    if isinstance(response, RelayedResponse):
        response.discard()


async def read_request_id(response: web.StreamResponse) -> str | None:
    """Return the request id in fal's response to a submit."""
    if not isinstance(response, RelayedResponse | ReplayedResponse):
        return None
    if response.status != web.HTTPOk.status_code:
        return None
    submitted = parse_submit_response(await response.document() or b"null")
    if submitted is not None:
        return submitted[0]
    logger.warning("fal's response to a submit has no request id: its result cannot be requested")
    return None
