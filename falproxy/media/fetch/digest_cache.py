"""A cache of digests, by a hash of the URL."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from cachetools import TLRUCache

from falproxy.media.fetch.response import FetchedDigest

CACHE_SIZE = 4096  # entries
CACHE_BYTES = 32 * 2**20  # bytes of the entries' heads
ENTRY_MIN = CACHE_BYTES // CACHE_SIZE  # so that the bound on bytes is a bound on entries as well


class CachedDigest(NamedTuple):
    """fresh_until: time on the cache's clock."""

    fetched: FetchedDigest
    fresh_until: float


def expires_at(name: str, cached: CachedDigest, now: float) -> float:
    return cached.fresh_until


def size_of(cached: CachedDigest) -> int:
    return max(ENTRY_MIN, len(cached.fetched.head))


class DigestCache:
    """Digests of files whose hosts allow caching. The least recently used ones are dropped first.

    clock: a monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: TLRUCache[str, CachedDigest] = TLRUCache(
            CACHE_BYTES, ttu=expires_at, timer=clock, getsizeof=size_of
        )

    def get(self, name: str) -> FetchedDigest | None:
        """Return a digest with the remaining seconds of its freshness, or None."""
        if (cached := self._entries.get(name)) is None:
            return None
        return replace(cached.fetched, fresh_for=cached.fresh_until - self._clock())

    def put(self, name: str, fetched: FetchedDigest) -> None:
        if fetched.fresh_for > 0:
            self._entries[name] = CachedDigest(fetched, self._clock() + fetched.fresh_for)
