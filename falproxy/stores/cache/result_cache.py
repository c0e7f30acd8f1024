"""The result cache of one process, and its cleanup context."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from functools import partial

from aiohttp import web

from falproxy.background import time_left
from falproxy.concurrency import cancel_tasks
from falproxy.stores.cache import (
    CacheStore,
    Job,
    Lookup,
    SharedFailure,
    StoreError,
    VirtualRequest,
)
from falproxy.stores.cache.call_outcome import error_failure
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.lookups import Lookups
from falproxy.stores.cache.single_flight import SharedCall, SingleFlight
from falproxy.stores.cache.virtual_requests import SETTLE_SECONDS, VirtualRequests

# For calls that waited for a direct call whose response cannot be shared.
UNSHAREABLE_FAILURE = SharedFailure(
    500,
    "application/json",
    b'{"detail": "The call that this request waited for failed.", "error_type": "internal_error"}',
)
MAX_STATUS_STREAMS = 64  # to fal
SHUTDOWN_TIMEOUT = 5.0  # seconds that background tasks have at the end


class ResultCache:
    """The parts of the result cache that all requests of a process share.

    breaker: circuit breaker of the store.
    single_flight: calls in flight.
    stream_slots: limits the concurrent status streams to fal.
    lease: as in `SingleFlight`.
    """

    def __init__(self, store: CacheStore, lease: float | None = None) -> None:
        self.breaker = StoreBreaker(store)
        self.single_flight = SingleFlight(self.breaker, lease)
        self.virtual_requests = VirtualRequests(self.breaker)
        self.stream_slots = asyncio.Semaphore(MAX_STATUS_STREAMS)
        self._lookups = Lookups(self.breaker.check_complete, SETTLE_SECONDS)
        self._background_tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return (
            f"<ResultCache {self.breaker!r}, {self.single_flight!r}, {self.virtual_requests!r},"
            f" {len(self._background_tasks)} background tasks>"
        )

    async def find(self, key: str) -> Lookup | None:
        """Return the result or the shared call of a key, None if it is certain that there is
        neither.

        Raises: StoreError, the store cannot be read, or was emptied just now, so that a leader may
            not have noticed yet.
        """
        return await self._lookups.find(partial(self._read, key), wait_for_store=False)

    async def _read(self, key: str) -> Lookup | None:
        lookup = await self.breaker.call(self.breaker.store.get(key))
        is_empty = lookup.result is None and lookup.shared_call is None
        return None if is_empty and not lookup.last_outcome else lookup

    def resolve_when_done(
        self, shared_call: SharedCall, request_id: str, virtual_request: VirtualRequest
    ) -> None:
        """Give a virtual id the outcome of the direct call that it stands for."""
        self.spawn(self._resolve(shared_call, request_id, virtual_request))

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background_tasks.add(task)
        task.add_done_callback(self._background_tasks.discard)

    async def acquire_hold(self, shared_call: SharedCall, job: Job, holder: str) -> bool:
        """Register a holder of a job: it is not cancelled upstream while there are holders. Return
        False if the job is not in flight any more."""
        shared_call.job_holders.add(holder)
        if not shared_call.is_job_stored:
            return True
        try:
            operation = self.breaker.store.add_holder(shared_call.key, job.request_id, holder)
            is_held = await self.breaker.call(operation)
        except StoreError:
            return True
        if not is_held and not shared_call.done.done():
            self.single_flight.drop_job(shared_call.key, job)
        return is_held

    async def release_hold(self, key: str, job: Job, holder: str) -> bool:
        """Give up one holder's interest in a shared job. Return True if it was the last one: new
        calls no longer join the job, and the caller should cancel it upstream.

        Raises: StoreError, the store that knows the other holders cannot be reached.
        """
        shared_call = self.single_flight.find_call(key)
        if shared_call is not None and not shared_call.has_job(job):
            shared_call = None
        has_others = False
        if shared_call is not None:
            shared_call.job_holders.discard(holder)
            has_others = bool(shared_call.job_holders)
        is_last = not has_others
        if shared_call is None or shared_call.is_job_stored:
            operation = self.breaker.store.remove_holder(key, job.request_id, holder)
            was_last = await self.breaker.call(operation)
            is_last = is_last if was_last is None else was_last  # None: unknown to the store
        if is_last:
            self.single_flight.drop_job(key, job)
        return is_last

    async def _resolve(
        self, shared_call: SharedCall, request_id: str, virtual_request: VirtualRequest
    ) -> None:
        outcome = await asyncio.shield(shared_call.done)
        current = self.virtual_requests.peek(request_id)
        if current is not None and current.is_cancelled:
            return
        failure = outcome.failure
        if outcome.error is not None:
            failure = error_failure(outcome.error)
        elif outcome.result is None and failure is None:
            failure = UNSHAREABLE_FAILURE
        await self.virtual_requests.put(
            request_id, replace(virtual_request, failure=failure), outcome.result
        )

    async def close(self, grace_period: float) -> None:
        """Wait for direct calls and for background tasks, then cancel them.

        grace_period: seconds for the direct calls, and again for the tasks.
        """
        await self.single_flight.close(grace_period)
        if self._background_tasks:
            await asyncio.wait(self._background_tasks, timeout=min(SHUTDOWN_TIMEOUT, grace_period))
        await cancel_tasks(tuple(self._background_tasks))


RESULT_CACHE = web.AppKey("falproxy.result_cache", ResultCache)


def result_cache_context(
    result_cache: ResultCache, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the store is open exactly as long as the application.

    grace_period: seconds that direct calls, which are paid for, have to finish at the end.
    """

    async def result_cache_context(app: web.Application) -> AsyncIterator[None]:
        async with result_cache.breaker:
            yield
            await result_cache.close(time_left(app, grace_period))

    return result_cache_context
