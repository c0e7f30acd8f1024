"""Everything of the result cache that one process has, and how long it is open."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path

from aiohttp import web

from falproxy.errors import SettingsError
from falproxy.stores.cache import Claim, Failure, Job, Store, StoreError
from falproxy.stores.cache.circuit_breaker import Guard
from falproxy.stores.cache.single_flight import Flights, SharedCall
from falproxy.stores.cache.sqlite import SqliteStore
from falproxy.stores.cache.virtual_ids import Claims

# How a direct call ended whose answer cannot be given to anybody else.
BROKEN = Failure(
    500,
    "application/json",
    b'{"detail": "The call that this request waited for failed.", "error_type": "internal_error"}',
)


# Status streams to fal at once, of the jobs that are followed here.
STREAMS = 64
LAST_WORDS = 5.0  # seconds for what nobody waits for, at the end


class Shelf:
    """guard: the way to the store. flights: calls that are on their way. claims: what the request
    ids stand for that were handed out. streams: the turns of status streams."""

    def __init__(self, store: Store) -> None:
        self.guard = Guard(store)
        self.flights = Flights(self.guard)
        self.claims = Claims(self.guard)
        self.streams = asyncio.Semaphore(STREAMS)
        self._settling: set[asyncio.Task[None]] = set()

    def settle(self, shared: SharedCall, request_id: str, claim: Claim) -> None:
        """Has an id that waits for a direct call hear how it ended."""
        self.see_to(self._settle(shared, request_id, claim))

    def see_to(self, work: Coroutine[object, object, None]) -> None:
        """Has something done that nobody waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def hold(self, shared: SharedCall, job: Job, holder: str) -> bool:
        """Has a job go on as long as this holder wants it. False: it does not any more."""
        shared.holders.add(holder)
        if not shared.is_known:
            return True
        try:
            is_held = await self.guard.ask(
                self.guard.store.join(shared.key, job.request_id, holder)
            )
        except StoreError:
            return True
        if not is_held and not shared.landed.done():
            self.flights.forget(shared.key, job)
        return is_held

    async def release_hold(self, key: str, job: Job, holder: str) -> bool:
        """Give up one holder's interest in a shared job. Return True if it was the last one: new
        calls no longer join the job, and the caller should cancel it upstream.

        Raises: StoreError, the store that knows the other holders cannot be reached.
        """
        flight = self.flights.find(key)
        if flight is not None and not flight.is_of(job):
            flight = None
        others = False
        if flight is not None:
            flight.holders.discard(holder)
            others = bool(flight.holders)
        is_last = not others
        if flight is None or flight.is_known:
            left = await self.guard.ask(self.guard.store.leave(key, job.request_id, holder))
            is_last = is_last if left is None else left  # None: it has forgotten the job
        if is_last:
            self.flights.forget(key, job)
        return is_last

    async def _settle(self, shared: SharedCall, request_id: str, claim: Claim) -> None:
        landing = await asyncio.shield(shared.landed)
        known = self.claims.peek(request_id)
        if known is not None and known.is_cancelled:
            return
        failure = landing.failure if landing.result or landing.failure else BROKEN
        await self.claims.put(request_id, replace(claim, failure=failure), landing.result)

    async def close(self, patience: float) -> None:
        """Lets direct calls end within so many seconds, and tells whoever waits for them."""
        await self.flights.close(patience)
        if self._settling:
            await asyncio.wait(self._settling, timeout=LAST_WORDS)
        for task in self._settling:
            task.cancel()


def keep_results(shelf: Shelf, patience: float) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the store is open exactly as long as the application. At the end, direct
    calls that are paid for have so many seconds to finish."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        async with shelf.guard:
            yield
            await shelf.close(patience)

    return context


def choose_store(redis_url: str | None, data_dir: Path, max_size: int) -> Store:
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
