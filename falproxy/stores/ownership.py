"""Owners of queued requests: the caller and the fal key that submitted them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

from aiohttp import web
from cachetools import LRUCache

from falproxy.concurrency import cancel_tasks, close_within
from falproxy.errors import TemporaryError
from falproxy.stores.cache import OwnerStore, RequestOwner, StoreError
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.lookups import Lookups
from falproxy.stores.cache.sqlite_owners import BUSY_TIMEOUT, OWNERS_FILE, SqliteOwnerStore

T = TypeVar("T")

ENTRY_BYTES = 512  # of one owner in memory, without the characters of its name
CACHE_MAX_BYTES = 50_000 * ENTRY_BYTES
UNWRITTEN_MAX = 50_000
UNWRITTEN_MAX_BYTES = UNWRITTEN_MAX * ENTRY_BYTES
WRITE_INTERVAL = 0.05  # seconds between two attempts to write to a local store that failed
WRITE_CONCURRENCY = 32
# Seconds in which every process writes its owners after the recovery of the store: for a local one
# it attempts to do so all the time, for a remote one its circuit breaker has to close.
LOCAL_SETTLE_SECONDS = WRITE_INTERVAL + 0.15
REMOTE_SETTLE_SECONDS = 0.4
LAST_WRITE_TIMEOUT = 1.0  # seconds, when the application stops
RETRY_AFTER = {"Retry-After": "1"}


class RequestOwnership:
    """Owners of queued requests, in memory and in a store that other processes share.

    While the store cannot be written, new owners are held in memory, and written later.

    breaker: the circuit breaker of a remote store. None for a local one.
    """

    def __init__(self, store: OwnerStore, breaker: StoreBreaker | None = None) -> None:
        self._store = store
        self._breaker = breaker
        self._recent: LRUCache[str, RequestOwner] = LRUCache(CACHE_MAX_BYTES, size_in_memory)
        self._unwritten: LRUCache[str, RequestOwner] = LRUCache(UNWRITTEN_MAX_BYTES, size_in_memory)
        self._writing = 0  # runs of `_write_pending`
        self._write_task: asyncio.Task[None] | None = None
        settle_seconds = LOCAL_SETTLE_SECONDS if breaker is None else REMOTE_SETTLE_SECONDS
        self._lookups = Lookups(self._is_store_complete, settle_seconds)
        if breaker is not None:
            breaker.on_recovered.append(self._write_pending)
            breaker.on_emptied.append(self._restore)
            breaker.unwritten_counts.append(lambda: len(self._unwritten) + self._writing)

    def __repr__(self) -> str:
        counts = f"{len(self._recent)} cached, {len(self._unwritten)} unwritten"
        return f"<RequestOwnership {self._store!r}, {counts}>"

    @property
    def unwritten_count(self) -> int:
        """Number of owners that are not in the store, because that failed."""
        return len(self._unwritten)

    async def add(self, request_id: str, request_owner: RequestOwner) -> None:
        """Record an owner before the client receives the request id, so that a crash loses none.

        An existing owner stays: a response that contains the id of another caller's request does
        not transfer it.
        """
        if request_id in self._recent or request_id in self._unwritten:
            return
        if await self._write(request_id, request_owner):
            self._recent[request_id] = request_owner

    async def get(self, request_id: str, *, wait_for_store: bool = True) -> RequestOwner | None:
        """Return the owner of a request, None if it is certain that there is none.

        wait_for_store: wait some seconds for a store that cannot be read.

        Raises: TemporaryError 503, the owner is not in memory and cannot be looked up.
        """
        request_owner = self._recent.get(request_id)
        if request_owner is not None:
            return request_owner
        try:
            return await self._lookups.find(
                lambda: self._read(request_id), wait_for_store=wait_for_store
            )
        except StoreError as error:
            message = "The request cannot be looked up now."
            raise TemporaryError(503, "store_unavailable", message, RETRY_AFTER) from error

    def recent(self, request_id: str) -> RequestOwner | None:
        """Return the owner of a request if it is in memory and in the store."""
        return self._recent.get(request_id)

    async def peek(self, request_id: str) -> RequestOwner | None:
        """Return the owner of a request, None if there is none or it cannot be looked up now."""
        with suppress(StoreError):
            return await self._read(request_id)
        return None

    async def check(self) -> None:
        """Read the store once, so that one that cannot be used is logged."""
        with suppress(StoreError):
            await self._read("")

    async def close(self) -> None:
        """Make a last attempt to write the owners that are held in memory."""
        if self._write_task is not None and not self._write_task.done():
            await asyncio.wait((self._write_task,), timeout=LAST_WRITE_TIMEOUT)
            await cancel_tasks((self._write_task,))

    async def _read(self, request_id: str) -> RequestOwner | None:
        """Return an owner from memory or from the store. Raises: StoreError."""
        request_owner = self._recent.get(request_id) or self._unwritten.get(request_id)
        if request_owner is not None:
            return request_owner
        request_owner = await self._call_store(self._store.get_owner(request_id))
        if request_owner is not None:
            self._recent.setdefault(request_id, request_owner)
        return self._recent.get(request_id)

    async def _call_store(
        self, operation: Coroutine[object, object, T], *, even_if_slow: bool = True
    ) -> T:
        """Return the result of an operation, through the circuit breaker of a remote store.

        even_if_slow: also while the breaker skips the store for being slow.
        """
        if self._breaker is None:
            return await operation
        return await self._breaker.call(operation, even_if_slow=even_if_slow)

    async def _is_store_complete(self, since: float) -> bool:
        if self._breaker is not None:
            return self._breaker.is_complete_since(since)
        await self._store.check_owners_writable()
        return True

    async def _write(
        self, request_id: str, request_owner: RequestOwner, *, even_if_slow: bool = False
    ) -> bool:
        """Write an owner to the store, now or later. False if there is one."""
        if self._breaker is None and self._unwritten:
            self._unwritten[request_id] = request_owner  # the store is failing
            self._start_writing()
            return True
        try:
            put = self._store.put_owner(request_id, request_owner)
            return await self._call_store(put, even_if_slow=even_if_slow)
        except StoreError:
            self._unwritten[request_id] = request_owner
            if self._breaker is None:
                self._start_writing()
            return True

    async def _write_pending(self) -> None:
        """Write the owners that are held in memory to a remote store, after its recovery."""
        unwritten = dict(self._unwritten)
        self._unwritten.clear()
        self._writing += 1
        try:
            await self._write_all(unwritten)
        finally:
            self._writing -= 1

    async def _restore(self) -> None:
        """Write the owners in memory to a remote store that was emptied, the latest first."""
        await self._write_all(dict([*self._recent.items()][::-1]))

    async def _write_all(self, owners: dict[str, RequestOwner]) -> None:
        rest = iter(owners.items())
        while batch := [*islice(rest, WRITE_CONCURRENCY)]:
            await asyncio.gather(*(self._write(*item, even_if_slow=True) for item in batch))

    def _start_writing(self) -> None:
        if self._write_task is None or self._write_task.done():
            self._write_task = asyncio.get_running_loop().create_task(self._write_later())

    async def _write_later(self) -> None:
        """Write the owners that are held in memory to a local store, as soon as that works."""
        while self._unwritten:
            await asyncio.sleep(WRITE_INTERVAL)
            with suppress(StoreError):
                while self._unwritten:
                    request_id, request_owner = next(iter(self._unwritten.items()))
                    await self._store.put_owner(request_id, request_owner)
                    if self._unwritten.get(request_id) == request_owner:
                        del self._unwritten[request_id]


def size_in_memory(request_owner: RequestOwner) -> int:
    return ENTRY_BYTES + len(request_owner.owner)


def create_ownership(
    app: web.Application, breaker: StoreBreaker | None, data_dir: Path, retention: float
) -> RequestOwnership:
    """Create the ownership of an application, in the store of its result cache.

    breaker: the circuit breaker of the result cache's store. None if the cache is off; the owners
        are in the same SQLite file either way.
    retention: seconds for which an owner is stored, without a `breaker`.
    """
    ownership, own_store = open_ownership(breaker, data_dir, retention)
    if breaker is None or not breaker.store.is_remote:
        app.cleanup_ctx.append(ownership_context(ownership, own_store))
    app[OWNERSHIP] = ownership
    return ownership


def open_ownership(
    breaker: StoreBreaker | None, data_dir: Path, retention: float
) -> tuple[RequestOwnership, SqliteOwnerStore | None]:
    """Return the ownership, and its store if that is to be closed at the end.

    breaker, retention: as for `create_ownership`.
    """
    if breaker is not None:
        is_remote = breaker.store.is_remote
        return RequestOwnership(breaker.store, breaker if is_remote else None), None
    own_store = SqliteOwnerStore(data_dir / OWNERS_FILE, retention=retention)
    return RequestOwnership(own_store), own_store


OWNERSHIP = web.AppKey("falproxy.ownership", RequestOwnership)


def ownership_context(
    ownership: RequestOwnership, own_store: SqliteOwnerStore | None
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: check the store at the start, and write the remaining owners at the end.

    own_store: the store, if it is to be closed at the end.
    """

    async def ownership_context(app: web.Application) -> AsyncIterator[None]:
        await ownership.check()
        yield
        await close_ownership(ownership, own_store)

    return ownership_context


async def close_ownership(ownership: RequestOwnership, own_store: SqliteOwnerStore | None) -> None:
    """Write the remaining owners. own_store: as for `ownership_context`."""
    await ownership.close()
    if own_store is not None:
        await close_within(own_store.close(), "The file of request owners", 2 * BUSY_TIMEOUT)
