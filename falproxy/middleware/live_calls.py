"""Middleware of live video: its calls name the endpoint or the session in their bodies.

`/ice` and `/session` are checked by the endpoint policy. A session belongs to the caller that
opened it, and its heartbeats use the same fal key.
"""

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyPool
from falproxy.fal.live import (
    LIVE_BODY_MAX,
    is_empty_object,
    opened_session_id,
    read_app,
    read_session_id,
    session_inputs,
)
from falproxy.fal.policy import Policy, forbidden, live_app_of, normalized_path
from falproxy.fal.target import LIVE_HOST, LIVE_MODEL_CALLS, RUN_HOST, Operation
from falproxy.middleware.managed_keys import key_policy
from falproxy.proxy.call import (
    CALL,
    JOB_ID,
    KEY_GRANT,
    OPENED_SESSION,
    OWNER,
    PRICED_INPUTS,
    Call,
)
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import any_request_id
from falproxy.proxy.headers import is_identity, is_utf8
from falproxy.proxy.local_responses import LocalDocument, ReplayedResponse
from falproxy.stores.live_sessions import LiveSession, LiveSessions

logger = logging.getLogger(__name__)

# The session that a heartbeat is about, if it is known.
LIVE_SESSION = web.RequestKey("falproxy.live_session", LiveSession)
# Seconds since it was opened.
LIVE_SECONDS = web.RequestKey("falproxy.live_seconds", float)
# Set for a heartbeat of a session that the proxy ends.
IS_ENDED = web.RequestKey("falproxy.live_session_is_ended", bool)
ENDED = b'{"alive": false}'
EMPTY_BODY_MAX = 64  # bytes of a body that may be `{}`


@dataclass(frozen=True, slots=True)
class LivePolicy:
    """The rules for calls of live video.

    policy: for the endpoints.
    is_locked: callers are authenticated.
    max_seconds: after which a session is ended; None for no limit.
    """

    policy: Policy
    is_locked: bool
    max_seconds: float | None

    @property
    def is_strict(self) -> bool:
        """Return whether only sessions that this proxy opened are continued."""
        return self.is_locked or bool(self.policy.endpoints) or self.max_seconds is not None


def check_live_calls(policy: LivePolicy, sessions: LiveSessions, key_pool: KeyPool) -> Middleware:
    """Middleware: check the endpoint or the session that a call of live video names, and record
    the sessions that are opened."""

    @any_request_id
    @web.middleware
    async def live_calls_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        target = request[CALL].target
        if target.host == LIVE_HOST:
            if target.operation in LIVE_MODEL_CALLS:
                await check_app(request, policy)
            if target.operation is Operation.HEARTBEAT:
                await find_session(request, policy, sessions, key_pool)
        elif target.host == RUN_HOST:
            await check_ice(request, policy)
        response = await handler(request)
        if target.operation is Operation.SESSION and target.host == LIVE_HOST:
            await record_session(request, response, sessions)
        return response

    return live_calls_middleware


async def check_app(request: web.Request, policy: LivePolicy) -> None:
    """Set the endpoint of a call. Raises: ProxyError 403, it is not allowed."""
    body = await read_body(request)
    app = read_app(body)
    for rules in policies_of(request, policy):
        if app is not None:
            rules.check_endpoint(app)
        elif rules.endpoints:
            raise forbidden("live video has to name its app_id")
    call = request[CALL]
    request[CALL] = replace(call, target=replace(call.target, live_endpoint=app))


async def check_ice(request: web.Request, policy: LivePolicy) -> None:
    """Check a call of a path such as `owner/alias/ice`. With an empty input, it asks for the
    servers of live video; with another one it is a call of a model.

    Raises: ProxyError 403, the model is not allowed.
    """
    call = request[CALL]
    path = normalized_path(call.target).strip("/")
    if call.target.is_ambiguous or (app := live_app_of(path)) is None:
        return
    if may_be_empty(call) and is_empty_object(await read_body(request)):
        request[CALL] = replace(request[CALL], target=replace(call.target, live_endpoint=app))
        return
    for rules in policies_of(request, policy):
        if not rules.targets.match(call.target.host + normalized_path(call.target)):
            rules.check_endpoint(path)


def may_be_empty(call: Call) -> bool:
    """Return whether the body of a call may be an empty object."""
    is_short = call.length is not None and call.length <= EMPTY_BODY_MAX
    is_post = call.method == hdrs.METH_POST and not call.target.query
    return is_post and is_short and is_identity(call.headers)


