"""Digests that still hold, by a hash of the URL that they are of."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from falproxy.media.fetch.response import Fetched

# Of all that is remembered: entries, and bytes of their heads.
MEMO_MAX = 4096
MEMO_BYTES = 32 * 2**20


class Memo:
    """What was read, until its time is up or there is no room: what nobody asked for goes first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: OrderedDict[str, tuple[Fetched, float]] = OrderedDict()
        self._size = 0

    def find(self, name: str) -> Fetched | None:
        if name not in self._kept:
            return None
        fetched, until = self._kept[name]
        left = until - self._clock()
        if left <= 0:
            self._drop(name)
            return None
        self._kept.move_to_end(name)
        return replace(fetched, fresh_for=left)

    def keep(self, name: str, fetched: Fetched) -> None:
        if fetched.fresh_for <= 0:
            return
        self._drop(name)
        self._kept[name] = fetched, self._clock() + fetched.fresh_for
        self._size += len(fetched.head)
        while len(self._kept) > MEMO_MAX or self._size > MEMO_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, name: str) -> None:
        if (entry := self._kept.pop(name, None)) is not None:
            self._size -= len(entry[0].head)
