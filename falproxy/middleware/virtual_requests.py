"""Request ids of ours, and fal's own that are shared: status, result and cancel."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import QUEUE_METHODS
from falproxy.fal.target import Operation, Target
from falproxy.middleware.cache_policy import CachePolicy
from falproxy.proxy.call import CACHE_OUTCOME, CALL, OWNER, Call
from falproxy.proxy.forward import RelayedResponse, sync_rewrite
from falproxy.proxy.head_only import head_only
from falproxy.proxy.local_responses import (
    CANCELLED_FAILURE,
    FAL_REQUEST_ID,
    LOST_CALL_FAILURE,
    LocalEventStream,
    failure_response,
    local_document,
    queue_urls,
    result_response,
    set_cache_hit,
)
from falproxy.stores.cache import CachedResult, Job, SharedFailure, StoreError, VirtualRequest
from falproxy.stores.cache.eligibility import CacheEligibility, is_storable
from falproxy.stores.cache.result_cache import ResultCache
from falproxy.stores.cache.virtual_ids import is_virtual_id

# Operations that are rare enough to ask the store whether one of fal's own ids is shared.
STORE_LOOKUP_OPERATIONS = (Operation.RESULT, Operation.CANCEL)
POLL_INTERVAL = 1.0  # seconds between two looks at a direct call that somebody else makes
TAKEOVER_SECONDS = 3.0  # seconds that others have to go on with a call whose leader died
RETRY_HEADERS = {"Retry-After": "1"}
ERROR_TYPES = {499: "client_cancelled", 503: "runner_disconnected"}


def serve_virtual_requests(
    eligibility: CacheEligibility,
    result_cache: ResultCache,
    key_pool: KeyPool,
    cache_policy: CachePolicy,
) -> Middleware:
    """Middleware: what is asked about an id of ours is answered here, or by fal under the id of
    the job that it shares. A poll for any other id passes by."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if (request_id := call.target.request_id) is None:
            return await handler(request)
        if is_virtual_id(request_id) or call.target.operation in STORE_LOOKUP_OPERATIONS:
            claim = await find_virtual_request(call, request_id, eligibility, result_cache)
        else:  # a poll of fal's own id, which nobody is asked about
            claim = if_cancelled(result_cache.virtual_requests.peek(request_id))
        if claim is None:
            return await handler(request)
        if QUEUE_METHODS.get(call.target.operation) != call.method:
            raise method_not_allowed(QUEUE_METHODS.get(call.target.operation, "GET"))
        if claim.owner != request.get(OWNER, ""):
            raise request_not_found()
        return await VirtualRequestHandler(
            request, handler, result_cache, key_pool, cache_policy, request_id, claim
        ).respond()

    return middleware


async def find_virtual_request(
    call: Call, request_id: str, eligibility: CacheEligibility, result_cache: ResultCache
) -> VirtualRequest | None:
    """What an id stands for; None for one of fal's that is nobody's business but fal's.

    Raises: ProxyError 404 for an id of ours that stands for nothing, 503 when that cannot be
    found out.
    """
    if is_virtual_id(request_id):
        try:
            claim = await result_cache.virtual_requests.get(request_id)
        except StoreError as error:
            raise ProxyError(
                503, "cache_unavailable", "The request cannot be looked up now.", RETRY_HEADERS
            ) from error
        if claim is None:
            raise request_not_found()
        return claim
    if not eligibility.is_cacheable_app(call.target):
        return None
    try:
        return await result_cache.virtual_requests.get(request_id)
    except StoreError:
        return None


def if_cancelled(virtual_request: VirtualRequest | None) -> VirtualRequest | None:
    return virtual_request if virtual_request is not None and virtual_request.is_cancelled else None


def method_not_allowed(method: str) -> ProxyError:
    return ProxyError(405, "method_not_allowed", f"Use {method} here.", {hdrs.ALLOW: method})


def request_not_found() -> ProxyError:
    return ProxyError(404, "request_not_found", "There is no such request.")


