"""Idempotency-Key: a repeated model call gets the response of the first one, and buys nothing.

The first call with a key goes on if its client leaves, since a client that lost the response sends
the call again. Its outcome is stored before the client gets it. A call that certainly bought
nothing gives its key back, so that a retry can succeed.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.background import time_left
from falproxy.errors import ProxyError, TemporaryError
from falproxy.fal.target import Operation
from falproxy.proxy.call import CACHE_OUTCOME, CALL, OWNER, Call
from falproxy.proxy.event_recording import EVENT_STREAM, RecordedEventStream
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import NEEDS_EVERY_REQUEST, any_request_id
from falproxy.proxy.headers import HOP_BY_HOP
from falproxy.proxy.idempotency_key import (
    CALL_NUMBER,
    CLIENT_DIGEST,
    IDEMPOTENCY_KEY,
    IDEMPOTENCY_REPLAYED,
    IS_REPLAYED,
    OTHER_OPERATION,
    digest_parts,
    read_idempotency_key,
)
from falproxy.proxy.local_responses import (
    FAL_REQUEST_ID,
    LocalDocument,
    ReplayedResponse,
    is_storable_value,
)
from falproxy.proxy.prices import COST_HEADER, SAVED_HEADER
from falproxy.spool import SpoolQuota, spool_body
from falproxy.stores.idempotency import BeginReply, IdempotencyStoreError
from falproxy.stores.idempotency.keyed_calls import KeyedCall, KeyedCalls
from falproxy.stores.idempotency.outcome import StoredOutcome, parse_stored

REPLAYED_OUTCOME = "replayed"  # cache outcome of a response from a record
RESPONSE_MAX = 16 * 2**20  # bytes of a response that is stored
WAIT_TIMEOUT = 300.0  # seconds that a call waits for the first one with its key
POLL_INTERVAL_MIN, POLL_INTERVAL_MAX, POLL_INTERVAL_GROWTH = 0.05, 1.0, 1.5  # seconds, factor
SPOOL_MAX = 4 * 2**30  # bytes on disk for the bodies of a process
# fal's responses after which the same call may succeed, and that are never charged: the account,
# the queue or the model is not available now.
RELEASED_STATUSES = (401, 402, 403, 404, 405, 425, 429)
# Errors after which fal may have accepted the call, also if another call that it shared was sent.
UNKNOWN_OUTCOME_ERRORS = ("upstream_broken", "upstream_timeout")
NOT_SENT_ERRORS = ("upstream_unreachable",)
# Headers that belong to one transfer of a response.
TRANSFER_HEADERS = HOP_BY_HOP | {"content-length", "date", "server"}
COST_HEADERS = {COST_HEADER, SAVED_HEADER}  # a repeated call has its own
# Without this, fal's clients repeat a 504 although it stays the same.
NO_RETRY_HEADERS = {"x-fal-request-timeout-type": "user", "x-should-retry": "false"}

START_TIMEOUT_HEADER = "x-fal-request-timeout"

KEYED_CALL = web.RequestKey("falproxy.keyed_call", KeyedCall)


def keep_idempotent(calls: KeyedCalls, account: Middleware) -> Middleware:
    """Middleware: make model calls with an Idempotency-Key once.

    account: records calls in the ledger; inside this middleware for the first call with a key, and
        around the response for the others.
    """
    quota = SpoolQuota(SPOOL_MAX)

    @any_request_id  # except for requests with a key
    @web.middleware
    async def idempotency_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if IDEMPOTENCY_KEY not in request.headers:
            return await handler(request)
        request[NEEDS_EVERY_REQUEST] = "keep_idempotent"
        key = read_idempotency_key(request.headers)
        digest = await digest_request(request, quota)
        scope = [request.get(OWNER, ""), key, request.get(CALL_NUMBER, 0)]
        record_key = sha256(json.dumps(scope).encode()).hexdigest()
        return await KeyedRequest(request, handler, account, calls, (record_key, digest)).respond()

    return idempotency_middleware


def record_sending() -> Middleware:
    """Middleware, innermost: record that a call with a key is about to be sent."""

    @any_request_id
    @web.middleware
    async def record_sending_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        keyed_call = request.get(KEYED_CALL)
        if keyed_call is not None:
            try:
                is_allowed = await keyed_call.mark_sent()
            except IdempotencyStoreError as error:
                raise idempotency_unavailable() from error
            if not is_allowed:
                raise in_progress_error()
        return await handler(request)

    return record_sending_middleware


async def add_replayed_header(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler of `on_response_prepare`."""
    if IS_REPLAYED in request:
        response.headers[IDEMPOTENCY_REPLAYED] = "true"


async def digest_request(request: web.Request, quota: SpoolQuota) -> str:
    """Return the digest of the client's call: method, target and body as the client sent them.

    Raises: ProxyError, the body cannot be read.
    """
    digest: str | None = request.get(CLIENT_DIGEST)
    if digest is not None:
        return digest
    call = request[CALL]
    parts = [call.method, call.target.host, call.target.path, call.target.query]
    parts.append(",".join(call.headers.getall(hdrs.CONTENT_ENCODING, ())))
    if call.body is None:
        return await digest_parts(parts)
    spool = await spool_body(call.body, quota)
    request[CALL] = replace(call, body=spool.chunks(), length=spool.size)
    return await digest_parts([*parts, spool])


