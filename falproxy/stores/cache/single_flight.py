"""Single-flight: concurrent equal calls, in any process, share one upstream call."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from uuid import uuid4

from cachetools import LRUCache

from falproxy.concurrency import cancel_tasks, wait_for_event
from falproxy.errors import CallerRefusal, ProxyError
from falproxy.json_object import parse_object
from falproxy.stores.cache import (
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    RejectedResultError,
    SharedFailure,
    SharedOutcome,
    StoreError,
)
from falproxy.stores.cache.call_outcome import (
    CallOutcome,
    internal_error,
    is_from_fal,
    parse_outcome,
    serialize_outcome,
)
from falproxy.stores.cache.circuit_breaker import CALL_TIMEOUT, StoreBreaker

logger = logging.getLogger(__name__)

LEASE_SECONDS = 10.0  # after that another call may become the leader
RENEW_INTERVAL = LEASE_SECONDS / 4
POLL_INTERVAL = 1.0  # seconds; notifications of the store may get lost
RETRY_INTERVAL = 0.25  # seconds until an operation of the store is repeated after an error
# Statuses for a job that fal has deleted, or that belongs to another key now.
JOB_GONE_STATUSES = (401, 403, 404)
# Ends of shared calls that the store has not got yet: seconds for which they are kept, and bytes.
UNFINISHED_RETENTION = 60.0
UNFINISHED_MAX_BYTES = 64 * 2**20
UNFINISHED_ENTRY_BYTES = 1024  # without the bodies


@dataclass(frozen=True, slots=True)
class SharedCallFns:
    """The functions and parameters with which the leader makes a call.

    send: makes the call; returns fal's job, or the outcome of a call without one.
    await_job: waits for the outcome of a job.
    is_run: True for a direct call.
    min_stored_at, awaited_token, known_outcome: as in `AcquireRequest`.
    may_be_refused: the proxy may refuse a direct call before it is sent. `send` then marks the
        shared call accepted; no submit gets a virtual id of a call that is refused.
    """

    send: Callable[[], Awaitable[Job | CallOutcome]]
    await_job: Callable[[Job], Awaitable[CallOutcome]]
    is_run: bool
    min_stored_at: float = 0.0
    awaited_token: str = ""
    known_outcome: str | None = None
    may_be_refused: bool = False


@dataclass(frozen=True, slots=True)
class UnfinishedCall:
    """The end of a shared call that the store has not got yet.

    content: of its `SharedOutcome`; empty for none.
    ended_at: time of the event loop.
    """

    key: str
    result: CachedResult | None
    content: bytes
    ended_at: float

    def shared_outcome(self) -> SharedOutcome | None:
        age = asyncio.get_running_loop().time() - self.ended_at
        return SharedOutcome(self.content, age) if self.content else None

    def size_in_memory(self) -> int:
        body = b"" if self.result is None else self.result.body
        return UNFINISHED_ENTRY_BYTES + len(body) + len(self.content)


class SharedCall:
    """One call in flight, led by this process or by another one.

    accepted: done when fal accepted the call. The job, or None for a direct call or a call that
        ended without a job.
    done: the outcome.
    leader_token: token of the leader, of any process, for which this call waits or has waited.
    known_outcome: as in `AcquireRequest`.
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
        self.leader_token, self.known_outcome = fns.awaited_token, fns.known_outcome
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
    its callers have left, because it is paid for.

    lease: seconds after which another call may become the leader; LEASE_SECONDS by default.
    """

    def __init__(self, breaker: StoreBreaker, lease: float | None = None) -> None:
        self._breaker = breaker
        self._lease = LEASE_SECONDS if lease is None else lease
        self._renew_interval = RENEW_INTERVAL if lease is None else lease / 4
        self._unfinished = new_unfinished()
        breaker.on_recovered.append(self._finish_again)
        self._calls: dict[str, SharedCall] = {}
        self._tasks: dict[asyncio.Task[None], SharedCall] = {}

    def __repr__(self) -> str:
        return f"<SingleFlight {list(self._calls.values())}>"

    @property
    def waiter_count(self) -> int:
        """Requests of this process that wait for a shared call."""
        return sum(shared_call.waiter_count for shared_call in self._tasks.values())

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
            if lookup.outcome is not None:
                outcome = read_outcome(lookup.outcome)
            elif lookup.result is not None:
                outcome = CallOutcome(lookup.result, was_executed=False)
            else:
                job = lookup.shared_call.job if lookup.shared_call else None
                outcome = await self._lead(shared_call, job)
        finally:
            if self._calls.get(shared_call.key) is shared_call:
                del self._calls[shared_call.key]
            shared_call.complete(outcome)

    async def _acquire(self, shared_call: SharedCall) -> Lookup:
        """Return a result, or the outcome of another process, or become the leader. Wait while
        another process is the leader.

        If the store fails, become the leader: at once if no other leader is known or there is a job
        to await, otherwise after the end of the last known lease.
        """
        store, loop = self._breaker.store, asyncio.get_running_loop()
        key, known, lease_end = shared_call.key, Lookup(), 0.0
        with store.watch(key) as changed:
            while True:
                changed.clear()
                request = self._acquire_request(shared_call)
                try:
                    lookup = await self._breaker.call(store.acquire(key, request))
                except StoreError:
                    record = known.shared_call
                    if record is None or record.job or loop.time() >= lease_end:
                        return replace(known, is_leader=True)
                    await asyncio.sleep(RETRY_INTERVAL)
                    continue
                if shared_call.known_outcome is None:
                    shared_call.known_outcome = lookup.last_outcome
                if lookup.is_leader or lookup.outcome is not None or lookup.result is not None:
                    return lookup
                record = lookup.shared_call
                if record is None:  # another call has ended since this one waits
                    shared_call.leader_token = lookup.last_outcome
                    continue
                known = lookup
                shared_call.leader_token = record.owner_token
                if record.is_run or record.job is not None:
                    shared_call.is_job_stored = True
                    shared_call.mark_accepted(record.job)
                lease_end = loop.time() + record.lease_left
                timeout = min(POLL_INTERVAL, max(record.lease_left, 0.0) + 0.01)
                await wait_for_event(changed, timeout)

    def _acquire_request(self, shared_call: SharedCall) -> AcquireRequest:
        fns = shared_call.fns
        return AcquireRequest(
            shared_call.owner_token,
            self._lease,
            fns.is_run,
            fns.min_stored_at,
            shared_call.leader_token,
            shared_call.known_outcome,
        )

    async def _lead(self, shared_call: SharedCall, job: Job | None) -> CallOutcome:
        """Make the call, or await the job of a leader whose lease expired, and store the
        outcome."""
        store, key, token = self._breaker.store, shared_call.key, shared_call.owner_token
        shared_call.leader_token = token
        renewal = asyncio.get_running_loop().create_task(self._renew_lease(shared_call))
        try:
            outcome = await self._execute(shared_call, job)
        except asyncio.CancelledError:
            # The process stops. Another one may await the job that fal accepted.
            with suppress(StoreError):
                await self._breaker.call(store.renew_lease(key, token, 0.0))
            raise
        except ProxyError as error:
            is_shareable = not isinstance(error, CallerRefusal)
            outcome = CallOutcome(error=error, is_shareable=is_shareable)
        except Exception as error:  # raised again for each waiting call, if any is left
            logger.exception("A shared call failed inside the proxy")
            outcome = CallOutcome(error=error)
        finally:
            renewal.cancel()
        return await self._finish(shared_call, outcome)

    async def _finish(self, shared_call: SharedCall, outcome: CallOutcome) -> CallOutcome:
        """End a shared call in the store, now or after its recovery."""
        has_job = shared_call.accepted.done() and shared_call.accepted.result() is not None
        content = b""
        if outcome.was_executed and outcome.is_shareable:
            content = serialize_outcome(outcome, has_job=has_job)
        now = asyncio.get_running_loop().time()
        ended = UnfinishedCall(shared_call.key, outcome.result, content, now)
        token = shared_call.owner_token
        try:
            await self._write_end(token, ended)
        except RejectedResultError:
            return outcome
        except StoreError:
            with suppress(ValueError):  # larger than all of them may be
                self._unfinished[token] = ended
            return outcome
        return replace(outcome, is_stored=outcome.result is not None)

    async def _write_end(self, owner_token: str, ended: UnfinishedCall) -> None:
        """Raises: StoreError."""
        store = self._breaker.store
        await self._breaker.call(
            store.finish(ended.key, owner_token, ended.result, ended.shared_outcome())
        )

    async def _finish_again(self) -> None:
        """End the shared calls whose end the store has not got, before their leases expire."""
        unfinished, self._unfinished = self._unfinished, new_unfinished()
        loop = asyncio.get_running_loop()
        for token, ended in unfinished.items():
            if loop.time() - ended.ended_at > UNFINISHED_RETENTION:
                continue
            try:
                await self._write_end(token, ended)
            except RejectedResultError:
                continue
            except StoreError:
                with suppress(ValueError):
                    self._unfinished[token] = ended

    async def _execute(self, shared_call: SharedCall, job: Job | None) -> CallOutcome:
        fns = shared_call.fns
        if job is None and shared_call.accepted.done():
            # The job of another process, which has ended there. fal still has its response.
            job = shared_call.accepted.result()
            if job is not None:
                return replace(await fns.await_job(job), is_shareable=False)
        if job is not None:
            shared_call.mark_accepted(job)
            outcome = await fns.await_job(job)
            if not is_job_gone(outcome):
                return outcome
        if fns.is_run and not fns.may_be_refused:
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
        interval = self._renew_interval
        while True:
            await asyncio.sleep(interval)
            interval = min(RETRY_INTERVAL, self._renew_interval)  # after an error
            with suppress(StoreError):
                is_leader = await self._breaker.call(store.renew_lease(key, token, self._lease))
                if not is_leader and self._calls.get(key) is shared_call:
                    request = replace(
                        self._acquire_request(shared_call), awaited_token=token, known_outcome=None
                    )
                    lookup = await self._breaker.call(store.acquire(key, request))
                    if lookup.outcome is not None:  # another process has seen the end of the job
                        del self._calls[key]
                        return
                    is_leader = lookup.is_leader
                    shared_call.is_job_stored = False
                job = shared_call.submitted_job
                if is_leader and job is not None and not shared_call.is_job_stored:
                    await self._record_job(shared_call, job)
                    for holder in tuple(shared_call.job_holders):
                        await self._breaker.call(store.add_holder(key, job.request_id, holder))
                interval = self._renew_interval


def new_unfinished() -> LRUCache[str, UnfinishedCall]:
    return LRUCache(UNFINISHED_MAX_BYTES, UnfinishedCall.size_in_memory)


def read_outcome(shared_outcome: SharedOutcome) -> CallOutcome:
    """Return the outcome of a call of another process, which may be of another version."""
    ended_at = asyncio.get_running_loop().time() - shared_outcome.age
    try:
        return parse_outcome(shared_outcome.content, ended_at)
    except (ValueError, TypeError, AttributeError):
        logger.warning("The outcome of a shared call cannot be read")
        return CallOutcome(error=internal_error(), ended_at=ended_at)


def is_job_gone(outcome: CallOutcome) -> bool:
    """Return whether fal does not have a job any more. A response with fal's request id is the end
    of the job itself, whatever its status."""
    failure = outcome.failure
    if failure is None or failure.status not in JOB_GONE_STATUSES:
        return False
    return not is_from_fal(failure) or is_not_found(failure)


def is_not_found(failure: SharedFailure) -> bool:
    """Return whether it is fal's response about an unknown request id."""
    document = parse_object(failure.body) or {}
    return failure.status == 404 and document.get("status") == "NOT_FOUND"
