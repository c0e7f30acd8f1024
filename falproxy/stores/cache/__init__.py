"""Protocols of the result cache's store: results, calls in flight, virtual ids, request owners.

The proxy calls a store through `circuit_breaker.StoreBreaker`, which turns one that is down or slow
into a miss.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

# Seconds that the job of a shared call without a leader can still be joined.
JOB_RETENTION = 3600.0
VIRTUAL_ID_RETENTION = 86400.0  # seconds
# Seconds after its expiry during which a result can still be read through a virtual id.
GRACE_PERIOD = 600.0
# Seconds. fal deletes the data of a request after 30 days.
OWNER_RETENTION = 30 * 86400.0
# Seconds that the outcome of a shared call is kept for the calls that waited for it. Longer than a
# lease: a call may have lost the connection to the store meanwhile.
OUTCOME_RETENTION = 15.0
OUTCOME_MAX_BYTES = 64 * 2**10


class StoreError(Exception):
    """The store cannot be used: unreachable, slow, full, or read-only."""


class RejectedResultError(StoreError):
    """The store did not accept one result, for example because of its size. It works otherwise."""


@dataclass(frozen=True, slots=True)
class CachedResult:
    """A successful response of fal.

    stored_at, expires_at: seconds since 1970, by the store's clock. New calls are served until
        expires_at.
    """

    body: bytes
    content_type: str
    stored_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class Job:
    """A request that fal's queue has accepted.

    app: the path before `/requests/` in its URLs.
    key_mark: fingerprint of the fal key that submitted it, named `key_mark` in the stores; empty
        when there is only one key.
    """

    request_id: str
    app: str
    key_mark: str = ""


@dataclass(frozen=True, slots=True)
class SharedCallRecord:
    """A call to fal that has not ended.

    owner_token: token of the leader.
    is_run: True for a direct call, which has no job.
    job: None until fal accepted it.
    lease_left: seconds until another call may take over, unless the leader renews its lease.
    """

    owner_token: str
    is_run: bool
    job: Job | None
    lease_left: float


@dataclass(frozen=True, slots=True)
class SharedOutcome:
    """The end of a shared call without a cached result, for the calls that waited for its leader.

    content: serialized by `call_outcome`, about OUTCOME_MAX_BYTES bytes at most.
    age: seconds since the end.
    """

    content: bytes
    age: float = 0.0


@dataclass(frozen=True, slots=True)
class AcquireRequest:
    """Parameters of `SharedCallStore.acquire`.

    owner_token: token of the caller.
    lease: seconds.
    min_stored_at: seconds since 1970; a result must be newer than that.
    awaited_token: token of the leader for which the caller has waited; empty if there was none.
    known_outcome: `last_outcome` of the caller's first lookup; None for the first one.
    """

    owner_token: str
    lease: float
    is_run: bool
    min_stored_at: float = 0.0
    awaited_token: str = ""
    known_outcome: str | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """The content of the store under one key.

    is_leader: the caller leads the shared call: it must send the call, or await the job if there is
        one already.
    outcome: the end of the shared call whose leader the caller has waited for.
    last_outcome: token of the leader whose outcome was recorded last; empty if there is none.
    """

    result: CachedResult | None = None
    shared_call: SharedCallRecord | None = None
    is_leader: bool = False
    outcome: SharedOutcome | None = None
    last_outcome: str = ""


@dataclass(frozen=True, slots=True)
class SharedFailure:
    """An error response that all waiting calls share, and that is not cached."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class VirtualRequest:
    """The virtual request with one id.

    key: cache key of the result.
    owner: the only caller that may use the id.
    app: the path before `/requests/` in its URLs.
    job: the shared request in fal's queue; None when the id stands for a cached result or for a
        direct call.
    failure: the response of the direct call, if it failed.
    is_cancelled: True after the owner cancelled it.
    """

    key: str
    owner: str
    app: str
    job: Job | None = None
    failure: SharedFailure | None = None
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True)
class RequestOwner:
    """The submitter of a queued request.

    owner: name of the caller; empty when callers are anonymous.
    key_mark: fingerprint of the fal key that submitted it, named `key_mark` in the stores.
    """

    owner: str
    key_mark: str


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts. size: bytes of all cached documents."""

    results: int
    size: int
    shared_calls: int
    virtual_ids: int


@dataclass(frozen=True, slots=True)
class StoreContent:
    """The content of a store that several machines share.

    id: another one after the store was emptied, for example by a failover to an empty server.
    is_new: other processes may not have noticed yet that the content is another one.
    complete_age: seconds since the time, at the latest, at which no process held entries that the
        store does not have. A process that has not reported for a minute does not count.
    """

    id: str
    is_new: bool
    complete_age: float = field(default=0.0, compare=False)


@runtime_checkable
class ReportingStore(Protocol):
    """A store that several machines share, in which each process reports whether it holds entries
    that the store does not have.

    has_unwritten: returns whether this process does.
    """

    has_unwritten: Callable[[], bool]


class SharedCallStore(Protocol):
    """At most one call in flight for each key, over all processes that share the store."""

    async def acquire(self, key: str, request: AcquireRequest) -> Lookup:
        """Return, atomically, the first of these that exists: the outcome of the leader for which
        the caller has waited; a result that is new enough; a shared call whose leader's lease has
        not expired; only `last_outcome`, if it is not the known one, for a repeated call with its
        token; a shared call of which the caller has become the leader, with the job of the previous
        leader if there was one.

        A repeated call with the same token returns the same.
        """

    async def record_job(self, key: str, owner_token: str, job: Job) -> bool:
        """Record the job of the caller's shared call, with its request id as the first holder, and
        notify the watchers of the key. Return False without a change if another call is the
        leader."""

    async def renew_lease(self, key: str, owner_token: str, lease: float) -> bool:
        """Extend the lease to `lease` seconds from now; 0 ends it. Return False if
        another call is the leader."""

    async def finish(
        self,
        key: str,
        owner_token: str,
        result: CachedResult | None,
        outcome: SharedOutcome | None = None,
    ) -> None:
        """Store the result, even if the caller is not the leader; end the shared call and its holds
        if the caller is the leader; notify the watchers of the key.

        In the same step, record the outcome for OUTCOME_RETENTION seconds under the caller's token,
        if the caller is the leader and no result is stored.
        Raises: RejectedResultError, the shared call was ended but the result was not stored.
        """


class VirtualIdStore(Protocol):
    """Virtual request ids, and the holders of shared jobs."""

    async def put_virtual_request(
        self,
        request_id: str,
        virtual_request: VirtualRequest,
        retention: float = VIRTUAL_ID_RETENTION,
    ) -> None:
        """retention: seconds."""

    async def get_virtual_request(self, request_id: str) -> VirtualRequest | None: ...

    async def add_holder(self, key: str, job_id: str, holder: str) -> bool:
        """Return False if that job is not in flight under the key."""

    async def remove_holder(self, key: str, job_id: str, holder: str) -> bool | None:
        """Return True if it was the last holder: the shared call was ended in the same step, so
        that no further call joins it. None if that job is not in flight under the key."""


class OwnerStore(Protocol):
    """Owners of queued requests. Every method raises StoreError."""

    async def put_owner(self, request_id: str, request_owner: RequestOwner) -> bool:
        """Store an owner durably for OWNER_RETENTION seconds. False if there is one, which
        stays."""

    async def get_owner(self, request_id: str) -> RequestOwner | None: ...

    async def check_owners_writable(self) -> None:
        """Raises: StoreError, owners cannot be written now."""


class ResultStore(Protocol):
    async def get(self, key: str) -> Lookup:
        """Read without any change. The result is returned until GRACE_PERIOD seconds after its
        expiry; a shared call whose lease has expired has a `lease_left` of 0 or less."""

    def watch(self, key: str) -> AbstractContextManager[asyncio.Event]:
        """An event that is set at every change of the key's shared call from now on. It may be
        late, or missing when the store is down: wait with a time-out."""

    async def stats(self) -> StoreStats: ...

    async def eviction_policy(self) -> str | None:
        """Return what the server evicts when it is full, as Redis names it; None if its memory has
        no limit, for a file, and if it is unknown."""

    async def clear(self) -> int:
        """Delete all results and return their number. Everything else stays."""


class CacheStore(SharedCallStore, VirtualIdStore, OwnerStore, ResultStore, Protocol):
    """Everything the result cache stores. Every method raises StoreError, and may be called again
    after an error.

    is_remote: True if the store is worth probing between calls.
    """

    is_remote: bool

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def probe(self) -> StoreContent | None:
        """Check that the store can be written, and return its content; None if it is never
        emptied while it is in use.

        After an error, a remote store is probed over a new connection: its address may belong to
        another server now, while the open connections still lead to the old one.

        Raises: StoreError, the store cannot be written.
        """