class KeyedRequest:
    """A request with a key: the first one, which is sent, or a later one.

    identity: key of the record, and digest of the call.
    """

    def __init__(
        self,
        request: web.Request,
        handler: Handler,
        account: Middleware,
        calls: KeyedCalls,
        identity: tuple[str, str],
    ) -> None:
        self.request = request
        self.handler = handler
        self.account = account
        self.calls = calls
        self.record_key, self.digest = identity
        self.operation = request[CALL].target.operation.value
        self.client_left = False

    def __repr__(self) -> str:
        return f"<KeyedRequest {self.record_key[:12]} {self.operation}>"

    async def respond(self) -> web.StreamResponse:
        """Raises: ProxyError."""
        interval = POLL_INTERVAL_MIN
        try:
            async with asyncio.timeout(WAIT_TIMEOUT):
                while (known := await self._begin()) is None:
                    await asyncio.sleep(interval)
                    interval = min(POLL_INTERVAL_MAX, interval * POLL_INTERVAL_GROWTH)
        except TimeoutError:
            raise in_progress_error() from None
        if isinstance(known, KeyedCall):
            return await self._lead(known)
        return await self._replay(known)

    async def _begin(self) -> KeyedCall | StoredOutcome | None:
        """Return the call if it is the first one with the key, or the outcome of that; None while
        it has not ended. Raises: ProxyError."""
        first = self.calls.find(self.record_key)
        if first is not None and not first.is_forgotten:
            if first.digest != self.digest:
                raise key_reused_error()
            return await asyncio.shield(first.ended)
        try:
            begun = await self.calls.begin(self.record_key, self.digest)
        except IdempotencyStoreError as error:
            raise idempotency_unavailable() from error
        return begun if isinstance(begun, KeyedCall) else outcome_of(begun)

    async def _lead(self, keyed_call: KeyedCall) -> web.StreamResponse:
        """Make the call in a task of its own, which goes on if the client leaves after fal may have
        received it."""
        request = self.request
        request[KEYED_CALL] = keyed_call
        app = request.app
        task = self.calls.spawn(self._run(keyed_call))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self.client_left = True
            if not keyed_call.is_sent or self._ends_with_client:
                task.cancel()
            elif task.done():
                self._discard(task.result())
            # On the way out, aiohttp sets the application to the outermost of nested ones.
            restore = lambda: setattr(request.match_info, "current_app", app)  # noqa: E731
            asyncio.get_running_loop().call_soon(restore)
            raise

    @property
    def _ends_with_client(self) -> bool:
        """True for a run with a time limit of its client, which does not repeat it when the time is
        over. It is cancelled at fal, as without a key, and its outcome is unknown."""
        is_run = self.operation in (Operation.RUN, Operation.STREAM)
        return is_run and START_TIMEOUT_HEADER in self.request[CALL].headers

    async def _run(self, keyed_call: KeyedCall) -> web.StreamResponse:
        self.request[CALL] = replace(self.request[CALL], needs_identity=True)
        try:
            response = await self.handler(self.request)
            if isinstance(response, RelayedResponse) and is_event_stream(response):
                return self._record_events(keyed_call, response)
            body = await read_body(response)
        except BaseException as error:
            await asyncio.shield(self.calls.spawn(self._end_without_response(keyed_call, error)))
            raise
        if gives_key_back(response):
            await keyed_call.release()
        else:
            outcome = self._outcome(response, body or b"")
            await keyed_call.finish(outcome, is_storable=body is not None)
        if self.client_left:
            self._discard(response)
        return response

    async def _end_without_response(self, keyed_call: KeyedCall, error: BaseException) -> None:
        """End the call: with the error, if fal may have received the call, which is not sent again
        then."""
        failure = error if isinstance(error, ProxyError) else outcome_unknown_error()
        is_unknown = keyed_call.is_sent and failure.code not in NOT_SENT_ERRORS
        if is_unknown or failure.code in UNKNOWN_OUTCOME_ERRORS:
            await keyed_call.finish(StoredOutcome(self.operation, error=failure))
        else:
            await keyed_call.release()

    def _record_events(
        self, keyed_call: KeyedCall, response: RelayedResponse
    ) -> RecordedEventStream:
        outcome = self._outcome(response, b"")
        events = RecordedEventStream(outcome.status, outcome.headers)
        if self.client_left:
            events.discard()

        async def record() -> None:
            try:
                body = await events.record(response, RESPONSE_MAX)
            except BaseException as error:
                await self._end_without_response(keyed_call, error)
                raise
            is_storable = body is not None
            await keyed_call.finish(replace(outcome, body=body or b""), is_storable=is_storable)

        _ = self.calls.spawn(record())
        return events

    def _outcome(self, response: web.StreamResponse, body: bytes) -> StoredOutcome:
        headers = tuple(
            (name, value)
            for name, value in response.headers.items()
            if name.lower() not in TRANSFER_HEADERS | COST_HEADERS and is_storable_value(value)
        )
        call: Call = self.request[CALL]
        key_mark = call.key.fingerprint if call.key else ""
        return StoredOutcome(self.operation, response.status, headers, body, key_mark)

    def _discard(self, response: web.StreamResponse) -> None:
        if isinstance(response, RelayedResponse | RecordedEventStream):
            response.discard()

    async def _replay(self, outcome: StoredOutcome) -> web.StreamResponse:
        """Return the outcome of the first call. Raises: ProxyError, that was an error; 409, the
        first call was another operation, in a dialect that chooses it."""
        if outcome.operation != self.operation:
            raise other_operation_error()
        request = self.request
        request[IS_REPLAYED] = True

        async def respond_from_record(request: web.Request) -> web.StreamResponse:
            request[CACHE_OUTCOME] = REPLAYED_OUTCOME
            if outcome.error is not None:
                raise outcome.error.with_headers({})
            return to_response(outcome)

        return await self.account(request, respond_from_record)


