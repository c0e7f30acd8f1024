"""Results that are reused: of equal calls one is made, and its result serves them all."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from uuid import uuid4

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import app_of, normalized_path
from falproxy.fal.target import Operation
from falproxy.middleware.cache_policy import CACHED_RESULT, CachePolicy, result_keys
from falproxy.middleware.image_inputs import INSPECTED_INPUT, NOT_INSPECTED, InspectedInput
from falproxy.proxy.call import CACHE_OUTCOME, CALL, LATE_OUTCOME, OWNER, RESULT_CACHED, Call
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.local_responses import (
    CACHE_STATUS,
    LocalDocument,
    failure_response,
    result_response,
    set_cache_hit,
    shared_failure,
    submit_response,
)
from falproxy.proxy.queue_job import QueueJob
from falproxy.proxy.upstream import UPSTREAM, timed_out
from falproxy.stores.cache import CachedResult, Job, StoreError, VirtualRequest
from falproxy.stores.cache.eligibility import (
    CacheEligibility,
    is_storable,
    parse_cache_control,
    parse_submit_response,
)
from falproxy.stores.cache.result_cache import ResultCache
from falproxy.stores.cache.single_flight import CallOutcome, SharedCall, SharedCallFns
from falproxy.stores.cache.virtual_ids import new_virtual_id

NOT_CACHED_HEADERS = {CACHE_STATUS: "falproxy; detail=not-cached"}
START_TIMEOUT_HEADER, TIMEOUT_TYPE_HEADER = "x-fal-request-timeout", "x-fal-request-timeout-type"
SUBMIT_RESPONSE_MAX = 2**20  # bytes of an answer to a submit
RETRY_WINDOW = 60.0  # seconds in which clients make a call again that failed


def cache_results(
    eligibility: CacheEligibility,
    result_cache: ResultCache,
    key_pool: KeyPool,
    cache_policy: CachePolicy,
) -> Middleware:
    """Middleware: a model call whose result is there, or on its way, is not sent to fal."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if not eligibility.is_cacheable(call.method, call.target):
            return await handler(request)
        try:
            return await CachedCall(request, handler, result_cache, key_pool, cache_policy).respond(
                request[INSPECTED_INPUT]
            )
        except ProxyError as error:
            error.headers = {CACHE_STATUS: "falproxy; fwd=miss", **error.headers}
            raise

    return middleware


