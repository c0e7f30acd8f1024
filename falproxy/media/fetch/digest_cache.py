"""Digests that still hold, by a hash of the URL that they are of."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from falproxy.media.fetch.response import FetchedDigest

# Of all that is remembered: entries, and bytes of their heads.
CACHE_SIZE = 4096
CACHE_BYTES = 32 * 2**20


class DigestCache:
    """What was read, until its time is up or there is no room: what nobody asked for goes first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: OrderedDict[str, tuple[FetchedDigest, float]] = OrderedDict()
        self._size = 0

    def get(self, name: str) -> FetchedDigest | None:
        if name not in self._entries:
            return None
        fetched, until = self._entries[name]
        left = until - self._clock()
        if left <= 0:
            self._drop(name)
            return None
        self._entries.move_to_end(name)
        return replace(fetched, fresh_for=left)

    def put(self, name: str, fetched: FetchedDigest) -> None:
        if fetched.fresh_for <= 0:
            return
        self._drop(name)
        self._entries[name] = fetched, self._clock() + fetched.fresh_for
        self._size += len(fetched.head)
        while len(self._entries) > CACHE_SIZE or self._size > CACHE_BYTES:
            self._drop(next(iter(self._entries)))

    def _drop(self, name: str) -> None:
        if (entry := self._entries.pop(name, None)) is not None:
            self._size -= len(entry[0].head)
