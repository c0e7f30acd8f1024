"""Status, result and cancel of virtual requests, and of fal's own requests that are shared."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError, TemporaryError
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import QUEUE_METHODS
from falproxy.fal.target import Operation, Target
from falproxy.middleware.cache_policy import CachePolicy
from falproxy.proxy.call import CACHE_OUTCOME, CALL, OWNER, Call
from falproxy.proxy.forward import RelayedResponse, sync_rewrite
from falproxy.proxy.head_only import (
    NEEDS_EVERY_REQUEST,
    IdCheck,
    add_id_check,
    any_request_id,
)
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
    shared_failure,
)
from falproxy.proxy.queue_job import is_job_end
from falproxy.stores.cache import (
    CachedResult,
    Job,
    Lookup,
    SharedFailure,
    SharedOutcome,
    StoreError,
    VirtualRequest,
)
from falproxy.stores.cache.call_outcome import CallOutcome, serialize_outcome
from falproxy.stores.cache.eligibility import CacheEligibility, is_storable
from falproxy.stores.cache.result_cache import ResultCache
from falproxy.stores.cache.virtual_requests import is_virtual_id

# For these, which are rare, the store is read to find out whether a request of fal's is shared.
STORE_LOOKUP_OPERATIONS = (Operation.RESULT, Operation.CANCEL)
POLL_INTERVAL = 1.0  # seconds, for a direct call of another process
# Seconds in which another process may take over the call of a leader whose lease expired.
TAKEOVER_SECONDS = 3.0
RETRY_HEADERS = {"Retry-After": "1"}
ERROR_TYPES = {499: "client_cancelled", 503: "runner_disconnected"}


def serve_virtual_requests(
    eligibility: CacheEligibility,
    result_cache: ResultCache,
    key_pool: KeyPool,
    cache_policy: CachePolicy,
) -> Middleware:
    """Middleware: respond to requests about virtual ids, from the cache or with fal's response
    about the shared job. Polls of fal's own ids pass through, unless their shared job goes on
    after its submitter has cancelled it."""
    is_of_fal = id_check(result_cache)

    @any_request_id
    @web.middleware
    async def virtual_requests_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        call = request[CALL]
        if (request_id := call.target.request_id) is None:
            return await handler(request)
        if is_virtual_id(request_id) or (
            call.target.operation in STORE_LOOKUP_OPERATIONS
            and eligibility.is_cacheable_app(call.target)
        ):
            request[NEEDS_EVERY_REQUEST] = "serve_virtual_requests"
            virtual_request = await find_virtual_request(call, request_id, result_cache)
        else:  # fal's own id, which is of no shared job, or is polled: the store is not read
            add_id_check(request, is_of_fal)
            virtual_request = if_cancelled(result_cache.virtual_requests.peek(request_id))
        if virtual_request is None:
            return await handler(request)
        if QUEUE_METHODS.get(call.target.operation) != call.method:
            raise method_not_allowed(QUEUE_METHODS.get(call.target.operation, "GET"))
        if virtual_request.owner != request.get(OWNER, ""):
            raise request_not_found()
        return await VirtualRequestHandler(
            request, handler, result_cache, key_pool, cache_policy, request_id, virtual_request
        ).respond()

    return virtual_requests_middleware


def id_check(result_cache: ResultCache) -> IdCheck:
    """Return a function that returns whether an id is one of fal's, and of no job that calls
    share."""

    def is_of_fal(request_id: str) -> bool:
        if is_virtual_id(request_id):
            return False
        return result_cache.virtual_requests.peek(request_id) is None

    return is_of_fal


async def find_virtual_request(
    call: Call, request_id: str, result_cache: ResultCache
) -> VirtualRequest | None:
    """Return the virtual request with this id, which may be a shared id of fal's; None for others.

    Raises: ProxyError 404, an unknown virtual id; 503, the store cannot be read.
    """
    if is_virtual_id(request_id):
        try:
            virtual_request = await result_cache.virtual_requests.find(request_id)
        except StoreError as error:
            raise cache_unavailable("The request cannot be looked up now.") from error
        if virtual_request is None:
            raise request_not_found()
        return virtual_request
    try:
        return await result_cache.virtual_requests.get(request_id)
    except StoreError as error:
        if call.target.operation is Operation.CANCEL:  # other requests may share the job
            raise cache_unavailable("The request cannot be cancelled now.") from error
        return None


def if_cancelled(virtual_request: VirtualRequest | None) -> VirtualRequest | None:
    """Return the virtual request if its owner cancelled it: the shared job goes on for others, so
    that the proxy responds itself."""
    return virtual_request if virtual_request is not None and virtual_request.is_cancelled else None


def method_not_allowed(method: str) -> ProxyError:
    return ProxyError(405, "method_not_allowed", f"Use {method} here.", {hdrs.ALLOW: method})


def request_not_found() -> ProxyError:
    return ProxyError(404, "request_not_found", "There is no such request.")


def cache_unavailable(message: str) -> ProxyError:
    return TemporaryError(503, "cache_unavailable", message, RETRY_HEADERS)


class VirtualRequestHandler:
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

    def __repr__(self) -> str:
        return f"<VirtualRequestHandler {self.request_id} {self.virtual_request!r}>"

    async def respond(self) -> web.StreamResponse:
        operation = self.call.target.operation
        if operation is Operation.CANCEL:
            return await self._cancel()
        if self.virtual_request.job is not None and not self.virtual_request.is_cancelled:
            return await self._forward()
        if operation is Operation.STATUS:
            return self._status_response(await self._outcome())
        if operation is Operation.STATUS_STREAM:
            outcome = await self._outcome()
            return self._with_cache_status(LocalEventStream(self._status_events(outcome)), outcome)
        if operation is Operation.RESULT:
            return self._result_response(await self._outcome())
        raise request_not_found()

    async def _outcome(self) -> CachedResult | SharedFailure | None:
        """Return the result or the failure; None while the request is in progress."""
        virtual_request, result_cache = self.virtual_request, self.result_cache
        if virtual_request.is_cancelled:
            return CANCELLED_FAILURE
        if outcome := self._local_outcome(virtual_request):
            return outcome
        shared_call = result_cache.single_flight.find_call(virtual_request.key)
        is_pending = shared_call is not None and self.request_id in shared_call.pending_ids
        if shared_call is not None and is_pending and not shared_call.done.done():
            return None
        try:
            lookup = await result_cache.find(virtual_request.key)
        except StoreError as error:
            raise cache_unavailable("The result cannot be read now.") from error
        if lookup is not None and lookup.result is not None:
            return lookup.result
        if lookup is not None and is_in_progress(lookup):
            return None
        latest = await self._latest()
        # If the call has ended just now, the process of this id is about to record its outcome.
        has_just_ended = lookup is not None and lookup.last_outcome
        return latest or (None if has_just_ended else LOST_CALL_FAILURE)

    async def _latest(self) -> CachedResult | SharedFailure | None:
        """Return the outcome that was recorded since the HTTP request began."""
        with suppress(StoreError):
            await self._refresh()
        latest = self.result_cache.virtual_requests.peek(self.request_id)
        return self._local_outcome(latest or self.virtual_request)

    def _local_outcome(
        self, virtual_request: VirtualRequest
    ) -> CachedResult | SharedFailure | None:
        return virtual_request.failure or self.result_cache.virtual_requests.cached_result(
            self.request_id
        )

    async def _refresh(self) -> None:
        """Read the virtual request again. Raises: StoreError."""
        current = await self.result_cache.virtual_requests.get(self.request_id)
        self.virtual_request = current or self.virtual_request

    def _status_response(self, outcome: CachedResult | SharedFailure | None) -> web.StreamResponse:
        status = 202 if outcome is None else 200
        response = local_document(self._status_document(outcome), self.request_id, status)
        return self._with_cache_status(response, outcome)

    def _status_document(self, outcome: CachedResult | SharedFailure | None) -> dict[str, object]:
        """Return a status document in fal's form (fal-api.md, 2.2)."""
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
        """Yield the status now, and the final one after the end of the direct call."""
        if outcome is None:
            yield encode(self._status_document(None))
        while outcome is None:
            await self._wait_for_change()
            with suppress(ProxyError, StoreError):  # the store may recover until the next poll
                await self._refresh()
                outcome = await self._outcome()
        yield encode(self._status_document(outcome))

    async def _wait_for_change(self) -> None:
        """Wait for the end of the direct call, at most POLL_INTERVAL seconds."""
        shared_call = self.result_cache.single_flight.find_call(self.virtual_request.key)
        if shared_call is None:
            await asyncio.sleep(POLL_INTERVAL)
        else:
            await asyncio.wait({shared_call.done}, timeout=POLL_INTERVAL)

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
        """Cancel the job at fal if this id is its last holder, otherwise this id only."""
        virtual_request, job = self.virtual_request, self.virtual_request.job
        if virtual_request.is_cancelled or (job is None and await self._outcome() is not None):
            return local_document({"status": "ALREADY_COMPLETED"}, self.request_id, 400)
        if job is not None and await self._release_hold(job):
            return await self._forward()
        shared_call = self.result_cache.single_flight.find_call(virtual_request.key)
        if shared_call is not None:
            shared_call.pending_ids.discard(self.request_id)
        await self.result_cache.virtual_requests.put(
            self.request_id, replace(virtual_request, is_cancelled=True)
        )
        return local_document({"status": "CANCELLATION_REQUESTED"}, self.request_id, 202)

    async def _release_hold(self, job: Job) -> bool:
        """Raises: ProxyError 503, the other holders of the job are unknown."""
        try:
            return await self.result_cache.release_hold(
                self.virtual_request.key, job, self.request_id
            )
        except StoreError as error:
            raise cache_unavailable("The request cannot be cancelled now.") from error

    async def _forward(self) -> web.StreamResponse:
        """Return fal's response about the job, with this id in place of the job's."""
        job, call = self.virtual_request.job, self.call
        assert job is not None
        target = call.target
        suffix = target.path.partition(f"/requests/{self.request_id}")[2]
        path = f"/{job.app}/requests/{job.request_id}{suffix}"
        self.request[CALL] = replace(
            call,
            target=Target(target.host, path, target.query),
            key=self.key_pool.find(job.key_mark) or call.key,
            needs_identity=True,
        )
        response = await self.handler(self.request)
        if isinstance(response, RelayedResponse):
            if target.operation is Operation.RESULT:
                await self._record_end(response)
            if job.request_id != self.request_id:
                await self._replace_id(response, job.request_id)
        return response

    async def _record_end(self, response: RelayedResponse) -> None:
        """End the shared call of a job whose leader has not done it yet, because its process may
        have ended: cache the result, or let no further call join a job without one."""
        breaker, virtual_request = self.result_cache.breaker, self.virtual_request
        store, key, job = breaker.store, virtual_request.key, virtual_request.job
        with suppress(StoreError):
            lookup = await breaker.call(store.get(key))
            record = lookup.shared_call
            if lookup.result is not None or record is None or job is None or record.job != job:
                return
            body = await response.document(self.cache_policy.max_entry)
            if body is None:
                return
            if is_storable(response.status, body):
                result = self.cache_policy.new_result(body, response.headers[hdrs.CONTENT_TYPE])
                await breaker.call(store.finish(key, record.owner_token, result))
                self.result_cache.spawn(self.cache_policy.rehost(breaker, key, result))
            elif is_job_end(response.status, response.headers, body):
                self.result_cache.single_flight.drop_job(key, job)
                failure = shared_failure(response.status, response.headers, body)
                content = serialize_outcome(CallOutcome(failure=failure), has_job=True)
                outcome = SharedOutcome(content) if content else None
                await breaker.call(store.finish(key, record.owner_token, None, outcome))

    async def _replace_id(self, response: RelayedResponse, job_request_id: str) -> None:
        if FAL_REQUEST_ID in response.headers:
            response.headers[FAL_REQUEST_ID] = self.request_id
        old, new = job_request_id.encode(), self.request_id.encode()
        operation = self.call.target.operation
        if operation is Operation.STATUS_STREAM:
            response.rewrite_lines(sync_rewrite(lambda lines: lines.replace(old, new)))
        elif operation is Operation.STATUS and (body := await response.document()) is not None:
            response.replace_document(body.replace(old, new))


def is_in_progress(lookup: Lookup) -> bool:
    shared_call = lookup.shared_call
    return shared_call is not None and shared_call.lease_left > -TAKEOVER_SECONDS


def encode(document: dict[str, object]) -> bytes:
    return json.dumps(document).encode()
