"""Owners of queued requests: the caller and the fal key that submitted them."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import web
from cachetools import LRUCache

from falproxy.errors import ProxyError
from falproxy.stores.cache import OwnerStore, RequestOwner, StoreError
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.sqlite_owners import OWNERS_FILE, SqliteOwnerStore

ENTRY_BYTES = 512  # of one owner in memory, without the characters of its name
CACHE_MAX_BYTES = 50_000 * ENTRY_BYTES
UNWRITTEN_MAX = 50_000


class RequestOwnership:
    """Owners of queued requests, in memory and in a store that other processes share.

    breaker: the circuit breaker of a remote store. While it is open, new owners are held in memory
        and written after its recovery, and a request without a known owner is refused. None for a
        local store: without it, only the owners in memory are known.
    """

    def __init__(self, store: OwnerStore, breaker: StoreBreaker | None = None) -> None:
        self._store = store
        self._breaker = breaker
        self._recent: LRUCache[str, RequestOwner] = LRUCache(CACHE_MAX_BYTES, size_in_memory)
        self._unwritten: dict[str, RequestOwner] = {}
        if breaker is not None:
            breaker.on_recovered.append(self._write_pending)

    def __repr__(self) -> str:
        counts = f"{len(self._recent)} cached, {len(self._unwritten)} unwritten"
        return f"<RequestOwnership {self._store!r}, {counts}>"

    async def add(self, request_id: str, request_owner: RequestOwner) -> None:
        """Record an owner before the client receives the request id, so that a crash loses none.

        An existing owner stays: a response that contains the id of another caller's request does
        not transfer it.
        """
        try:
            if await self.get(request_id) is not None:
                return
        except ProxyError:
            pass  # the store is down, so that an existing owner is unknown
        self._recent[request_id] = request_owner
        await self._write(request_id, request_owner)

    async def get(self, request_id: str) -> RequestOwner | None:
        """Raises: ProxyError 503, the owner is not in memory and the remote store is down."""
        request_owner = self._recent.get(request_id)
        if request_owner is not None:
            return request_owner
        try:
            if self._breaker is None:
                request_owner = await self._store.get_owner(request_id)
            else:
                request_owner = await self._breaker.call(self._store.get_owner(request_id))
        except StoreError as error:
            if self._breaker is None:
                return None
            message = "The request cannot be looked up now."
            raise ProxyError(503, "store_unavailable", message, {"Retry-After": "1"}) from error
        if request_owner is not None:
            self._recent[request_id] = request_owner
        return request_owner

    async def _write(self, request_id: str, request_owner: RequestOwner) -> None:
        operation = self._store.put_owner(request_id, request_owner)
        try:
            await (operation if self._breaker is None else self._breaker.call(operation))
        except StoreError:
            if self._breaker is not None and len(self._unwritten) < UNWRITTEN_MAX:
                self._unwritten[request_id] = request_owner

    async def _write_pending(self) -> None:
        unwritten, self._unwritten = self._unwritten, {}
        for request_id, request_owner in unwritten.items():
            await self._write(request_id, request_owner)


def size_in_memory(request_owner: RequestOwner) -> int:
    return ENTRY_BYTES + len(request_owner.owner)


def create_ownership(
    app: web.Application, breaker: StoreBreaker | None, data_dir: Path
) -> RequestOwnership:
    """Create the ownership of an application, in the store of its result cache.

    breaker: the circuit breaker of the result cache's store. None if the cache is off; the owners
        are in the same SQLite file either way.
    """
    if breaker is not None and breaker.store.is_remote:
        return RequestOwnership(breaker.store, breaker)
    own_store: SqliteOwnerStore | None = None
    if breaker is None:
        store: OwnerStore = (own_store := SqliteOwnerStore(data_dir / OWNERS_FILE))
    else:
        store = breaker.store
    ownership = RequestOwnership(store)
    app.cleanup_ctx.append(ownership_context(ownership, own_store))
    return ownership


def ownership_context(
    ownership: RequestOwnership, own_store: SqliteOwnerStore | None
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: read the store once, so that one that cannot be used is logged at the start.

    own_store: the store, if it is to be closed at the end.
    """

    async def ownership_context(app: web.Application) -> AsyncIterator[None]:
        await ownership.get("")
        yield
        if own_store is not None:
            await own_store.close()

    return ownership_context
