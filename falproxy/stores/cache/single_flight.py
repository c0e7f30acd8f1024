"""Single-flight: of equal calls one goes to fal, whoever makes them, here or in another process."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from uuid import uuid4

from falproxy.errors import ProxyError
from falproxy.stores.cache import Failure, Found, Job, Result, StoreError, Wish
from falproxy.stores.cache.circuit_breaker import Guard

logger = logging.getLogger(__name__)

# Seconds after which a leader that says nothing counts as dead, and between two signs of life.
LEASE = 10.0
RENEWED = LEASE / 4
# Seconds after which a follower looks by itself: news of the store may get lost.
LOOK = 1.0
# How fal answers about a job that it has forgotten, or that belongs to another key by now.
NOT_TO_BE_HAD = (401, 403, 404)


@dataclass(frozen=True, slots=True)
class Landing:
    """How a flight ended. result: it is kept. failure: fal's answer that is not. error: there was
    none. None of these: an answer that cannot be shared. was_sent: whether there was a call at
    all; a result may have been there, or everybody may have left. is_kept: whether the store has
    the result.
    """

    result: Result | None = None
    failure: Failure | None = None
    error: Exception | None = None
    was_sent: bool = True
    is_kept: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Errand:
    """What a flight needs to know of the call. send: makes it; fal's job, or how it ended.
    follow: waits for the end of a job. is_run: whether the call is a direct one. newer_than: as
    in a Wish."""

    send: Callable[[], Awaitable[Job | Landing]]
    follow: Callable[[Job], Awaitable[Landing]]
    is_run: bool
    newer_than: float = 0.0


class SharedCall:
    """One key's flight as this process takes part in it: leads it, or follows another's.

    under_way: the job once fal took it; None for a direct call, and where the flight has landed
    without a job. landed: how it ended. holders: the ids of this process that hold the job.
    waiting: its request ids that stand for what comes of a direct call. passengers: how many of
    its requests wait right now. is_known: whether the store has the job. is_orphan: whether
    the client left that fal's own id was meant for.
    """

    def __init__(self, key: str, errand: Errand) -> None:
        loop = asyncio.get_running_loop()
        self.key = key
        self.errand = errand
        self.token = uuid4().hex
        self.under_way: asyncio.Future[Job | None] = loop.create_future()
        self.landed: asyncio.Future[Landing] = loop.create_future()
        self.holders: set[str] = set()
        self.waiting: set[str] = set()
        self.passengers = 0
        self.job: Job | None = None  # that this process has bought
        self.is_known = False
        self.is_orphan = False

    def is_of(self, job: Job) -> bool:
        """Whether it is this job that is under way."""
        return self.under_way.done() and self.under_way.result() == job

    def begin(self, job: Job | None) -> None:
        if not self.under_way.done():
            self.under_way.set_result(job)

    def land(self, landing: Landing) -> None:
        self.begin(None)
        if not self.landed.done():
            self.landed.set_result(landing)

    @asynccontextmanager
    async def aboard(self) -> AsyncIterator[None]:
        """While a request waits here."""
        self.passengers += 1
        try:
            yield
        finally:
            self.passengers -= 1


class Flights:
    """The flights of this process, by key. What a flight has begun it brings to its end, whether
    or not somebody still waits for it: it is paid for."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._calls: dict[str, SharedCall] = {}
        self._tasks: dict[asyncio.Task[None], SharedCall] = {}

    def find(self, key: str) -> SharedCall | None:
        return self._calls.get(key)

    def board(self, key: str, errand: Errand) -> SharedCall:
        """The key's flight, which begins now if there is none."""
        if (shared := self._calls.get(key)) is not None:
            return shared
        shared = self._calls[key] = SharedCall(key, errand)
        task = asyncio.get_running_loop().create_task(self._fly(shared))
        self._tasks[task] = shared
        task.add_done_callback(self._tasks.pop)
        return shared

    def forget(self, key: str, job: Job) -> None:
        """Nobody joins this job any more: its last holder gave it up."""
        shared = self._calls.get(key)
        if shared is not None and shared.is_of(job):
            del self._calls[key]

    async def close(self, patience: float) -> None:
        """Lets direct calls, and submits that fal has not answered yet, end within so many
        seconds; what has a job is left to others."""
        runs = [
            task
            for task, shared in self._tasks.items()
            if shared.errand.is_run or not shared.under_way.done()
        ]
        if runs:
            await asyncio.wait(runs, timeout=patience)
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fly(self, shared: SharedCall) -> None:
        landing = Landing()
        try:
            found = await self._acquire(shared)
            if found.result is not None:
                landing = Landing(found.result, was_sent=False)
            else:
                landing = await self._lead(shared, found.flight.job if found.flight else None)
        finally:
            if self._calls.get(shared.key) is shared:
                del self._calls[shared.key]
            shared.land(landing)

    async def _acquire(self, shared: SharedCall) -> Found:
        """A result, or the lead. Waits while another process leads.

        With the store away it is the lead: at once where nobody was heard of or there is a job to
        follow, else when the lease is over that was last heard of.
        """
        store, errand, loop = self._guard.store, shared.errand, asyncio.get_running_loop()
        wish = Wish(shared.token, LEASE, errand.is_run, errand.newer_than)
        found, until = Found(), 0.0
        with store.watch(shared.key) as changed:
            while True:
                changed.clear()
                try:
                    found = await self._guard.ask(store.acquire(shared.key, wish))
                except StoreError:
                    if found.flight is None or found.flight.job or loop.time() >= until:
                        return replace(found, leads=True)
                    await asyncio.sleep(LOOK / 4)
                    continue
                flight = found.flight
                if found.result is not None or found.leads or flight is None:
                    return found
                if flight.is_run or flight.job is not None:
                    shared.is_known = True
                    shared.begin(flight.job)
                until = loop.time() + flight.lease_left
                await wait(changed, min(LOOK, max(flight.lease_left, 0.0) + 0.01))

    async def _lead(self, shared: SharedCall, job: Job | None) -> Landing:
        """Makes the call, or follows the job of a leader that died, and tells the store."""
        store, key, token = self._guard.store, shared.key, shared.token
        renewal = asyncio.get_running_loop().create_task(self._renew(shared))
        try:
            landing = await self._travel(shared, job)
        except asyncio.CancelledError:
            # The process stops. What fal has taken somebody else may follow to its end.
            with suppress(StoreError):
                await self._guard.ask(store.renew(key, token, 0.0))
            raise
        except ProxyError as error:
            landing = Landing(error=error)
        except Exception as error:  # it is told to those who wait, who may all have left
            logger.exception("A shared call failed inside the proxy")
            landing = Landing(error=error)
        finally:
            renewal.cancel()
        with suppress(StoreError):
            await self._guard.ask(store.finish(key, token, landing.result))
            landing = replace(landing, is_kept=landing.result is not None)
        return landing

    async def _travel(self, shared: SharedCall, job: Job | None) -> Landing:
        errand = shared.errand
        if job is None and shared.under_way.done():
            # Another process's, which ended without a result to keep: fal still has its answer.
            job = shared.under_way.result()
        if job is not None:
            shared.begin(job)
            landing = await errand.follow(job)
            if landing.failure is None or landing.failure.status not in NOT_TO_BE_HAD:
                return landing
        if errand.is_run:
            shared.begin(None)
        if not shared.passengers and not shared.waiting:
            return Landing(was_sent=False)
        sent = await errand.send()
        if isinstance(sent, Landing):
            return sent
        await self._accept(shared, sent)
        shared.begin(sent)
        return await errand.follow(sent)

    async def _accept(self, shared: SharedCall, job: Job) -> None:
        """Records a job that fal took, before anybody hears of it."""
        shared.job = job
        shared.holders.add(job.request_id)
        with suppress(StoreError):
            shared.is_known = await self._guard.ask(
                self._guard.store.accept(shared.key, shared.token, job)
            )

    async def _renew(self, shared: SharedCall) -> None:
        """Signs of life. A store that forgot the flight, or never heard of its job, is told."""
        store, key, token = self._guard.store, shared.key, shared.token
        while True:
            await asyncio.sleep(RENEWED)
            with suppress(StoreError):
                is_ours = await self._guard.ask(store.renew(key, token, LEASE))
                if not is_ours and self._calls.get(key) is shared:
                    wish = Wish(token, LEASE, shared.errand.is_run, shared.errand.newer_than)
                    is_ours = (await self._guard.ask(store.acquire(key, wish))).leads
                    shared.is_known = False
                if is_ours and shared.job is not None and not shared.is_known:
                    await self._accept(shared, shared.job)
                    for holder in tuple(shared.holders):
                        await self._guard.ask(store.join(key, shared.job.request_id, holder))


async def wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
