"""Result cache middleware: equal calls share one upstream call and its result."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from uuid import uuid4

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import CallerRefusal, ProxyError
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import app_of, normalized_path
from falproxy.fal.queue_documents import parse_submit_response
from falproxy.fal.target import QUEUE_HOST, Operation, Target
from falproxy.middleware.cache_policy import CACHED_RESULT, CachePolicy, result_keys
from falproxy.middleware.call_limits import CALL_LIMITS, ON_ADMITTED, OnAdmitted
from falproxy.middleware.image_inputs import INSPECTED_INPUT, NOT_INSPECTED, InspectedInput
from falproxy.proxy.call import CACHE_OUTCOME, CALL, LATE_OUTCOME, OWNER, REPEAT_IS_FREE, Call
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import any_request_id
from falproxy.proxy.local_responses import (
    CACHE_STATUS,
    LocalDocument,
    failure_response,
    result_response,
    set_cache_hit,
    shared_failure,
    submit_response,
)
from falproxy.proxy.queue_job import JobFollower
from falproxy.proxy.upstream import UPSTREAM, timed_out
from falproxy.stores.cache import CachedResult, Job, SharedFailure, StoreError, VirtualRequest
from falproxy.stores.cache.call_outcome import TOO_LARGE_BODY, CallOutcome
from falproxy.stores.cache.eligibility import (
    CacheEligibility,
    is_storable,
    parse_cache_control,
)
from falproxy.stores.cache.result_cache import ResultCache
from falproxy.stores.cache.single_flight import SharedCall, SharedCallFns
from falproxy.stores.cache.virtual_requests import new_virtual_id

NOT_CACHED_HEADERS = {CACHE_STATUS: "falproxy; detail=not-cached"}
START_TIMEOUT_HEADER, TIMEOUT_TYPE_HEADER = "x-fal-request-timeout", "x-fal-request-timeout-type"
SUBMIT_RESPONSE_MAX = 2**20  # bytes
RETRY_WINDOW = 60.0  # seconds in which clients repeat a failed call


def cache_results(
    eligibility: CacheEligibility,
    result_cache: ResultCache,
    key_pool: KeyPool,
    cache_policy: CachePolicy,
) -> Middleware:
    """Middleware: respond to a model call from the cache, or share an equal call in flight."""

    @any_request_id
    @web.middleware
    async def result_cache_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if not eligibility.is_cacheable(call.target):
            return await handler(request)
        try:
            return await CachedCall(request, handler, result_cache, key_pool, cache_policy).respond(
                request[INSPECTED_INPUT]
            )
        except ProxyError as error:
            status = "falproxy; fwd=miss"
            if request.get(CACHE_OUTCOME) == "collapsed":
                status += "; collapsed"
            raise error.with_headers({CACHE_STATUS: status}) from error

    return result_cache_middleware


class CachedCall:
    """One model call at the cache.

    response: fal's response, if this call was the one that was sent.
    was_sent: True if this call was the one that was sent.
    joined_at: time of the event loop at which the call arrived.
    ended_call: the shared call of another process that ended before this call could join its job.
    min_stored_at: seconds since 1970; older results are not used.
    """

    def __init__(
        self,
        request: web.Request,
        handler: Handler,
        result_cache: ResultCache,
        key_pool: KeyPool,
        cache_policy: CachePolicy,
    ) -> None:
        self.request = request
        self.call: Call = request[CALL]
        self.handler = handler
        self.result_cache = result_cache
        self.key_pool = key_pool
        self.cache_policy = cache_policy
        self.owner = request.get(OWNER, "")
        self.is_run = self.call.target.operation is Operation.RUN
        self.response: web.StreamResponse | None = None
        self.was_sent = False
        self.joined_at = asyncio.get_running_loop().time()
        self.ended_call: SharedCall | None = None
        self.client_left = False
        self.min_stored_at = 0.0

    def __repr__(self) -> str:
        return f"<CachedCall {self.call.method} {self.call.target.path}>"

    async def respond(self, inspected: InspectedInput) -> web.StreamResponse:
        """Return the response of the call, from the cache or from fal.

        An ordinary hit is found by the shared call (`_respond_shared`), which reads the store
        before it sends anything. The store is also read directly, if no call may be sent
        (`only-if-cached`), and for the key without image URLs (content key), which finds results
        for equal images from other URLs.
        """
        cache_control = parse_cache_control(self.call.headers.getall(hdrs.CACHE_CONTROL, ()))
        if inspected.bypass_reason is not None:
            if cache_control.only_if_cached:
                raise not_cached_error()
            return self.with_cache_status(
                await self.handler(self.request), "bypass", f"detail={inspected.bypass_reason}"
            )
        if cache_control.max_age is not None:
            self.min_stored_at = time.time() - cache_control.max_age
        keys = partial(result_keys, self.call, inspected, self.cache_policy, self.owner)
        content_key, source_key = await asyncio.to_thread(keys) if inspected.is_large else keys()
        if source_key != content_key and (result := await self._read_without_joining(content_key)):
            return await self._respond_hit(content_key, result)
        if cache_control.only_if_cached:
            if (result := await self._read_without_joining(source_key)) is None:
                raise not_cached_error()
            return await self._respond_hit(source_key, result)
        while (response := await self._respond_shared(source_key)) is None:
            pass  # the shared call ended without an outcome for this call
        return response

    async def _read_without_joining(self, key: str) -> CachedResult | None:
        """Return a cached result that is new enough."""
        breaker = self.result_cache.breaker
        try:
            result = (await breaker.call(breaker.store.get(key))).result
        except StoreError:
            return None
        if result is None or result.expires_at <= time.time():
            return None
        return result if result.stored_at > self.min_stored_at else None

    async def _respond_shared(self, key: str) -> web.StreamResponse | None:
        """Join or start the shared call of a key. Return None if it ended without an outcome for
        this call."""
        fns = SharedCallFns(
            self._send,
            self._await_job,
            self.is_run,
            self.min_stored_at,
            may_be_refused=CALL_LIMITS in self.request,
        )
        if (ended := self.ended_call) is not None:
            fns = replace(fns, awaited_token=ended.leader_token, known_outcome=ended.known_outcome)
            self.ended_call = None
        single_flight = self.result_cache.single_flight
        current = single_flight.find_call(key)
        is_refresh = current is not None and current.fns.min_stored_at > self.min_stored_at
        if is_refresh and (result := await self._read_without_joining(key)):
            return await self._respond_hit(key, result)  # another call requested a newer one
        shared_call = self.shared_call = single_flight.join_or_start(key, fns)
        async with shared_call.waiting():
            try:
                job = await asyncio.shield(shared_call.accepted)
                if self.is_run and not await self._wait_done(shared_call, job):
                    return None
            except asyncio.CancelledError:
                self._on_disconnect(shared_call)
                raise
            return await self._respond_accepted(shared_call)

    async def _wait_done(self, shared_call: SharedCall, job: Job | None) -> bool:
        """Wait for the end of a shared call. Return False if its job is not in flight any more."""
        if job is None:
            await asyncio.shield(shared_call.done)
            return True
        holder = uuid4().hex
        holding = self._start_hold(shared_call, job, holder)
        try:
            if not await asyncio.shield(holding):
                self.ended_call = shared_call
                return False
            await asyncio.shield(shared_call.done)
        except asyncio.CancelledError:
            self.result_cache.spawn(self._release_hold(shared_call, job, holder, holding))
            raise
        return True

    def _start_hold(self, shared_call: SharedCall, job: Job, holder: str) -> "asyncio.Task[bool]":
        """Start to register a holder. The task is not cancelled if the client leaves: the store
        could execute it after the release."""
        hold = self.result_cache.acquire_hold(shared_call, job, holder)
        return asyncio.get_running_loop().create_task(hold)

    async def _release_hold(
        self, shared_call: SharedCall, job: Job, holder: str, holding: "asyncio.Task[bool]"
    ) -> None:
        """Release a hold; cancel the job upstream if it was the last one."""
        await asyncio.wait([holding])
        with suppress(StoreError):
            if await self.result_cache.release_hold(shared_call.key, job, holder):
                await self._job_follower(job).cancel()

    async def _respond_accepted(self, shared_call: SharedCall) -> web.StreamResponse | None:
        job = shared_call.accepted.result()
        outcome = shared_call.done.result() if shared_call.done.done() else None
        if self.response is not None and job is not None:
            virtual_request = VirtualRequest(shared_call.key, self.owner, job.app, job)
            await self.result_cache.virtual_requests.put(job.request_id, virtual_request)
            return self.with_cache_status(self.response, "miss")
        if outcome is None:
            return await self._respond_joined(shared_call, job)
        if outcome.ended_at is not None and outcome.ended_at < self.joined_at:
            return None  # another process ended the call before this one arrived
        if outcome.error is not None:
            if isinstance(outcome.error, CallerRefusal) and not self.was_sent:
                return None
            if not self.was_sent:
                self.request[CACHE_OUTCOME] = "collapsed"
            raise outcome.error
        self._mark_cached(outcome.result if outcome.is_stored else None)
        if self.response is not None:
            detail = "stored" if outcome.is_stored else ""
            return self.with_cache_status(self.response, "miss", detail)
        return await self._respond_unsent(shared_call.key, outcome, job)

    async def _respond_unsent(
        self, key: str, outcome: CallOutcome, job: Job | None
    ) -> web.StreamResponse | None:
        """Return the response to a call that was not sent, because another one was or the store had
        the result. None: it has to be sent."""
        if outcome.failure is not None:
            return self.with_cache_status(
                failure_response(outcome.failure, new_virtual_id()), "miss", "collapsed"
            )
        if outcome.result is None:
            return await self._respond_unshared(job) if outcome.was_executed else None
        if outcome.was_executed:
            response = await self._result_response(key, outcome.result)
            return self.with_cache_status(response, "miss", "collapsed")
        if outcome.result.stored_at <= self.min_stored_at:
            return None
        return await self._respond_hit(key, outcome.result)

    async def _respond_unshared(self, job: Job | None) -> web.StreamResponse:
        """Send the call, because the response to an equal one is too large to be shared. fal still
        has the response of a job."""
        if job is None:
            response = await self.handler(self.request)
            return self.with_cache_status(response, "miss", "detail=not-shareable")
        return self.with_cache_status(await self._fetch_result(job), "miss", "collapsed")

    async def _fetch_result(self, job: Job) -> web.StreamResponse:
        """Return fal's response about a job whose result is too large to be shared."""
        self.request[CALL] = replace(
            self.call,
            method=hdrs.METH_GET,
            target=Target(QUEUE_HOST, f"/{job.app}/requests/{job.request_id}", ""),
            body=None,
            length=None,
            tags=None,
            key=self.key_pool.find(job.key_mark) or self.call.key,
        )
        return await self.handler(self.request)

    async def _respond_hit(self, key: str, result: CachedResult) -> web.StreamResponse:
        self.request[CACHE_OUTCOME] = "hit"
        self._mark_cached(result)
        return set_cache_hit(await self._result_response(key, result), result)

    def _mark_cached(self, result: CachedResult | None) -> None:
        """Mark the request if a repeated call would be a hit for at least RETRY_WINDOW seconds."""
        ttl = 0.0 if result is None or self.min_stored_at else result.expires_at - time.time()
        if ttl > RETRY_WINDOW:
            self.request[REPEAT_IS_FREE] = True

    async def _result_response(self, key: str, result: CachedResult) -> LocalDocument:
        """Return the result to a direct call, and a virtual id of it to a submit."""
        request_id = new_virtual_id()
        self.request[CACHED_RESULT] = result
        if self.is_run:
            return result_response(result, request_id)
        virtual_request = VirtualRequest(key, self.owner, self._app)
        await self.result_cache.virtual_requests.put(request_id, virtual_request, result)
        return submit_response(self._app, request_id)

    async def _respond_joined(
        self, shared_call: SharedCall, job: Job | None
    ) -> web.StreamResponse | None:
        """Return a virtual id to a submit that joined a job, or a direct call in flight."""
        request_id = new_virtual_id()
        app = job.app if job else self._app
        virtual_request = VirtualRequest(shared_call.key, self.owner, app, job)
        if job is None:
            shared_call.pending_ids.add(request_id)
            await self.result_cache.virtual_requests.put(request_id, virtual_request)
            self.result_cache.resolve_when_done(shared_call, request_id, virtual_request)
            return self.with_cache_status(submit_response(app, request_id), "miss", "collapsed")
        holding = self._start_hold(shared_call, job, request_id)
        try:
            if not await asyncio.shield(holding):
                self.ended_call = shared_call
                return None
            await self.result_cache.virtual_requests.put(request_id, virtual_request)
        except asyncio.CancelledError:
            self.result_cache.spawn(self._release_hold(shared_call, job, request_id, holding))
            raise
        if shared_call.is_abandoned:
            # No client received fal's own id, so that its hold would never be released.
            shared_call.is_abandoned = False
            with suppress(StoreError):
                await self.result_cache.release_hold(shared_call.key, job, job.request_id)
        return self.with_cache_status(submit_response(app, request_id), "miss", "collapsed")

    @property
    def _app(self) -> str:
        return app_of(normalized_path(self.call.target).strip("/"))

    async def _send(self) -> Job | CallOutcome:
        """Send the call upstream, for all calls that share it; its own client may have left."""
        try:
            return await self._send_upstream()
        finally:
            # Free the body, which is not sent again: the job may take hours.
            self.call = replace(self.call, body=None)
            self.request[CALL] = replace(self.request[CALL], body=None)
            self.request[INSPECTED_INPUT] = NOT_INSPECTED

    async def _send_upstream(self) -> Job | CallOutcome:
        self.was_sent = True
        self.request[CALL] = replace(self.call, needs_identity=True)
        if CALL_LIMITS in self.request and self.is_run:
            accept = partial(self.shared_call.mark_accepted, None)
            self.request[ON_ADMITTED] = OnAdmitted(accept)
        response = self.response = await self.handler(self.request)
        if not isinstance(response, RelayedResponse):
            return CallOutcome()
        body = await response.read(
            self.cache_policy.max_entry if self.is_run else SUBMIT_RESPONSE_MAX
        )
        if body is None:
            if self.client_left:
                response.discard()
            is_error = response.status >= web.HTTPBadRequest.status_code
            return CallOutcome(failure=too_large_failure(response) if is_error else None)
        if START_TIMEOUT_HEADER in self.call.headers and TIMEOUT_TYPE_HEADER in response.headers:
            return CallOutcome(was_executed=False)  # the start time-out is this caller's own
        if self.is_run or response.status != web.HTTPOk.status_code:
            return self._to_outcome(response.status, response.headers, body)
        return self._to_job(response, body)

    def _to_job(self, response: RelayedResponse, body: bytes) -> Job | CallOutcome:
        """Return the job of a submit that fal accepted. A response without one is shared, since fal
        may have accepted a job nevertheless."""
        if (submitted := parse_submit_response(body)) is None:
            failure = shared_failure(response.status, response.headers, body)
            return CallOutcome(failure=failure)
        request_id, app = submitted
        fingerprint = self.call.key.fingerprint if self.call.key else ""
        return Job(request_id, app or self._app, fingerprint)

    async def _await_job(self, job: Job) -> CallOutcome:
        try:
            job_result = await self._job_follower(job).wait_result(self.cache_policy.max_entry)
        except TimeoutError as error:
            raise timed_out(is_repeatable=False) from error
        if self.cache_policy.settle_job is not None:
            settle = self.cache_policy.settle_job
            await settle(job.request_id, job_result.status, job_result.headers)
        if job_result.body is None:
            return CallOutcome()
        return self._to_outcome(job_result.status, job_result.headers, job_result.body)

    def _job_follower(self, job: Job) -> JobFollower:
        upstream, key = self.request.app[UPSTREAM], self.key_pool.find(job.key_mark)
        return JobFollower(upstream, job.app, job.request_id, key, self.result_cache.stream_slots)

    def _to_outcome(self, status: int, headers: Mapping[str, str], body: bytes) -> CallOutcome:
        if self.client_left and (late := self.request.get(LATE_OUTCOME)) is not None:
            late.report(status, headers)
        if not is_storable(status, body):
            return CallOutcome(failure=shared_failure(status, headers, body))
        result = self.cache_policy.new_result(
            body, headers.get(hdrs.CONTENT_TYPE, "application/json")
        )
        self.result_cache.spawn(self._rehost(result))
        return CallOutcome(result)

    async def _rehost(self, result: CachedResult) -> None:
        if (await asyncio.shield(self.shared_call.done)).is_stored:
            await self.cache_policy.rehost(self.result_cache.breaker, self.shared_call.key, result)

    def _on_disconnect(self, shared_call: SharedCall) -> None:
        """Record that the client left. An unread response must not occupy a connection."""
        self.client_left = True
        shared_call.is_abandoned |= shared_call.fns.send == self._send and not self.is_run
        if shared_call.done.done() and isinstance(self.response, RelayedResponse):
            self.response.discard()

    def with_cache_status(
        self, response: web.StreamResponse, outcome: str, *details: str
    ) -> web.StreamResponse:
        """Add the Cache-Status header (RFC 9211), and record the outcome for the access log."""
        forward_reason = "request" if self.min_stored_at else outcome
        parameters = [f"falproxy; fwd={forward_reason}", *(detail for detail in details if detail)]
        response.headers.add(CACHE_STATUS, "; ".join(parameters))
        self.request[CACHE_OUTCOME] = "collapsed" if "collapsed" in details else outcome
        return response


def too_large_failure(response: web.StreamResponse) -> SharedFailure:
    """Return an error response of fal with a body of ours, because fal's cannot be shared."""
    failure = shared_failure(response.status, response.headers, TOO_LARGE_BODY)
    return replace(failure, content_type="application/json")


def not_cached_error() -> ProxyError:
    return ProxyError(504, "not_cached", "There is no result of this call.", NOT_CACHED_HEADERS)
