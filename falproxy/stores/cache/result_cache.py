"""Everything of the result cache that one process has, and how long it is open."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path

from aiohttp import web

from falproxy.errors import SettingsError
from falproxy.stores.cache import CacheStore, Job, SharedFailure, StoreError, VirtualRequest
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.single_flight import SharedCall, SingleFlight
from falproxy.stores.cache.sqlite import SqliteStore
from falproxy.stores.cache.virtual_ids import VirtualRequests

# How a direct call ended whose answer cannot be given to anybody else.
UNSHAREABLE_FAILURE = SharedFailure(
    500,
    "application/json",
    b'{"detail": "The call that this request waited for failed.", "error_type": "internal_error"}',
)


# Status streams to fal at once, of the jobs that are followed here.
MAX_STATUS_STREAMS = 64
SHUTDOWN_TIMEOUT = 5.0  # seconds for what nobody waits for, at the end


class ResultCache:
    """guard: the way to the store. flights: calls that are on their way. claims: what the request
    ids stand for that were handed out. streams: the turns of status streams."""

    def __init__(self, store: CacheStore) -> None:
        self.breaker = StoreBreaker(store)
        self.single_flight = SingleFlight(self.breaker)
        self.virtual_requests = VirtualRequests(self.breaker)
        self.stream_slots = asyncio.Semaphore(MAX_STATUS_STREAMS)
        self._background_tasks: set[asyncio.Task[None]] = set()

    def resolve_when_done(
        self, shared_call: SharedCall, request_id: str, virtual_request: VirtualRequest
    ) -> None:
        """Has an id that waits for a direct call hear how it ended."""
        self.spawn(self._resolve(shared_call, request_id, virtual_request))

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Has something done that nobody waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._background_tasks.add(task)
        task.add_done_callback(self._background_tasks.discard)

    async def acquire_hold(self, shared_call: SharedCall, job: Job, holder: str) -> bool:
        """Has a job go on as long as this holder wants it. False: it does not any more."""
        shared_call.job_holders.add(holder)
        if not shared_call.is_job_stored:
            return True
        try:
            is_held = await self.breaker.call(
                self.breaker.store.add_holder(shared_call.key, job.request_id, holder)
            )
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
        flight = self.single_flight.find_call(key)
        if flight is not None and not flight.has_job(job):
            flight = None
        others = False
        if flight is not None:
            flight.job_holders.discard(holder)
            others = bool(flight.job_holders)
        is_last = not others
        if flight is None or flight.is_job_stored:
            left = await self.breaker.call(
                self.breaker.store.remove_holder(key, job.request_id, holder)
            )
            is_last = is_last if left is None else left  # None: it has forgotten the job
        if is_last:
            self.single_flight.drop_job(key, job)
        return is_last

    async def _resolve(
        self, shared_call: SharedCall, request_id: str, virtual_request: VirtualRequest
    ) -> None:
        landing = await asyncio.shield(shared_call.done)
        known = self.virtual_requests.peek(request_id)
        if known is not None and known.is_cancelled:
            return
        failure = landing.failure if landing.result or landing.failure else UNSHAREABLE_FAILURE
        await self.virtual_requests.put(
            request_id, replace(virtual_request, failure=failure), landing.result
        )

    async def close(self, grace_period: float) -> None:
        """Lets direct calls end within so many seconds, and tells whoever waits for them."""
        await self.single_flight.close(grace_period)
        if self._background_tasks:
            await asyncio.wait(self._background_tasks, timeout=SHUTDOWN_TIMEOUT)
        for task in self._background_tasks:
            task.cancel()


def result_cache_context(
    result_cache: ResultCache, grace_period: float
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the store is open exactly as long as the application. At the end, direct
    calls that are paid for have so many seconds to finish."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        async with result_cache.breaker:
            yield
            await result_cache.close(grace_period)

    return context


def choose_store(redis_url: str | None, data_dir: Path, max_size: int) -> CacheStore:
    """Where results are kept: in Redis for several machines, else in a file that the processes
    of one share. Raises: SettingsError, the Redis client is not installed, or the URL is none."""
    if redis_url is None:
        return SqliteStore(data_dir / "results.sqlite", max_size=max_size)
    try:
        from falproxy.stores.cache.redis import RedisStore
    except ModuleNotFoundError as error:
        needed = f"REDIS_URL needs {error.name}: pip install 'falproxy[redis]'."
        raise SettingsError(needed) from error
    try:
        return RedisStore(redis_url)
    except ValueError:
        raise SettingsError("REDIS_URL is not the URL of a Redis server.") from None
