"""Request ids that we handed out, and what they stand for: in the store, and in our own memory."""

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from uuid import UUID, uuid4

from falproxy.stores.cache import CachedResult, StoreError, VirtualRequest
from falproxy.stores.cache.circuit_breaker import StoreBreaker

# fal's request ids are UUIDs of version 4; ours are of version 8, which RFC 9562 leaves to whoever
# makes them, so that an id is known by sight.
VIRTUAL_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
CACHE_SIZE = 50_000
# Bytes of documents that are kept at hand for ids which were just handed out for them.
RESULTS_MAX_BYTES = 64 * 2**20
# Seconds that our own memory is believed while another process may know better.
LOCAL_TTL = 1.0


def is_virtual_id(request_id: str) -> bool:
    """Whether an id is of our making."""
    return request_id[14:15] == "8" and VIRTUAL_ID.fullmatch(request_id) is not None


def new_virtual_id() -> str:
    number = uuid4().int & ~(0xF << 76) | 8 << 76
    return str(UUID(int=number))


class VirtualRequests:
    """What request ids stand for. What this process handed out it knows without the store."""

    def __init__(self, breaker: StoreBreaker, clock: Callable[[], float] = time.monotonic) -> None:
        self._breaker = breaker
        self._clock = clock
        self._recent: OrderedDict[str, tuple[VirtualRequest, float]] = OrderedDict()
        self._unwritten: OrderedDict[str, VirtualRequest] = OrderedDict()
        breaker.on_recovered.append(self._write_pending)
        self._results: OrderedDict[str, CachedResult] = OrderedDict()
        self._results_size = 0

    async def put(
        self, request_id: str, virtual_request: VirtualRequest, result: CachedResult | None = None
    ) -> None:
        """Remembers what an id stands for, before its client hears of it. result: what it was
        promised, when that is here already."""
        self._remember(request_id, virtual_request)
        if result is not None:
            self._cache_result(request_id, result)
        await self._write(request_id, virtual_request)

    async def _write(self, request_id: str, virtual_request: VirtualRequest) -> None:
        """Tells the store now, or when it is back. Until then this process alone knows it."""
        try:
            await self._breaker.call(
                self._breaker.store.put_virtual_request(request_id, virtual_request)
            )
        except StoreError:
            self._unwritten[request_id] = virtual_request
            if len(self._unwritten) > CACHE_SIZE:
                self._unwritten.popitem(last=False)

    async def _write_pending(self) -> None:
        waiting, self._unwritten = self._unwritten, OrderedDict()
        for request_id, claim in waiting.items():
            await self._write(request_id, claim)

    def peek(self, request_id: str) -> VirtualRequest | None:
        """What this process itself knows, without asking anybody."""
        known = self._recent.get(request_id)
        return None if known is None else known[0]

    def cached_result(self, request_id: str) -> CachedResult | None:
        """The result that an id was handed out for."""
        return self._results.get(request_id)

    async def get(self, request_id: str) -> VirtualRequest | None:
        """Raises: StoreError, nobody can be asked about an id that this process does not know."""
        known = self._recent.get(request_id)
        if known is not None and (request_id in self._results or self._is_fresh(known[1])):
            return known[0]
        try:
            found = await self._breaker.call(self._breaker.store.get_virtual_request(request_id))
        except StoreError:
            if known is None:
                raise
            return known[0]
        if found is not None:
            self._remember(request_id, found)
        return found or (known[0] if known is not None else None)

    def _is_fresh(self, stored_at: float) -> bool:
        return self._clock() - stored_at < LOCAL_TTL

    def _remember(self, request_id: str, virtual_request: VirtualRequest) -> None:
        self._recent[request_id] = virtual_request, self._clock()
        self._recent.move_to_end(request_id)
        if len(self._recent) > CACHE_SIZE:
            self._recent.popitem(last=False)

    def _cache_result(self, request_id: str, result: CachedResult) -> None:
        if (known := self._results.pop(request_id, None)) is not None:
            self._results_size -= len(known.body)
        self._results[request_id] = result
        self._results_size += len(result.body)
        while self._results_size > RESULTS_MAX_BYTES:
            _, dropped = self._results.popitem(last=False)
            self._results_size -= len(dropped.body)
