"""Request ids that we handed out, and what they stand for: in the store, and in our own memory."""

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from uuid import UUID, uuid4

from falproxy.stores.cache import Claim, Result, StoreError
from falproxy.stores.cache.circuit_breaker import Guard

# fal's request ids are UUIDs of version 4; ours are of version 8, which RFC 9562 leaves to whoever
# makes them, so that an id is known by sight.
OWN_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
REMEMBERED_MAX = 50_000
# Bytes of documents that are kept at hand for ids which were just handed out for them.
AT_HAND_MAX = 64 * 2**20
# Seconds that our own memory is believed while another process may know better.
BELIEVED = 1.0


def is_own(request_id: str) -> bool:
    """Whether an id is of our making."""
    return request_id[14:15] == "8" and OWN_ID.fullmatch(request_id) is not None


def new_id() -> str:
    number = uuid4().int & ~(0xF << 76) | 8 << 76
    return str(UUID(int=number))


class Claims:
    """What request ids stand for. What this process handed out it knows without the store."""

    def __init__(self, guard: Guard, clock: Callable[[], float] = time.monotonic) -> None:
        self._guard = guard
        self._clock = clock
        self._recent: OrderedDict[str, tuple[Claim, float]] = OrderedDict()
        self._unwritten: OrderedDict[str, Claim] = OrderedDict()
        guard.on_back.append(self._catch_up)
        self._at_hand: OrderedDict[str, Result] = OrderedDict()
        self._size = 0

    async def put(self, request_id: str, claim: Claim, result: Result | None = None) -> None:
        """Remembers what an id stands for, before its client hears of it. result: what it was
        promised, when that is here already."""
        self._remember(request_id, claim)
        if result is not None:
            self._lay_at_hand(request_id, result)
        await self._write(request_id, claim)

    async def _write(self, request_id: str, claim: Claim) -> None:
        """Tells the store now, or when it is back. Until then this process alone knows it."""
        try:
            await self._guard.ask(self._guard.store.put_claim(request_id, claim))
        except StoreError:
            self._unwritten[request_id] = claim
            if len(self._unwritten) > REMEMBERED_MAX:
                self._unwritten.popitem(last=False)

    async def _catch_up(self) -> None:
        waiting, self._unwritten = self._unwritten, OrderedDict()
        for request_id, claim in waiting.items():
            await self._write(request_id, claim)

    def peek(self, request_id: str) -> Claim | None:
        """What this process itself knows, without asking anybody."""
        known = self._recent.get(request_id)
        return None if known is None else known[0]

    def at_hand(self, request_id: str) -> Result | None:
        """The result that an id was handed out for."""
        return self._at_hand.get(request_id)

    async def get(self, request_id: str) -> Claim | None:
        """Raises: StoreError, nobody can be asked about an id that this process does not know."""
        known = self._recent.get(request_id)
        if known is not None and (request_id in self._at_hand or self._is_believed(known[1])):
            return known[0]
        try:
            found = await self._guard.ask(self._guard.store.get_claim(request_id))
        except StoreError:
            if known is None:
                raise
            return known[0]
        if found is not None:
            self._remember(request_id, found)
        return found or (known[0] if known is not None else None)

    def _is_believed(self, since: float) -> bool:
        return self._clock() - since < BELIEVED

    def _remember(self, request_id: str, claim: Claim) -> None:
        self._recent[request_id] = claim, self._clock()
        self._recent.move_to_end(request_id)
        if len(self._recent) > REMEMBERED_MAX:
            self._recent.popitem(last=False)

    def _lay_at_hand(self, request_id: str, result: Result) -> None:
        if (known := self._at_hand.pop(request_id, None)) is not None:
            self._size -= len(known.body)
        self._at_hand[request_id] = result
        self._size += len(result.body)
        while self._size > AT_HAND_MAX:
            _, dropped = self._at_hand.popitem(last=False)
            self._size -= len(dropped.body)
