"""Results that are kept and calls that are on their way: what a store of them does, by Protocol.

A store is asked through `cache.guard`, which makes one that is down or slow a miss.
"""

import asyncio
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self

# Seconds that a flight's job is remembered when nobody leads it any more.
JOB_RETENTION = 3600.0
# Seconds that a request id which was handed out is remembered.
VIRTUAL_ID_RETENTION = 86400.0
# Seconds that a result is still there for the ids which it was promised to, once it is too old
# for new calls.
GRACE_PERIOD = 600.0


class StoreError(Exception):
    """The store cannot be used: it is away, slow, full, or read only."""


class RejectedResultError(StoreError):
    """One result was not taken, such as for its size. The store is well otherwise."""


@dataclass(frozen=True, slots=True)
class CachedResult:
    """A good answer of fal's. body: the document. stored_at, expires_at: seconds since 1970 by
    the store's clock; new calls get it before the latter."""

    body: bytes
    content_type: str
    stored_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class Job:
    """A request that fal's queue has accepted. app: the path before `/requests/` in its URLs.
    key_mark: of the fal key that it was submitted with, empty where there is only one."""

    request_id: str
    app: str
    key_mark: str = ""


@dataclass(frozen=True, slots=True)
class FlightRecord:
    """A call that is on its way to fal. token: whose it is. is_run: whether it is a direct call,
    which has no job. job: None until fal accepted it. lease_left: seconds until it may be taken
    over unless its leader says that it lives."""

    owner_token: str
    is_run: bool
    job: Job | None
    lease_left: float


@dataclass(frozen=True, slots=True)
class AcquireRequest:
    """What a call wants of `acquire`. token: its own. lease: seconds that it says nothing for.
    newer_than: what was stored until then, in seconds since 1970, is too old for it."""

    owner_token: str
    lease: float
    is_run: bool
    min_stored_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a store has under a key. leads: whether the flight is the asking call's own, to be
    made, or to be followed where it has a job already."""

    result: CachedResult | None = None
    flight: FlightRecord | None = None
    is_leader: bool = False


@dataclass(frozen=True, slots=True)
class SharedFailure:
    """An answer that is shared by those who waited for it, and not kept. headers: what else it
    says, which is not stored."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class VirtualRequest:
    """What a request id stands for. app: the path before `/requests/` in its URLs. owner: who
    may ask. job: fal's request that it shares, None where it has the result or waits for a run.
    failure: how that run ended. is_cancelled: whether its holder does not want it any more."""

    key: str
    owner: str
    app: str
    job: Job | None = None
    failure: SharedFailure | None = None
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds. size: bytes of all documents."""

    results: int
    size: int
    flights: int
    virtual_ids: int


class FlightStore(Protocol):
    """One call at a time under each key, over all processes that share the store."""

    async def acquire(self, key: str, request: AcquireRequest) -> Lookup:
        """In one step: a result that is new enough; else the flight of somebody who still leads
        it; else a flight that is now the caller's, with the job of the last leader if it had one.
        Asked again with the same token it gives the same answer."""

    async def record_job(self, key: str, owner_token: str, job: Job) -> bool:
        """fal took the job; its id is the first of those who hold it. False: somebody else leads
        by now, and nothing was changed. Whoever watches the key is told."""

    async def renew_lease(self, key: str, owner_token: str, lease: float) -> bool:
        """The leader lives; with a lease of 0 it gives the lead away. False: somebody else leads
        by now."""

    async def finish(self, key: str, owner_token: str, result: CachedResult | None) -> None:
        """Keeps a result, whoever leads; ends the flight if the caller leads it, together with
        its holders. Whoever watches the key is told. Raises: RejectedResultError, the flight was
        ended but the result was not taken."""


class VirtualIdStore(Protocol):
    """What request ids stand for, and who holds a shared job."""

    async def put_virtual_request(
        self,
        request_id: str,
        virtual_request: VirtualRequest,
        retention: float = VIRTUAL_ID_RETENTION,
    ) -> None:
        """kept: for so many seconds."""

    async def get_virtual_request(self, request_id: str) -> VirtualRequest | None: ...

    async def add_holder(self, key: str, job_id: str, holder: str) -> bool:
        """One more holds the job. False: that job is no longer under way there."""

    async def remove_holder(self, key: str, job_id: str, holder: str) -> bool | None:
        """One does not hold it any more. True: nobody else does, and in the same step the flight
        was ended, so that nobody joins any more. None: that job is not under way there, or was
        forgotten."""


class ResultStore(Protocol):
    """What is kept."""

    async def get(self, key: str) -> Lookup:
        """What is there, without any change: a result also for GRACE seconds after it expired,
        and a flight whose lease ran out, with `lease_left` of 0 or less."""

    def watch(self, key: str) -> AbstractContextManager[asyncio.Event]:
        """An event that is set at every change of the key's flight from now on. It may come late
        or not at all when the store is away: wait for it with a time-out."""

    async def stats(self) -> StoreStats: ...

    async def clear(self) -> int:
        """Forgets all results, and says how many there were. Flights and claims stay."""


class CacheStore(FlightStore, VirtualIdStore, ResultStore, Protocol):
    """All of it. Every method raises StoreError, and may be called again after it did.

    is_remote: whether asking it is worth a look beforehand whether it is still there.
    """

    is_remote: bool

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def probe(self) -> None:
        """Raises: StoreError, the store cannot be written."""