class CachedCall:
    """One call on its way through the cache. response: fal's, if it was this one that was sent."""

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
        self.client_left = False
        self.min_stored_at = 0.0

    async def respond(self, inspected: InspectedInput) -> web.StreamResponse:
        directives = parse_cache_control(self.call.headers.getall(hdrs.CACHE_CONTROL, ()))
        if inspected.bypass_reason is not None:
            if directives.only_if_cached:
                raise not_cached_error()
            return self.with_cache_status(
                await self.handler(self.request), "bypass", f"detail={inspected.bypass_reason}"
            )
        if directives.max_age is not None:
            self.min_stored_at = time.time() - directives.max_age
        named = partial(result_keys, self.call, inspected, self.cache_policy, self.owner)
        common, own = await asyncio.to_thread(named) if inspected.is_large else named()
        if own != common and (result := await self._lookup(common)):
            return await self._respond_hit(common, result)
        if directives.only_if_cached:
            if (result := await self._lookup(own)) is None:
                raise not_cached_error()
            return await self._respond_hit(own, result)
        while (response := await self._respond_shared(own)) is None:
            pass  # the flight ended before it began
        return response

    async def _lookup(self, key: str) -> CachedResult | None:
        """A result that will do, without taking part in any flight."""
        try:
            found = await self.result_cache.breaker.call(self.result_cache.breaker.store.get(key))
        except StoreError:
            return None
        result = found.result
        if result is None or result.expires_at <= time.time():
            return None
        return result if result.stored_at > self.min_stored_at else None

    async def _respond_shared(self, key: str) -> web.StreamResponse | None:
        """The answer, by the key's flight. None: it was over before this call got anything."""
        errand = SharedCallFns(self._send, self._await_job, self.is_run, self.min_stored_at)
        known = self.result_cache.single_flight.find_call(key)
        is_refresh = known is not None and known.fns.min_stored_at > self.min_stored_at
        if is_refresh and (result := await self._lookup(key)):
            return await self._respond_hit(key, result)  # somebody else asked for a new one
        shared = self.shared_call = self.result_cache.single_flight.join_or_start(key, errand)
        async with shared.waiting():
            try:
                job = await asyncio.shield(shared.accepted)
                if self.is_run and not await self._wait_done(shared, job):
                    return None
            except asyncio.CancelledError:
                self._on_disconnect(shared)
                raise
            return await self._respond_accepted(shared)

    async def _wait_done(self, shared_call: SharedCall, job: Job | None) -> bool:
        """Waits for the end of a flight. False: it is not going to have one for this call."""
        if job is None:
            await asyncio.shield(shared_call.done)
            return True
        holder = uuid4().hex
        try:
            if not await self.result_cache.acquire_hold(shared_call, job, holder):
                return False
            await asyncio.shield(shared_call.done)
        except asyncio.CancelledError:
            self.result_cache.spawn(self._release_hold(shared_call, job, holder))
            raise
        return True

    async def _release_hold(self, shared_call: SharedCall, job: Job, holder: str) -> None:
        """One who waited left. When all the others have cancelled, nobody wants the job."""
        with suppress(StoreError):
            if await self.result_cache.release_hold(shared_call.key, job, holder):
                await self._queue_job(job).cancel()

    async def _respond_accepted(self, shared_call: SharedCall) -> web.StreamResponse | None:
        job = shared_call.accepted.result()
        landing = shared_call.done.result() if shared_call.done.done() else None
        if self.response is not None and job is not None:
            claim = VirtualRequest(shared_call.key, self.owner, job.app, job)
            await self.result_cache.virtual_requests.put(job.request_id, claim)
            return self.with_cache_status(self.response, "miss")
        if landing is None:
            return await self._respond_joined(shared_call, job)
        if landing.error is not None:
            raise landing.error
        self._mark_cached(landing.result if landing.is_stored else None)
        if self.response is not None:
            return self.with_cache_status(
                self.response, "miss", "stored" if landing.is_stored else ""
            )
        return await self._respond_follower(shared_call.key, landing)

    async def _respond_follower(self, key: str, outcome: CallOutcome) -> web.StreamResponse | None:
        """What a flight's end is for a call that did not make it."""
        if outcome.failure is not None:
            return self.with_cache_status(
                failure_response(outcome.failure, new_virtual_id()), "miss", "collapsed"
            )
        if outcome.result is None:
            if not outcome.was_executed:
                return None
            return self.with_cache_status(
                await self.handler(self.request), "miss", "detail=not-shareable"
            )
        if outcome.was_executed:
            response = await self._result_response(key, outcome.result)
            return self.with_cache_status(response, "miss", "collapsed")
        if outcome.result.stored_at <= self.min_stored_at:
            return None
        return await self._respond_hit(key, outcome.result)

    async def _respond_hit(self, key: str, result: CachedResult) -> web.StreamResponse:
        self.request[CACHE_OUTCOME] = "hit"
        self._mark_cached(result)
        return set_cache_hit(await self._result_response(key, result), result)

    def _mark_cached(self, result: CachedResult | None) -> None:
        """Whether the call can be made again for nothing: what it takes is kept for a while."""
        left = 0.0 if result is None or self.min_stored_at else result.expires_at - time.time()
        if left > RETRY_WINDOW:
            self.request[RESULT_CACHED] = True

    async def _result_response(self, key: str, result: CachedResult) -> LocalDocument:
        """A result for a direct call; for a submit, an id that stands for it."""
        request_id = new_virtual_id()
        self.request[CACHED_RESULT] = result
        if self.is_run:
            return result_response(result, request_id)
        claim = VirtualRequest(key, self.owner, self._app)
        await self.result_cache.virtual_requests.put(request_id, claim, result)
        return submit_response(claim.app, request_id)

    async def _respond_joined(
        self, shared_call: SharedCall, job: Job | None
    ) -> web.StreamResponse | None:
        """An id of its own for a submit that shares fal's job, or waits for a direct call."""
        request_id = new_virtual_id()
        claim = VirtualRequest(shared_call.key, self.owner, job.app if job else self._app, job)
        if job is None:
            shared_call.pending_ids.add(request_id)
            await self.result_cache.virtual_requests.put(request_id, claim)
            self.result_cache.resolve_when_done(shared_call, request_id, claim)
            return self.with_cache_status(
                submit_response(claim.app, request_id), "miss", "collapsed"
            )
        try:
            if not await self.result_cache.acquire_hold(shared_call, job, request_id):
                return None
            await self.result_cache.virtual_requests.put(request_id, claim)
        except asyncio.CancelledError:
            self.result_cache.spawn(self._release_hold(shared_call, job, request_id))
            raise
        if (
            shared_call.is_abandoned
        ):  # nobody knows fal's own id, so that it could never be given up
            shared_call.is_abandoned = False
            with suppress(StoreError):
                await self.result_cache.release_hold(shared_call.key, job, job.request_id)
        return self.with_cache_status(submit_response(claim.app, request_id), "miss", "collapsed")

    @property
    def _app(self) -> str:
        return app_of(normalized_path(self.call.target).strip("/"))

    async def _send(self) -> Job | CallOutcome:
        """Makes the call itself. Whoever asked for it may have left: it goes on for the others."""
        try:
            return await self._send_upstream()
        finally:
            # The job may take hours, and nobody sends this again: its body is let go.
            self.call = replace(self.call, body=None)
            self.request[CALL] = replace(self.request[CALL], body=None)
            self.request[INSPECTED_INPUT] = NOT_INSPECTED

    async def _send_upstream(self) -> Job | CallOutcome:
        self.request[CALL] = replace(self.call, needs_identity=True)
        response = self.response = await self.handler(self.request)
        if not isinstance(response, RelayedResponse):
            return CallOutcome()
        body = await response.read(
            self.cache_policy.max_entry if self.is_run else SUBMIT_RESPONSE_MAX
        )
        if body is None:
            if self.client_left:
                response.discard()
            return CallOutcome()
        if START_TIMEOUT_HEADER in self.call.headers and TIMEOUT_TYPE_HEADER in response.headers:
            return CallOutcome(was_executed=False)  # this caller was in a hurry, others may not be
        if self.is_run or response.status != web.HTTPOk.status_code:
            return self._to_outcome(response.status, response.headers, body)
        if (request := parse_submit_response(body)) is None:
            return CallOutcome()
        mark = self.call.key.fingerprint if self.call.key else ""
        return Job(request[0], request[1] or self._app, mark)

    async def _await_job(self, job: Job) -> CallOutcome:
        try:
            ending = await self._queue_job(job).wait_result(self.cache_policy.max_entry)
        except TimeoutError as error:
            raise timed_out(hdrs.METH_POST) from error
        if ending.body is None:
            return CallOutcome()
        return self._to_outcome(ending.status, ending.headers, ending.body)

    def _queue_job(self, job: Job) -> QueueJob:
        upstream, key = self.request.app[UPSTREAM], self.key_pool.find(job.key_mark)
        return QueueJob(upstream, job.app, job.request_id, key, self.result_cache.stream_slots)

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
        """The client left. An answer that nobody reads any more must not keep a connection."""
        self.client_left = True
        shared_call.is_abandoned |= shared_call.fns.send == self._send and not self.is_run
        if shared_call.done.done() and isinstance(self.response, RelayedResponse):
            self.response.discard()

    def with_cache_status(
        self, response: web.StreamResponse, outcome: str, *details: str
    ) -> web.StreamResponse:
        """Puts on the answer what became of the call (RFC 9211), and into the log."""
        forwarded = "request" if self.min_stored_at else outcome
        said = [f"falproxy; fwd={forwarded}", *(word for word in details if word)]
        response.headers.add(CACHE_STATUS, "; ".join(said))
        self.request[CACHE_OUTCOME] = "collapsed" if "collapsed" in details else outcome
        return response


def not_cached_error() -> ProxyError:
    return ProxyError(504, "not_cached", "There is no result of this call.", NOT_CACHED_HEADERS)
