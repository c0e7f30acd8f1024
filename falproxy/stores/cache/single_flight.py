"""Single-flight: concurrent equal calls, in any process, share one upstream call."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from uuid import uuid4

from falproxy.concurrency import cancel_tasks, wait_for_event
from falproxy.errors import ProxyError
from falproxy.stores.cache import (
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    SharedFailure,
    StoreError,
)
from falproxy.stores.cache.circuit_breaker import CALL_TIMEOUT, StoreBreaker

logger = logging.getLogger(__name__)

LEASE_SECONDS = 10.0  # after that another call may become the leader
RENEW_INTERVAL = LEASE_SECONDS / 4
POLL_INTERVAL = 1.0  # seconds; notifications of the store may get lost
# Statuses of fal for a job that it has deleted, or that belongs to another key now.
JOB_GONE_STATUSES = (401, 403, 404)


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """The end of a shared call. Without a result, failure and error: a response that cannot be
    shared.

    result: a response that is cached.
    failure: a response that is shared but not cached.
    error: the exception, if there was no response.
    was_executed: False if no call was made, because there was a result already, or because all
        callers had left.
    is_stored: True if the result of this call was stored; False for one that was stored before.
    """

    result: CachedResult | None = None
    failure: SharedFailure | None = None
    error: Exception | None = None
    was_executed: bool = True
    is_stored: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class SharedCallFns:
    """The functions and parameters with which the leader makes a call.

    send: makes the call; returns fal's job, or the outcome of a call without one.
    await_job: waits for the outcome of a job.
    is_run: True for a direct call.
    min_stored_at: as in `AcquireRequest`.
    """

    send: Callable[[], Awaitable[Job | CallOutcome]]
    await_job: Callable[[Job], Awaitable[CallOutcome]]
    is_run: bool
    min_stored_at: float = 0.0


class SharedCall:
    """One call in flight, led by this process or by another one.

    accepted: done when fal accepted the call. The job, or None for a direct call or a call that
        ended without a job.
    done: the outcome.
    job_holders: ids of this process that hold the job.
    pending_ids: virtual ids of this process that stand for the result of a direct call.
    waiter_count: requests of this process that wait now.
    submitted_job: the job, if this process submitted it.
    is_job_stored: True if the store has the job.
    is_abandoned: True if the client left that was to receive fal's own request id.
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
        self.submitted_job: Job | None = None
        self.is_job_stored = False
        self.is_abandoned = False

    def __repr__(self) -> str:
        state = "done" if self.done.done() else "accepted" if self.accepted.done() else "starting"
        kind = "run" if self.fns.is_run else "submit"
        return f"<SharedCall {self.key[:12]} {kind}, {state}, {self.waiter_count} waiting>"

    def has_job(self, job: Job) -> bool:
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
        """Context: count a request as waiting."""
        self.waiter_count += 1
        try:
            yield
        finally:
            self.waiter_count -= 1


