"""Single-flight: of equal calls one goes to fal, whoever makes them, here or in another process."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from uuid import uuid4

from falproxy.errors import ProxyError
from falproxy.stores.cache import (
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    SharedFailure,
    StoreError,
)
from falproxy.stores.cache.circuit_breaker import StoreBreaker

logger = logging.getLogger(__name__)

# Seconds after which a leader that says nothing counts as dead, and between two signs of life.
LEASE_SECONDS = 10.0
RENEW_INTERVAL = LEASE_SECONDS / 4
# Seconds after which a follower looks by itself: news of the store may get lost.
POLL_INTERVAL = 1.0
# How fal answers about a job that it has forgotten, or that belongs to another key by now.
JOB_GONE_STATUSES = (401, 403, 404)


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """How a flight ended. result: it is kept. failure: fal's answer that is not. error: there was
    none. None of these: an answer that cannot be shared. was_sent: whether there was a call at
    all; a result may have been there, or everybody may have left. is_kept: whether the store has
    the result.
    """

    result: CachedResult | None = None
    failure: SharedFailure | None = None
    error: Exception | None = None
    was_executed: bool = True
    is_stored: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class SharedCallFns:
    """What a flight needs to know of the call. send: makes it; fal's job, or how it ended.
    follow: waits for the end of a job. is_run: whether the call is a direct one. newer_than: as
    in a Wish."""

    send: Callable[[], Awaitable[Job | CallOutcome]]
    await_job: Callable[[Job], Awaitable[CallOutcome]]
    is_run: bool
    min_stored_at: float = 0.0


class SharedCall:
    """One key's flight as this process takes part in it: leads it, or follows another's.

    under_way: the job once fal took it; None for a direct call, and where the flight has landed
    without a job. landed: how it ended. holders: the ids of this process that hold the job.
    waiting: its request ids that stand for what comes of a direct call. passengers: how many of
    its requests wait right now. is_known: whether the store has the job. is_orphan: whether
    the client left that fal's own id was meant for.
    """

    def __init__(self, key: str, fns: SharedCallFns) -> None:
        loop = asyncio.get_running_loop()
        self.key = key
        self.fns = fns
        self.owner_token = uuid4().hex
        self.accepted: asyncio.Future[Job | None] = loop.create_future()
        self.done: asyncio.Future[CallOutcome] = loop.create_future()
        self.job_holders: set[str] = set()
        self.pending_ids: set[str] = set()
        self.waiter_count = 0
        self.submitted_job: Job | None = None  # that this process has bought
        self.is_job_stored = False
        self.is_abandoned = False

    def has_job(self, job: Job) -> bool:
        """Whether it is this job that is under way."""
        return self.accepted.done() and self.accepted.result() == job

    def mark_accepted(self, job: Job | None) -> None:
        if not self.accepted.done():
            self.accepted.set_result(job)

    def complete(self, outcome: CallOutcome) -> None:
        self.mark_accepted(None)
        if not self.done.done():
            self.done.set_result(outcome)

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """While a request waits here."""
        self.waiter_count += 1
        try:
            yield
        finally:
            self.waiter_count -= 1


class SingleFlight:
    """The flights of this process, by key. What a flight has begun it brings to its end, whether
    or not somebody still waits for it: it is paid for."""

    def __init__(self, breaker: StoreBreaker) -> None:
        self._breaker = breaker
        self._calls: dict[str, SharedCall] = {}
        self._tasks: dict[asyncio.Task[None], SharedCall] = {}

    def find_call(self, key: str) -> SharedCall | None:
        return self._calls.get(key)

    def join_or_start(self, key: str, fns: SharedCallFns) -> SharedCall:
        """The key's flight, which begins now if there is none."""
        if (shared := self._calls.get(key)) is not None:
            return shared
        shared = self._calls[key] = SharedCall(key, fns)
        task = asyncio.get_running_loop().create_task(self._run(shared))
        self._tasks[task] = shared
        task.add_done_callback(self._tasks.pop)
        return shared

    def drop_job(self, key: str, job: Job) -> None:
        """Nobody joins this job any more: its last holder gave it up."""
        shared = self._calls.get(key)
        if shared is not None and shared.has_job(job):
            del self._calls[key]

    async def close(self, grace_period: float) -> None:
        """Lets direct calls, and submits that fal has not answered yet, end within so many
        seconds; what has a job is left to others."""
        runs = [
            task
            for task, shared in self._tasks.items()
            if shared.fns.is_run or not shared.accepted.done()
        ]
        if runs:
            await asyncio.wait(runs, timeout=grace_period)
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, shared_call: SharedCall) -> None:
        landing = CallOutcome()
        try:
            found = await self._acquire(shared_call)
            if found.result is not None:
                landing = CallOutcome(found.result, was_executed=False)
            else:
                landing = await self._lead(shared_call, found.flight.job if found.flight else None)
        finally:
            if self._calls.get(shared_call.key) is shared_call:
                del self._calls[shared_call.key]
            shared_call.complete(landing)

    async def _acquire(self, shared_call: SharedCall) -> Lookup:
        """A result, or the lead. Waits while another process leads.

        With the store away it is the lead: at once where nobody was heard of or there is a job to
        follow, else when the lease is over that was last heard of.
        """
        store, errand, loop = self._breaker.store, shared_call.fns, asyncio.get_running_loop()
        wish = AcquireRequest(
            shared_call.owner_token, LEASE_SECONDS, errand.is_run, errand.min_stored_at
        )
        found, until = Lookup(), 0.0
        with store.watch(shared_call.key) as changed:
            while True:
                changed.clear()
                try:
                    found = await self._breaker.call(store.acquire(shared_call.key, wish))
                except StoreError:
                    if found.flight is None or found.flight.job or loop.time() >= until:
                        return replace(found, is_leader=True)
                    await asyncio.sleep(POLL_INTERVAL / 4)
                    continue
                flight = found.flight
                if found.result is not None or found.is_leader or flight is None:
                    return found
                if flight.is_run or flight.job is not None:
                    shared_call.is_job_stored = True
                    shared_call.mark_accepted(flight.job)
                until = loop.time() + flight.lease_left
                await wait_for_event(
                    changed, min(POLL_INTERVAL, max(flight.lease_left, 0.0) + 0.01)
                )

    async def _lead(self, shared_call: SharedCall, job: Job | None) -> CallOutcome:
        """Makes the call, or follows the job of a leader that died, and tells the store."""
        store, key, token = self._breaker.store, shared_call.key, shared_call.owner_token
        renewal = asyncio.get_running_loop().create_task(self._renew_lease(shared_call))
        try:
            landing = await self._execute(shared_call, job)
        except asyncio.CancelledError:
            # The process stops. What fal has taken somebody else may follow to its end.
            with suppress(StoreError):
                await self._breaker.call(store.renew_lease(key, token, 0.0))
            raise
        except ProxyError as error:
            landing = CallOutcome(error=error)
        except Exception as error:  # it is told to those who wait, who may all have left
            logger.exception("A shared call failed inside the proxy")
            landing = CallOutcome(error=error)
        finally:
            renewal.cancel()
        with suppress(StoreError):
            await self._breaker.call(store.finish(key, token, landing.result))
            landing = replace(landing, is_stored=landing.result is not None)
        return landing

    async def _execute(self, shared_call: SharedCall, job: Job | None) -> CallOutcome:
        errand = shared_call.fns
        if job is None and shared_call.accepted.done():
            # Another process's, which ended without a result to keep: fal still has its answer.
            job = shared_call.accepted.result()
        if job is not None:
            shared_call.mark_accepted(job)
            landing = await errand.await_job(job)
            if landing.failure is None or landing.failure.status not in JOB_GONE_STATUSES:
                return landing
        if errand.is_run:
            shared_call.mark_accepted(None)
        if not shared_call.waiter_count and not shared_call.pending_ids:
            return CallOutcome(was_executed=False)
        sent = await errand.send()
        if isinstance(sent, CallOutcome):
            return sent
        await self._record_job(shared_call, sent)
        shared_call.mark_accepted(sent)
        return await errand.await_job(sent)

    async def _record_job(self, shared_call: SharedCall, job: Job) -> None:
        """Records a job that fal took, before anybody hears of it."""
        shared_call.submitted_job = job
        shared_call.job_holders.add(job.request_id)
        with suppress(StoreError):
            shared_call.is_job_stored = await self._breaker.call(
                self._breaker.store.record_job(shared_call.key, shared_call.owner_token, job)
            )

    async def _renew_lease(self, shared_call: SharedCall) -> None:
        """Signs of life. A store that forgot the flight, or never heard of its job, is told."""
        store, key, token = self._breaker.store, shared_call.key, shared_call.owner_token
        while True:
            await asyncio.sleep(RENEW_INTERVAL)
            with suppress(StoreError):
                is_ours = await self._breaker.call(store.renew_lease(key, token, LEASE_SECONDS))
                if not is_ours and self._calls.get(key) is shared_call:
                    wish = AcquireRequest(
                        token, LEASE_SECONDS, shared_call.fns.is_run, shared_call.fns.min_stored_at
                    )
                    is_ours = (await self._breaker.call(store.acquire(key, wish))).is_leader
                    shared_call.is_job_stored = False
                if (
                    is_ours
                    and shared_call.submitted_job is not None
                    and not shared_call.is_job_stored
                ):
                    await self._record_job(shared_call, shared_call.submitted_job)
                    for holder in tuple(shared_call.job_holders):
                        await self._breaker.call(
                            store.add_holder(key, shared_call.submitted_job.request_id, holder)
                        )


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