def policies_of(request: web.Request, policy: LivePolicy) -> tuple[Policy, ...]:
    """Return the policy of the proxy, and that of the caller's key if it has one."""
    grant = request.get(KEY_GRANT)
    own = None if grant is None else key_policy(grant)
    return (policy.policy,) if own is None else (policy.policy, own)


async def find_session(
    request: web.Request, policy: LivePolicy, sessions: LiveSessions, key_pool: KeyPool
) -> None:
    """Set the session of a heartbeat, and the fal key that opened it.

    Raises: ProxyError 404, it is another caller's; TemporaryError 503, it cannot be looked up.
    """
    session_id = read_session_id(await read_body(request))
    session = None
    if policy.is_strict:
        if session_id is not None:
            session = await sessions.find(session_id, wait_for_store=policy.is_locked)
        if session is None or session.owner != request.get(OWNER, ""):
            raise ProxyError(404, "session_not_found", "There is no such session.")
    elif session_id is not None:
        session = await sessions.peek(session_id)
    call = replace(request[CALL], needs_identity=True)
    if session is not None:
        request[LIVE_SESSION], request[JOB_ID] = session, session.id
        if len(key_pool) > 1:
            call = replace(call, key=key_pool.find(session.key_mark))
        seconds = request[LIVE_SECONDS] = sessions.clock() - session.opened_at
        if policy.max_seconds is not None and seconds >= policy.max_seconds:
            request[IS_ENDED] = True
    request[CALL] = call


async def record_session(
    request: web.Request, response: web.StreamResponse, sessions: LiveSessions
) -> None:
    """Record the session that a response opens, before the client receives it."""
    session_id = request.get(OPENED_SESSION)
    call = request[CALL]
    key_mark = call.key.fingerprint if call.key else ""
    if isinstance(response, ReplayedResponse):  # the process of the first call may have died
        session_id = opened_session_id(await response.document() or b"")
        key_mark = response.key_mark
    if session_id is not None:
        request[JOB_ID] = session_id
        endpoint = call.target.live_endpoint or ""
        owner = request.get(OWNER, "")
        session = LiveSession(session_id, owner, key_mark, endpoint, sessions.clock())
        await sessions.add(session)


async def read_body(request: web.Request) -> bytes:
    """Return the body of a call, which is sent as it came.

    Raises: ProxyError 413, it is too large; 415, it is encoded, or is not in UTF-8.
    """
    call: Call = request[CALL]
    if not is_identity(call.headers):
        message = "Send the call of live video without a content encoding."
        raise ProxyError(415, "unsupported_content_encoding", message)
    if not is_utf8(call.headers):
        message = "Send the call of live video in UTF-8."
        raise ProxyError(415, "unsupported_charset", message)
    body = b""
    if call.body is not None:
        async for chunk in call.body:
            body += chunk
            if len(body) > LIVE_BODY_MAX:
                message = f"A call of live video has at most {LIVE_BODY_MAX} bytes."
                raise ProxyError(413, "body_too_large", message)
        request[CALL] = replace(call, body=single_chunk(body), length=len(body))
    return body


async def single_chunk(body: bytes) -> AsyncIterator[bytes]:
    yield body


def read_opened_session(max_seconds: float | None) -> Middleware:
    """Middleware, innermost: read the id of a session that is opened.

    max_seconds: after which it is ended, which limits its cost; None for no limit.
    """

    @any_request_id
    @web.middleware
    async def opened_session_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        call = request[CALL]
        if call.target.operation is not Operation.SESSION:
            return await handler(request)
        request[CALL] = replace(call, needs_identity=True)
        request[PRICED_INPUTS] = session_inputs(max_seconds)
        response = await handler(request)
        if response.status < web.HTTPMultipleChoices.status_code:
            session_id = opened_session_id(await read_document(response) or b"")
            if session_id is not None:
                request[OPENED_SESSION] = session_id
            else:
                logger.warning("fal's response to a live video session has no id to follow it by")
        return response

    return opened_session_middleware


async def read_document(response: web.StreamResponse) -> bytes | None:
    """Return the JSON document of a response. Raises: ProxyError 502, 504."""
    if isinstance(response, RelayedResponse | LocalDocument):
        return await response.document()
    return None


def end_sessions() -> Middleware:
    """Middleware, innermost: respond to the heartbeats of sessions that the proxy ends."""

    @any_request_id
    @web.middleware
    async def end_sessions_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if IS_ENDED in request:
            return LocalDocument(body=ENDED, content_type="application/json")
        return await handler(request)

    return end_sessions_middleware