class VirtualRequestHandler:
    """A question about a request id that stands for something here."""

    def __init__(
        self,
        request: web.Request,
        handler: Handler,
        result_cache: ResultCache,
        key_pool: KeyPool,
        cache_policy: CachePolicy,
        request_id: str,
        virtual_request: VirtualRequest,
    ) -> None:
        self.request = request
        self.call = request[CALL]
        self.handler = handler
        self.result_cache = result_cache
        self.key_pool = key_pool
        self.cache_policy = cache_policy
        self.request_id = request_id
        self.virtual_request = virtual_request

    async def respond(self) -> web.StreamResponse:
        operation = self.call.target.operation
        if operation is Operation.CANCEL:
            return await self._cancel()
        if self.virtual_request.job is not None and not self.virtual_request.is_cancelled:
            return await self._forward()
        if operation is Operation.STATUS:
            return self._status_response(await self._outcome())
        if operation is Operation.STATUS_STREAM:
            ending = await self._outcome()
            return self._with_cache_status(LocalEventStream(self._status_events(ending)), ending)
        if operation is Operation.RESULT:
            return self._result_response(await self._outcome())
        raise request_not_found()

    async def _outcome(self) -> CachedResult | SharedFailure | None:
        """How the request ended; None while it is under way."""
        claim = self.virtual_request
        if claim.is_cancelled:
            return CANCELLED_FAILURE
        if known := claim.failure or self.result_cache.virtual_requests.cached_result(
            self.request_id
        ):
            return known
        flight = self.result_cache.single_flight.find_call(claim.key)
        if flight is not None and self.request_id in flight.pending_ids and not flight.done.done():
            return None
        try:
            found = await self.result_cache.breaker.call(
                self.result_cache.breaker.store.get(claim.key)
            )
        except StoreError as error:
            raise ProxyError(
                503, "cache_unavailable", "The result cannot be read now.", RETRY_HEADERS
            ) from error
        if found.result is not None:
            return found.result
        if found.flight is not None and found.flight.lease_left > -TAKEOVER_SECONDS:
            return None
        return await self._latest() or LOST_CALL_FAILURE

    async def _latest(self) -> CachedResult | SharedFailure | None:
        """What was said of this id since the question was asked."""
        with suppress(StoreError):
            self.virtual_request = (
                await self.result_cache.virtual_requests.get(self.request_id)
                or self.virtual_request
            )
        known = self.result_cache.virtual_requests.peek(self.request_id) or self.virtual_request
        return known.failure or self.result_cache.virtual_requests.cached_result(self.request_id)

    def _status_response(self, outcome: CachedResult | SharedFailure | None) -> web.StreamResponse:
        status = 202 if outcome is None else 200
        response = local_document(self._status_document(outcome), self.request_id, status)
        return self._with_cache_status(response, outcome)

    def _status_document(self, outcome: CachedResult | SharedFailure | None) -> dict[str, object]:
        """As fal tells a status (fal-api.md, 2.2)."""
        wants_logs = self.call.target.query in ("?logs=1", "?logs=true")
        document: dict[str, object] = {
            "status": "IN_PROGRESS" if outcome is None else "COMPLETED",
            "request_id": self.request_id,
            **queue_urls(self.virtual_request.app, self.request_id),
            "logs": [] if wants_logs else None,
        }
        if outcome is not None:
            document["metrics"] = {"inference_time": None}
        if isinstance(outcome, SharedFailure) and outcome.status != web.HTTPOk.status_code:
            document["error"] = f"The request ended with {outcome.status}."
            document["error_type"] = ERROR_TYPES.get(outcome.status, "internal_error")
        return document

    async def _status_events(
        self, outcome: CachedResult | SharedFailure | None
    ) -> AsyncIterator[bytes]:
        """The statuses until the end. What waits for a direct call waits for it here."""
        if outcome is None:
            yield encode(self._status_document(None))
        while outcome is None:
            await self._wait_for_change()
            with suppress(ProxyError, StoreError):  # the store may be back at the next look
                self.virtual_request = (
                    await self.result_cache.virtual_requests.get(self.request_id)
                    or self.virtual_request
                )
                outcome = await self._outcome()
        yield encode(self._status_document(outcome))

    async def _wait_for_change(self) -> None:
        """Returns when the direct call has ended, or it is time to look."""
        if (
            flight := self.result_cache.single_flight.find_call(self.virtual_request.key)
        ) is not None:
            await asyncio.wait({flight.done}, timeout=POLL_INTERVAL)
        else:
            await asyncio.sleep(POLL_INTERVAL)

    def _result_response(self, outcome: CachedResult | SharedFailure | None) -> web.StreamResponse:
        if outcome is None:
            document = {"detail": "Request is still in progress"}
            return local_document(document, self.request_id, 400)
        if isinstance(outcome, SharedFailure):
            response = failure_response(outcome, self.request_id)
            response.headers[FAL_REQUEST_ID] = self.request_id
            return self._with_cache_status(response, outcome)
        return self._with_cache_status(result_response(outcome, self.request_id), outcome)

    def _with_cache_status(
        self, response: web.StreamResponse, outcome: CachedResult | SharedFailure | None
    ) -> web.StreamResponse:
        self.request[CACHE_OUTCOME] = "hit" if isinstance(outcome, CachedResult) else "collapsed"
        return set_cache_hit(response, outcome) if isinstance(outcome, CachedResult) else response

    async def _cancel(self) -> web.StreamResponse:
        """fal hears of it when nobody else holds the job; else this id alone is let go."""
        claim = self.virtual_request
        if claim.is_cancelled or (claim.job is None and await self._outcome() is not None):
            return local_document({"status": "ALREADY_COMPLETED"}, self.request_id, 400)
        if claim.job is not None and await self._release_hold(claim.job):
            return await self._forward()
        if (flight := self.result_cache.single_flight.find_call(claim.key)) is not None:
            flight.pending_ids.discard(self.request_id)
        await self.result_cache.virtual_requests.put(
            self.request_id, replace(claim, is_cancelled=True)
        )
        return local_document({"status": "CANCELLATION_REQUESTED"}, self.request_id, 202)

    async def _release_hold(self, job: Job) -> bool:
        """Raises: ProxyError 503, nobody can say who else holds the job."""
        try:
            return await self.result_cache.release_hold(
                self.virtual_request.key, job, self.request_id
            )
        except StoreError as error:
            message = "The request cannot be cancelled now."
            raise ProxyError(503, "cache_unavailable", message, RETRY_HEADERS) from error

    async def _forward(self) -> web.StreamResponse:
        """fal's answer about the job, told of this id."""
        job, call = self.virtual_request.job, self.call
        assert job is not None
        target = call.target
        verb = target.path.partition(f"/requests/{self.request_id}")[2]
        path = f"/{job.app}/requests/{job.request_id}{verb}"
        self.request[CALL] = replace(
            call,
            target=Target(target.host, path, target.query),
            key=self.key_pool.find(job.key_mark) or call.key,
            needs_identity=True,
        )
        response = await self.handler(self.request)
        if isinstance(response, RelayedResponse):
            if target.operation is Operation.RESULT:
                await self._store_result(response)
            if job.request_id != self.request_id:
                await self._replace_id(response, job.request_id)
        return response

    async def _store_result(self, response: RelayedResponse) -> None:
        """Keeps a result that its leader did not: his process may have died."""
        store, guard, claim = (
            self.result_cache.breaker.store,
            self.result_cache.breaker,
            self.virtual_request,
        )
        with suppress(StoreError):
            found = await guard.call(store.get(claim.key))
            if found.result is not None or found.flight is None or found.flight.job != claim.job:
                return
            body = await response.document(self.cache_policy.max_entry)
            if body is not None and is_storable(response.status, body):
                result = self.cache_policy.new_result(body, response.headers[hdrs.CONTENT_TYPE])
                await guard.call(store.finish(claim.key, found.flight.owner_token, result))
                self.result_cache.spawn(self.cache_policy.rehost(guard, claim.key, result))

    async def _replace_id(self, response: RelayedResponse, job_request_id: str) -> None:
        """The answer with this id where it speaks of the job's."""
        if FAL_REQUEST_ID in response.headers:
            response.headers[FAL_REQUEST_ID] = self.request_id
        old, new = job_request_id.encode(), self.request_id.encode()
        operation = self.call.target.operation
        if operation is Operation.STATUS_STREAM:
            response.rewrite_lines(sync_rewrite(lambda lines: lines.replace(old, new)))
        elif operation is Operation.STATUS and (body := await response.document()) is not None:
            response.replace_document(body.replace(old, new))


def encode(document: dict[str, object]) -> bytes:
    return json.dumps(document).encode()
