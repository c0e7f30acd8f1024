"""A cache store in memory, which a test can slow down, stop and let fail."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

from falproxy.stores.cache import (
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    RequestOwner,
    SharedCallRecord,
    SharedOutcome,
    StoreContent,
    StoreError,
    StoreStats,
    VirtualRequest,
)

VIRTUAL_REQUEST = VirtualRequest("key", "ann", "fal-ai/flux")
STORE_DOWN = StoreError("the store is down")


@dataclass(slots=True)
class FakeStore:
    """A cache store in memory.

    now: seconds, set by the test.
    error: raised by every operation.
    running: operations wait while it is not set.
    delay: seconds of each operation.
    content: returned by a probe.
    operations: names of the operations so far.
    succeeded: those that have ended without an error.
    """

    is_remote: bool = False
    now: float = 10.0
    error: StoreError | None = None
    running: asyncio.Event = field(default_factory=asyncio.Event)
    delay: float = 0.0
    content: StoreContent | None = None
    operations: list[str] = field(default_factory=list)
    succeeded: list[str] = field(default_factory=list)
    results: dict[str, CachedResult] = field(default_factory=dict)
    flights: dict[str, tuple[SharedCallRecord, float]] = field(default_factory=dict)
    outcomes: dict[tuple[str, str], tuple[SharedOutcome, float]] = field(default_factory=dict)
    virtual_requests: dict[str, VirtualRequest] = field(default_factory=dict)
    owners: dict[str, RequestOwner] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)
    events: set[asyncio.Event] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.running.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def _record(self, operation: str) -> None:
        self.operations.append(operation)
        await asyncio.sleep(self.delay)
        await self.running.wait()
        if self.error is not None:
            raise self.error
        self.succeeded.append(operation)

    async def probe(self) -> StoreContent | None:
        await self._record("probe")
        return self.content

    async def check_owners_writable(self) -> None:
        await self._record("check_owners_writable")

    def _flight(self, key: str) -> SharedCallRecord | None:
        if key not in self.flights:
            return None
        flight, until = self.flights[key]
        return replace(flight, lease_left=until - self.now)

    async def get(self, key: str) -> Lookup:
        await self._record("get")
        return Lookup(self.results.get(key), self._flight(key))

    async def acquire(self, key: str, request: AcquireRequest) -> Lookup:
        await self._record("acquire")
        flight, result = self._flight(key), self.results.get(key)
        is_led = flight is not None and flight.lease_left > 0
        if flight is not None and is_led and flight.owner_token == request.owner_token:
            return Lookup(shared_call=flight, is_leader=True)
        if (key, request.awaited_token) in self.outcomes:
            outcome, ended_at = self.outcomes[key, request.awaited_token]
            return Lookup(outcome=replace(outcome, age=self.now - ended_at))
        if result is not None and result.stored_at > request.min_stored_at:
            return Lookup(result)
        last = next((token for name, token in reversed(self.outcomes) if name == key), "")
        if is_led:
            return Lookup(shared_call=flight, last_outcome=last)
        is_known = last in ("", request.awaited_token, request.known_outcome)
        if request.known_outcome is not None and not is_known:
            return Lookup(last_outcome=last)
        job = flight.job if flight else None
        own = SharedCallRecord(
            request.owner_token, request.is_run and job is None, job, request.lease
        )
        self.flights[key] = own, self.now + request.lease
        return Lookup(shared_call=own, is_leader=True, last_outcome=last)

    def _is_leader(self, key: str, token: str) -> bool:
        flight = self._flight(key)
        return flight is not None and flight.owner_token == token

    async def record_job(self, key: str, owner_token: str, job: Job) -> bool:
        await self._record("record_job")
        if not self._is_leader(key, owner_token):
            return False
        flight, until = self.flights[key]
        self.flights[key] = replace(flight, job=job), until
        self.notify()
        return True

    async def renew_lease(self, key: str, owner_token: str, lease: float) -> bool:
        await self._record(f"renew_lease {lease}")
        if not self._is_leader(key, owner_token):
            return False
        self.flights[key] = self.flights[key][0], self.now + lease
        self.notify()
        return True

    async def finish(
        self,
        key: str,
        owner_token: str,
        result: CachedResult | None,
        outcome: SharedOutcome | None = None,
    ) -> None:
        await self._record("finish")
        if result is not None:
            self.results[key] = result
        elif outcome is not None and self._is_leader(key, owner_token):
            self.outcomes[key, owner_token] = outcome, self.now - outcome.age
        if self._is_leader(key, owner_token):
            del self.flights[key]
        self.notify()

    async def put_virtual_request(
        self, request_id: str, virtual_request: VirtualRequest, retention: float = 0.0
    ) -> None:
        await self._record("put_virtual_request")
        self.virtual_requests[request_id] = virtual_request

    async def get_virtual_request(self, request_id: str) -> VirtualRequest | None:
        await self._record("get_virtual_request")
        return self.virtual_requests.get(request_id)

    async def put_owner(self, request_id: str, request_owner: RequestOwner) -> bool:
        await self._record("put_owner")
        is_new = request_id not in self.owners
        self.owners.setdefault(request_id, request_owner)
        return is_new

    async def get_owner(self, request_id: str) -> RequestOwner | None:
        await self._record("get_owner")
        return self.owners.get(request_id)

    async def add_holder(self, key: str, job_id: str, holder: str) -> bool:
        await self._record("add_holder")
        self.holders.add(holder)
        return True

    async def remove_holder(self, key: str, job_id: str, holder: str) -> bool:
        await self._record("remove_holder")
        self.holders.discard(holder)
        return not self.holders

    async def stats(self) -> StoreStats:
        return StoreStats(len(self.results), 0, len(self.flights), len(self.virtual_requests))

    async def eviction_policy(self) -> str | None:
        return None

    async def clear(self) -> int:
        return 0

    @contextmanager
    def watch(self, key: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self.events.add(event)
        yield event
        self.events.discard(event)

    def notify(self) -> None:
        for event in self.events:
            event.set()