class SingleFlight:
    """The shared calls of this process, by key. A call that was sent runs to its end even if all
    its callers have left, because it is paid for."""

    def __init__(self, breaker: StoreBreaker) -> None:
        self._breaker = breaker
        self._calls: dict[str, SharedCall] = {}
        self._tasks: dict[asyncio.Task[None], SharedCall] = {}

    def __repr__(self) -> str:
        return f"<SingleFlight {list(self._calls.values())}>"

    def find_call(self, key: str) -> SharedCall | None:
        return self._calls.get(key)

    def join_or_start(self, key: str, fns: SharedCallFns) -> SharedCall:
        """Return the shared call of a key, started now if there is none."""
        if (shared_call := self._calls.get(key)) is not None:
            return shared_call
        shared_call = self._calls[key] = SharedCall(key, fns)
        task = asyncio.get_running_loop().create_task(self._run(shared_call))
        self._tasks[task] = shared_call
        task.add_done_callback(self._tasks.pop)
        return shared_call

    def drop_job(self, key: str, job: Job) -> None:
        """Let no further call join this job, after its last holder released it."""
        shared_call = self._calls.get(key)
        if shared_call is not None and shared_call.has_job(job):
            del self._calls[key]

    async def close(self, grace_period: float) -> None:
        """Wait up to `grace_period` seconds for direct calls, and for submits that fal has not
        accepted yet. Jobs are left to other processes."""
        unfinished = [
            task
            for task, shared_call in self._tasks.items()
            if shared_call.fns.is_run or not shared_call.accepted.done()
        ]
        if unfinished:
            await asyncio.wait(unfinished, timeout=grace_period)
        # A leader that is cancelled gives up its lease, which may take as long as one operation.
        await cancel_tasks(tuple(self._tasks), interval=2 * CALL_TIMEOUT, timeout=3 * CALL_TIMEOUT)

    async def _run(self, shared_call: SharedCall) -> None:
        outcome = CallOutcome()
        try:
            lookup = await self._acquire(shared_call)
            if lookup.result is not None:
                outcome = CallOutcome(lookup.result, was_executed=False)
            else:
                job = lookup.shared_call.job if lookup.shared_call else None
                outcome = await self._lead(shared_call, job)
        finally:
            if self._calls.get(shared_call.key) is shared_call:
                del self._calls[shared_call.key]
            shared_call.complete(outcome)

    async def _acquire(self, shared_call: SharedCall) -> Lookup:
        """Return a result, or become the leader. Wait while another process is the leader.

        If the store fails, become the leader: at once if no other leader is known or there is a job
        to await, otherwise after the end of the last known lease.
        """
        store, fns, loop = self._breaker.store, shared_call.fns, asyncio.get_running_loop()
        request = AcquireRequest(
            shared_call.owner_token, LEASE_SECONDS, fns.is_run, fns.min_stored_at
        )
        lookup, lease_end = Lookup(), 0.0
        with store.watch(shared_call.key) as changed:
            while True:
                changed.clear()
                try:
                    lookup = await self._breaker.call(store.acquire(shared_call.key, request))
                except StoreError:
                    record = lookup.shared_call
                    if record is None or record.job or loop.time() >= lease_end:
                        return replace(lookup, is_leader=True)
                    await asyncio.sleep(POLL_INTERVAL / 4)
                    continue
                record = lookup.shared_call
                if lookup.result is not None or lookup.is_leader or record is None:
                    return lookup
                if record.is_run or record.job is not None:
                    shared_call.is_job_stored = True
                    shared_call.mark_accepted(record.job)
                lease_end = loop.time() + record.lease_left
                timeout = min(POLL_INTERVAL, max(record.lease_left, 0.0) + 0.01)
                await wait_for_event(changed, timeout)

    async def _lead(self, shared_call: SharedCall, job: Job | None) -> CallOutcome:
        """Make the call, or await the job of a leader whose lease expired, and store the
        outcome."""
        store, key, token = self._breaker.store, shared_call.key, shared_call.owner_token
        renewal = asyncio.get_running_loop().create_task(self._renew_lease(shared_call))
        try:
            outcome = await self._execute(shared_call, job)
        except asyncio.CancelledError:
            # The process stops. Another one may await the job that fal accepted.
            with suppress(StoreError):
                await self._breaker.call(store.renew_lease(key, token, 0.0))
            raise
        except ProxyError as error:
            outcome = CallOutcome(error=error)
        except Exception as error:  # raised again for each waiting call, if any is left
            logger.exception("A shared call failed inside the proxy")
            outcome = CallOutcome(error=error)
        finally:
            renewal.cancel()
        with suppress(StoreError):
            await self._breaker.call(store.finish(key, token, outcome.result))
            outcome = replace(outcome, is_stored=outcome.result is not None)
        return outcome

    async def _execute(self, shared_call: SharedCall, job: Job | None) -> CallOutcome:
        fns = shared_call.fns
        if job is None and shared_call.accepted.done():
            # The job of another process, which ended without a storable result. fal still has its
            # response.
            job = shared_call.accepted.result()
        if job is not None:
            shared_call.mark_accepted(job)
            outcome = await fns.await_job(job)
            if outcome.failure is None or outcome.failure.status not in JOB_GONE_STATUSES:
                return outcome
        if fns.is_run:
            shared_call.mark_accepted(None)
        if not shared_call.waiter_count and not shared_call.pending_ids:
            return CallOutcome(was_executed=False)
        sent = await fns.send()
        if isinstance(sent, CallOutcome):
            return sent
        await self._record_job(shared_call, sent)
        shared_call.mark_accepted(sent)
        return await fns.await_job(sent)

    async def _record_job(self, shared_call: SharedCall, job: Job) -> None:
        """Store an accepted job, before any client receives its id."""
        shared_call.submitted_job = job
        shared_call.job_holders.add(job.request_id)
        with suppress(StoreError):
            shared_call.is_job_stored = await self._breaker.call(
                self._breaker.store.record_job(shared_call.key, shared_call.owner_token, job)
            )

    async def _renew_lease(self, shared_call: SharedCall) -> None:
        """Renew the lease until cancelled. A store that lost the shared call, or was down when
        the job was submitted, gets both again."""
        store, key, token = self._breaker.store, shared_call.key, shared_call.owner_token
        while True:
            await asyncio.sleep(RENEW_INTERVAL)
            with suppress(StoreError):
                is_leader = await self._breaker.call(store.renew_lease(key, token, LEASE_SECONDS))
                if not is_leader and self._calls.get(key) is shared_call:
                    fns = shared_call.fns
                    request = AcquireRequest(token, LEASE_SECONDS, fns.is_run, fns.min_stored_at)
                    is_leader = (await self._breaker.call(store.acquire(key, request))).is_leader
                    shared_call.is_job_stored = False
                job = shared_call.submitted_job
                if is_leader and job is not None and not shared_call.is_job_stored:
                    await self._record_job(shared_call, job)
                    for holder in tuple(shared_call.job_holders):
                        await self._breaker.call(store.add_holder(key, job.request_id, holder))
