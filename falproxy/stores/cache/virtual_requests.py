"""Virtual requests, in memory and in the store, and the form of their ids."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from uuid import UUID, uuid4

from cachetools import LRUCache

from falproxy.stores.cache import CachedResult, StoreError, VirtualRequest
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.lookups import Lookups

# fal's request ids are UUIDs of version 4. Virtual ids are of version 8, which RFC 9562 §5.8 leaves
# to applications, so that the form of an id shows where it comes from.
VIRTUAL_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
CACHE_SIZE = 50_000  # virtual requests
ENTRY_BYTES = 1024  # of one virtual request in memory, without the body of its failure
CACHE_MAX_BYTES = CACHE_SIZE * ENTRY_BYTES
# Bytes of the documents that are held in memory for new virtual ids.
RESULTS_MAX_BYTES = 64 * 2**20
# Seconds in which another process notices the recovery of the store, and writes to it.
SETTLE_SECONDS = 0.4
RESTORE_CONCURRENCY = 32
# Seconds in which all processes restore requests in progress, before those that have ended.
RESTORE_DELAY = 1.0
# Seconds during which an entry in memory is used without reading the store, which another process
# may have changed.
LOCAL_TTL = 1.0


def is_virtual_id(request_id: str) -> bool:
    return request_id[14:15] == "8" and VIRTUAL_ID.fullmatch(request_id) is not None


def new_virtual_id() -> str:
    number = uuid4().int & ~(0xF << 76) | 8 << 76
    return str(UUID(int=number))


class VirtualRequests:
    """Virtual requests by id. Those of this process are known without the store.

    clock: a monotonic clock in seconds.
    """

    def __init__(self, breaker: StoreBreaker, clock: Callable[[], float] = time.monotonic) -> None:
        self._breaker = breaker
        self._clock = clock
        self._recent: LRUCache[str, tuple[VirtualRequest, float]] = LRUCache(
            CACHE_MAX_BYTES, lambda entry: size_in_memory(entry[0])
        )
        self._unwritten = new_unwritten()
        self._writing = 0  # runs of `_write_pending`
        self._lookups = Lookups(breaker.check_complete, SETTLE_SECONDS)
        breaker.on_recovered.append(self._write_pending)
        breaker.on_emptied.append(self._restore)
        breaker.unwritten_counts.append(lambda: len(self._unwritten) + self._writing)
        self._results: LRUCache[str, CachedResult] = LRUCache(
            RESULTS_MAX_BYTES, lambda result: ENTRY_BYTES + len(result.body)
        )

    def __repr__(self) -> str:
        return (
            f"<VirtualRequests {len(self._recent)} in memory, {len(self._unwritten)} unwritten,"
            f" {len(self._results)} results>"
        )

    async def put(
        self, request_id: str, virtual_request: VirtualRequest, result: CachedResult | None = None
    ) -> None:
        """Store the virtual request with this id, before its client receives the id.

        result: the result that the id stands for, if there is one already.
        """
        self._remember(request_id, virtual_request)
        if result is not None:
            with suppress(ValueError):  # larger than the whole cache
                self._results[request_id] = result
        await self._write(request_id, virtual_request)

    async def _write(
        self, request_id: str, virtual_request: VirtualRequest, *, even_if_slow: bool = False
    ) -> None:
        """Write to the store, now or later.

        even_if_slow: also while the store is skipped for being slow.
        """
        put = self._breaker.store.put_virtual_request(request_id, virtual_request)
        try:
            await self._breaker.call(put, even_if_slow=even_if_slow)
        except StoreError:
            with suppress(ValueError):  # larger than the whole cache
                self._unwritten[request_id] = virtual_request

    async def _write_pending(self) -> None:
        unwritten, self._unwritten = self._unwritten, new_unwritten()
        self._writing += 1
        try:
            await self._write_all([*unwritten.items()], partial(self._write, even_if_slow=True))
        finally:
            self._writing -= 1

    async def _restore(self) -> None:
        """Write the virtual requests in memory to a store that was emptied, the latest first. Of
        those that several processes know, one that has ended replaces one that has not, and is
        therefore written later."""
        known = [(request_id, entry[0]) for request_id, entry in self._recent.items()][::-1]
        await self._write_all([item for item in known if not is_final(item[1])], self._add)
        with suppress(StoreError):
            await self._restore_results()
        await asyncio.sleep(RESTORE_DELAY)
        await self._write_all([item for item in known if is_final(item[1])], self._write)

    async def _restore_results(self) -> None:
        """Write the results that ids of this process stand for. Raises: StoreError."""
        store, restored = self._breaker.store, set[str]()
        for request_id, result in [*self._results.items()]:
            virtual_request = self.peek(request_id)
            if virtual_request is None or virtual_request.key in restored:
                continue
            key = virtual_request.key
            restored.add(key)
            if (await self._breaker.call(store.get(key))).result is None:
                await self._breaker.call(store.finish(key, "", result))

    async def _add(self, request_id: str, virtual_request: VirtualRequest) -> None:
        """Write to the store, unless another process was faster."""
        with suppress(StoreError):
            stored = self._breaker.store.get_virtual_request(request_id)
            if await self._breaker.call(stored) is not None:
                return
        await self._write(request_id, virtual_request)

    async def _write_all(
        self,
        entries: list[tuple[str, VirtualRequest]],
        write: Callable[[str, VirtualRequest], Awaitable[None]],
    ) -> None:
        for start in range(0, len(entries), RESTORE_CONCURRENCY):
            batch = entries[start : start + RESTORE_CONCURRENCY]
            await asyncio.gather(*(write(*entry) for entry in batch))

    def peek(self, request_id: str) -> VirtualRequest | None:
        """Return the virtual request in this process's memory, without reading the store."""
        entry = self._recent.get(request_id)
        return None if entry is None else entry[0]

    def cached_result(self, request_id: str) -> CachedResult | None:
        return self._results.get(request_id)

    async def get(self, request_id: str) -> VirtualRequest | None:
        """Raises: StoreError, the id is not in memory and the store cannot be read."""
        entry = self._recent.get(request_id)
        if entry is not None and (request_id in self._results or self._is_fresh(entry[1])):
            return entry[0]
        read = self._breaker.store.get_virtual_request(request_id)
        try:
            stored = await self._breaker.call(read, even_if_slow=entry is None)
        except StoreError:
            if entry is None:
                raise
            return entry[0]
        if stored is not None:
            self._remember(request_id, stored)
        return stored or (entry[0] if entry is not None else None)

    async def find(self, request_id: str) -> VirtualRequest | None:
        """Return the virtual request with this id, None if it is certain that there is none.

        Raises: StoreError, the id cannot be looked up.
        """
        return await self._lookups.find(lambda: self.get(request_id), wait_for_store=False)

    def _is_fresh(self, read_at: float) -> bool:
        return self._clock() - read_at < LOCAL_TTL

    def _remember(self, request_id: str, virtual_request: VirtualRequest) -> None:
        try:
            self._recent[request_id] = virtual_request, self._clock()
        except ValueError:  # larger than the whole cache
            self._recent.pop(request_id, None)


def is_final(virtual_request: VirtualRequest) -> bool:
    return virtual_request.is_cancelled or virtual_request.failure is not None


def new_unwritten() -> LRUCache[str, VirtualRequest]:
    return LRUCache(CACHE_MAX_BYTES, size_in_memory)


def size_in_memory(virtual_request: VirtualRequest) -> int:
    failure = virtual_request.failure
    size = ENTRY_BYTES + len(virtual_request.owner)
    return size if failure is None else size + len(failure.body)