def outcome_of(reply: BeginReply) -> StoredOutcome | None:
    """Return the outcome that a record has; None while there is none. Raises: ProxyError."""
    match reply.state:
        case "done":
            with suppress(ValueError, TypeError, KeyError):
                return parse_stored(reply.outcome)
            raise outcome_unknown_error()  # written by another version
        case "mismatch":
            raise key_reused_error()
        case "lost":
            raise outcome_unknown_error()
        case "dropped":
            raise response_dropped_error()
        case "full":
            raise idempotency_unavailable()
        case "running" | "started":
            return None


def to_response(outcome: StoredOutcome) -> web.StreamResponse:
    if dict(outcome.headers).get(hdrs.CONTENT_TYPE, "").startswith(EVENT_STREAM):
        return RecordedEventStream.replay(outcome.status, outcome.headers, outcome.body)
    response = ReplayedResponse(body=outcome.body, status=outcome.status)
    response.key_mark = outcome.key_mark
    response.headers.popall(hdrs.CONTENT_TYPE, None)
    response.headers.extend(outcome.headers)
    return response


def gives_key_back(response: web.StreamResponse) -> bool:
    """Return whether a response shows that the call bought nothing, and may succeed later.

    A redirect is followed with the same key. A 503 without fal's request id is that of a gateway
    which did not pass the call on; fal's own clients repeat it.
    """
    is_redirect = 300 <= response.status < 400
    is_busy = response.status == 503 and FAL_REQUEST_ID not in response.headers
    return is_redirect or is_busy or response.status in RELEASED_STATUSES


def is_event_stream(response: RelayedResponse) -> bool:
    return response.content_type == EVENT_STREAM and response.status == web.HTTPOk.status_code


async def read_body(response: web.StreamResponse) -> bytes | None:
    """Return the body of a response; None if it is too large to be stored.

    Raises: ProxyError 502, 504.
    """
    if isinstance(response, RelayedResponse):
        return await response.read(RESPONSE_MAX)
    body = await response.document() if isinstance(response, LocalDocument) else None
    return body if body is not None and len(body) <= RESPONSE_MAX else None


def key_reused_error() -> ProxyError:
    message = f"This {IDEMPOTENCY_KEY} belongs to another call: use a new one for each call."
    return ProxyError(422, "idempotency_key_reused", message)


def in_progress_error() -> ProxyError:
    message = f"The first call with this {IDEMPOTENCY_KEY} has not ended. Try again with it."
    return ProxyError(409, "idempotency_in_progress", message, {hdrs.RETRY_AFTER: "5"})


def other_operation_error() -> ProxyError:
    message = f"The first call with this {IDEMPOTENCY_KEY} was made in another way."
    return ProxyError(409, OTHER_OPERATION, message)


def response_dropped_error() -> ProxyError:
    message = (
        f"The call with this {IDEMPOTENCY_KEY} was made, and its response was too large to be kept."
    )
    return ProxyError(410, "idempotency_response_dropped", message)


def outcome_unknown_error() -> ProxyError:
    message = (
        f"The outcome of the call with this {IDEMPOTENCY_KEY} is unknown: fal.ai may have accepted "
        "it. It is not sent again."
    )
    return ProxyError(504, "outcome_unknown", message, NO_RETRY_HEADERS)


def idempotency_unavailable() -> ProxyError:
    message = f"Calls with an {IDEMPOTENCY_KEY} cannot be recorded now. Try again."
    return TemporaryError(503, "idempotency_unavailable", message, {hdrs.RETRY_AFTER: "2"})


def keyed_calls_context(
    calls: KeyedCalls, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the records are open exactly as long as the application.

    grace_period: seconds that calls, which may be paid for, have to end.
    """

    async def keyed_calls_cleanup(app: web.Application) -> AsyncIterator[None]:
        async with calls:
            yield
            await calls.close(time_left(app, grace_period))

    return keyed_calls_cleanup
